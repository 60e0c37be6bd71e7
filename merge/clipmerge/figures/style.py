"""Give every figure one look, and write it: same numbers and same matplotlib, same bytes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipmerge.checkpoint.output import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any colour vision. Every role has a marker of its own as well.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#8A8A8A",
)  # fmt: skip
LINES = ((BLUE, "o", "-"), (VERMILION, "s", "--"), (GREEN, "^", "-."), (PURPLE, "D", ":"), (ORANGE, "v", "-"))
"""Colour, marker and dash of the first, second … line: three ways to tell each from the others."""

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib
    "font.size": 10.0,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "svg.hashsalt": "clipmerge",
    "svg.fonttype": "path",
}


@contextmanager
def figure(path: str | Path | None, *, width: float = 6.4, height: float = 4.4) -> Iterator["Figure"]:
    """Yield a figure to draw on; with a path, write it as PNG and SVG beside each other when the block ends well."""
    import matplotlib

    from clipmerge.figures.notebook import NotebookFigure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        drawn = NotebookFigure(figsize=(width, height), layout="constrained")
        yield drawn
        for axes in drawn.axes:
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="best")
        for target in () if path is None else targets(path):
            kind = target.suffix[1:]
            metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
            with whole_file(target) as sibling:
                drawn.savefig(sibling, format=kind, dpi=150, facecolor="white", metadata=metadata)


def targets(path: str | Path) -> list[Path]:
    """Return the two files of a figure: `curve.png` (or `curve.svg`, or `curve`) → `curve.png` and `curve.svg`."""
    whole = Path(path)
    stem = whole.stem if whole.suffix.lower() in (".png", ".svg") else whole.name
    return [whole.with_name(stem + suffix) for suffix in (".png", ".svg")]


def percent(axes: "Axes", *, x: str | None = None, y: str) -> None:
    """Label an axis whose fractions are shown as percentages."""
    from matplotlib.ticker import PercentFormatter

    for axis, label in ((axes.xaxis, x), (axes.yaxis, y)):
        if label is not None:
            axis.set_major_formatter(PercentFormatter(1.0, symbol=None))
            axis.set_label_text(f"{label} %")
