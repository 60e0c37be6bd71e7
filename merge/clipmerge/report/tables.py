"""Results as text: Markdown tables and JSON files."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipmerge.checkpoint.output import whole_file


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
    with whole_file(target) as sibling:
        sibling.write_text(text, encoding="utf-8")
    return target
