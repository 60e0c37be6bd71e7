"""Write results as text: Markdown tables and JSON files."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipmerge.checkpoint.output import whole_file

__all__ = ["markdown", "write_json"]


def markdown(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table, padded so that it also reads as plain text; only the first column is to the left."""
    cells = [[_escape(value) for value in row] for row in (headers, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    lines = []
    for row in cells:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("| " + " | ".join([row[0].ljust(widths[0]), *rest]) + " |")
    lines.insert(1, "|" + "|".join(rule) + "|")
    return "\n".join(lines) + "\n"


def _escape(value: Any) -> str:
    return "–" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def write_json(document: Mapping[str, Any], path: str | Path) -> Path:
    """Write a JSON document, whole or not at all; keys keep their order, NaN is refused."""
    target = Path(path)
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with whole_file(target) as sibling:
        sibling.write_text(text, encoding="utf-8")
    return target
