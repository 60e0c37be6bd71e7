"""How commands speak: data on stdout, talk on stderr, nothing by colour alone."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def say(text: str, *, quiet: bool = False) -> None:
    """A remark for the person at the terminal, on stderr."""
    if not quiet:
        print(text, file=sys.stderr)


def wrote(path: Path, *, quiet: bool = False) -> None:
    """The remark that ends a command that wrote a file; inside the working folder its path is short."""
    here = Path.cwd()
    say(f"wrote {path.relative_to(here) if path.is_relative_to(here) else path}", quiet=quiet)


def left_out(source: str, items: Sequence[str], used: int, *, quiet: bool = False) -> None:
    """The remark about what --skip-bad left out: how much, the first of it, and what is used."""
    if items:
        more = f", … and {len(items) - 1} more" if len(items) > 1 else ""
        say(plain(f"{source}: left out {len(items)} ({items[0]}{more}); {used} images are used"), quiet=quiet)


def document(data: Any) -> None:
    """One JSON document on stdout; numbers that are not finite, which JSON does not know, are null."""
    plain_data = json.loads(json.dumps(data, default=_plain), parse_constant=lambda _: None)
    print(json.dumps(plain_data, indent=2, ensure_ascii=False, allow_nan=False))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None) -> None:
    """A table on stdout: first column to the left, the others to the right; None shows as a dash.

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
    """Text from a file as a terminal may show it: no escape sequence, no control character but line ends."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else plain(str(value))


def _plain(value: Any) -> Any:
    """Paths as text, numpy and torch scalars as numbers, tuples of both."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")
