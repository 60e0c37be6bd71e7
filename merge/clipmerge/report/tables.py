"""Results as text: Markdown tables and JSON files."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipmerge.errors import OutputError


def markdown(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, columns padded so that it also reads as plain text; the first column to the left."""
    cells = [[_escape(header) for header in headers], *([_escape(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    lines = [_line(cells[0], widths), _rule(widths), *(_line(row, widths) for row in cells[1:])]
    return "\n".join(lines) + "\n"


def _escape(value: Any) -> str:
    return "–" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first = row[0].ljust(widths[0])
    return "| " + " | ".join([first, *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) + " |"


def _rule(widths: Sequence[int]) -> str:
    return "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"


def write_json(document: Mapping[str, Any], path: str | Path) -> Path:
    """Write a JSON document, whole or not at all; keys keep their order, NaN is refused."""
    target = Path(path)
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(target, text.encode())
    return target


def write_whole(target: Path, content: bytes, *, what: str = "") -> None:
    """Write a small file, whole or not at all; one that is there is replaced.

    Args:
        what: how an error calls it, such as "the figure ".

    Raises:
        OutputError: its folder does not exist or cannot be written, or the disk is full.
    """
    sibling = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        sibling.write_bytes(content)
        sibling.replace(target)
    except OSError as error:
        sibling.unlink(missing_ok=True)
        raise OutputError(
            f"{what}{target} cannot be written: {error.strerror or error}",
            hint="the folder must exist and be writable",
        ) from error
