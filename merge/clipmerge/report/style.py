"""Give every figure one look, and write it: same numbers and same matplotlib, same bytes."""

from collections.abc import Iterator, Mapping
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

FORMATS = (".png", ".svg")

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
def figure(path: str | Path, *, width: float = 6.4, height: float = 4.4) -> Iterator["Figure"]:
    """Yield a figure to draw on; write it as PNG and SVG beside each other when the block ends well."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn
        for target in targets(path):
            metadata = {"Date": None, "Creator": None} if target.suffix == ".svg" else {"Software": None}
            with whole_file(target) as sibling:
                drawn.savefig(
                    sibling, format=target.suffix[1:], dpi=150, facecolor="white", metadata=metadata
                )


def targets(path: str | Path) -> list[Path]:
    """Return the two files of a figure: `curve.png` (or `curve.svg`, or `curve`) → `curve.png` and `curve.svg`."""
    whole = Path(path)
    stem = whole.with_suffix("") if whole.suffix.lower() in FORMATS else whole
    return [stem.with_name(stem.name + suffix) for suffix in FORMATS]


def percent(axes: "Axes", which: str) -> None:
    """Show fractions on the axes `which` ("x", "y" or "xy") as percentages."""
    from matplotlib.ticker import PercentFormatter

    for letter in which:
        axis = axes.xaxis if letter == "x" else axes.yaxis
        axis.set_major_formatter(PercentFormatter(1.0, symbol=None))


def metric_title(document: Mapping[str, Any]) -> str:
    """Return the metric of a result, as tables call it."""
    from clipmerge.evaluate.metrics import METRICS

    name = str(document.get("metric", "top1"))
    return METRICS[name].title if name in METRICS else name
