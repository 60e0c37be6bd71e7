"""How commands speak: data on stdout, talk on stderr, nothing by colour alone."""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def is_first() -> bool:
    """Return whether this process writes and speaks: the only one, or torchrun's first.

    Reads torchrun's own variable, because `clipmerge.distributed` imports torch, which most commands never need.
    """
    return os.environ.get("RANK", "0") == "0"


def say(text: str, *, quiet: bool = False) -> None:
    """Print a remark on stderr. Text from a file is made harmless."""
    if not quiet:
        print(plain(text), file=sys.stderr)


def short(path: Path) -> str:
    """Return the path as seen from the working folder where it lies inside it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def document(data: Any) -> None:
    """Print one JSON document on stdout; numbers that are not finite, which JSON does not know, are null."""
    plain_data = json.loads(json.dumps(data, default=_plain), parse_constant=lambda _: None)
    print(json.dumps(plain_data, indent=2, ensure_ascii=False, allow_nan=False))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None) -> None:
    """Print a table on stdout: first column to the left, the others to the right; None shows as a dash.

    Headers wrap between words where the terminal is narrow; cells never do.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    room = console.width if sys.stdout.isatty() else 200
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max([1, *(len(row[i]) for row in cells)]) for i in range(len(columns))]
    heads = list(columns)
    if sum(max(len(head), width) + 3 for head, width in zip(heads, widths, strict=True)) > room:
        heads = [head.replace(" ", "\n") if len(head) > width else head
                 for head, width in zip(heads, widths, strict=True)]  # fmt: skip
    longest = [max(width, *map(len, head.split("\n"))) for head, width in zip(heads, widths, strict=True)]
    apart = 1 if sum(longest) + 3 * len(longest) <= room else 0
    if title:
        console.print(Text(plain(title), style="bold"), soft_wrap=True)
    shown = Table(box=SIMPLE_HEAD, padding=(0, apart), pad_edge=False)
    for i, head in enumerate(heads):
        shown.add_column(Text(head), justify="left" if i == 0 else "right", no_wrap=True)
    for row in cells:
        shown.add_row(*map(Text, row))
    console.width = max(room, sum(longest) + (2 * apart + 1) * len(longest) + 1)
    console.print(shown)


def plain(text: str) -> str:
    """Return text from a file as a terminal may show it: no control character but line ends."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def percent(value: float, digits: int = 2) -> str:
    """Return a share in percent, without the sign: `81.25`."""
    return f"{100 * value:.{digits}f}"


def interval(bounds: Sequence[float], digits: int = 1) -> str:
    """Return an interval of shares in percent: `78.1–84.0`."""
    low, high = bounds
    return f"{percent(low, digits)}–{percent(high, digits)}"


def counts(numbers: Mapping[str, int]) -> str:
    """Return `{"F32": 302}` as `F32`; several with their counts: `F32 300, I64 2`."""
    if len(numbers) == 1:
        return next(iter(numbers))
    return ", ".join(f"{key} {count}" for key, count in numbers.items())


def size(nbytes: float) -> str:
    """Return bytes for people, in thousands: `605.2 MB`."""
    if nbytes < 1000:
        return f"{nbytes:.0f} B"
    for unit in ("kB", "MB", "GB"):
        nbytes /= 1000
        if nbytes < 1000:
            return f"{nbytes:.1f} {unit}"
    return f"{nbytes / 1000:.1f} TB"


def part(tower: str, block: int | None) -> str:
    """Return the name of a tower, or of a block in it: `visual.block[3]`."""
    return tower if block is None else f"{tower}.block[{block}]"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else plain(str(value))


def _plain(value: Any) -> Any:
    """Return paths as text, and numpy and torch values as numbers and lists of them."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")
