"""How commands speak: data on stdout, talk on stderr, nothing by colour alone."""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


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


def document(data: object) -> None:
    """Print one JSON document on stdout; numbers that are not finite, which JSON does not know, are null."""
    plain_data = json.loads(json.dumps(data, default=_plain), parse_constant=lambda _: None)
    print(json.dumps(plain_data, indent=2, ensure_ascii=False, allow_nan=False))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """Print a table on stdout: first column to the left, the others to the right; None shows as a dash.

    Headers wrap between words where the terminal is narrow; cells never do.
    """
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.width = console.width if sys.stdout.isatty() else 200
    if title:
        console.print(Text(plain(title), style="bold"), soft_wrap=True)
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max([1, *map(cell_len, column)]) for column in zip(columns, *cells, strict=True)]
    if sum(widths) + 3 * len(widths) > console.width:
        words = [max(head.split(), key=cell_len, default="") for head in columns]
        widths = [max([1, *map(cell_len, column)]) for column in zip(words, *cells, strict=True)]
    apart = 1 if sum(widths) + 3 * len(widths) <= console.width else 0
    shown = Table(box=SIMPLE_HEAD, padding=(0, apart), pad_edge=False)
    for i, (head, width) in enumerate(zip(columns, widths, strict=True)):
        shown.add_column(Text(head), justify="left" if i == 0 else "right", width=width)
    for row in cells:
        shown.add_row(*map(Text, row))
    console.width = max(console.width, sum(widths) + (2 * apart + 1) * len(widths) + 1)
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


def duration(seconds: float) -> str:
    """Return a time as one reads it: `8.2 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def counts(numbers: Mapping[str, int]) -> str:
    """Return `{"F32": 302}` as `F32`; several with their counts: `F32 300, I64 2`."""
    return ", ".join(f"{key} {count}" if len(numbers) > 1 else key for key, count in numbers.items())


def part(tower: str, block: int | None) -> str:
    """Return the name of a tower, or of a block in it: `visual.block[3]`."""
    return tower if block is None else f"{tower}.block[{block}]"


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else plain(str(value))


def _plain(value: object) -> object:
    """Return paths as text, and numpy and torch values as numbers and lists of them."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")
