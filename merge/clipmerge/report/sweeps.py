"""Draw sweeps over one coefficient: what is gained on one axis against what is paid on the other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipmerge.report import history
from clipmerge.report.style import (
    BLACK,
    BLUE,
    GREY,
    LINES,
    ORANGE,
    VERMILION,
    figure,
    metric_title,
    percent,
)  # fmt: skip

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Document = Mapping[str, Any]

_AXES: Mapping[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "best-id": (("id", "in-distribution"), ("shift", "shift")),
    "best-mean": (("id", "in-distribution"), ("shift", "shift")),
    "paint": (("supported", "supported"), ("patching", "patching")),
    "keep-control": (("control", "control"), ("target", "target, to be forgotten")),
}
"""Rule → the role on the x axis and the role on the y axis, each with the words of its label."""

_FAMILIES: Mapping[str, tuple[str, str, str]] = {
    "interpolate": ("Interpolation of base and finetuned weights", "α", "α (0: base, 1: finetuned)"),
    "patch": ("Patching the base with a finetuned model", "α", "α (0: base, 1: finetuned)"),
    "add": ("Adding task vectors to the base", "scale", "scaling coefficient of the task vectors"),
    "negate": ("Subtracting a task vector from the base", "scale", "scaling coefficient of the task vector"),
}
"""Family of a sweep → the figure's title, its coefficient's symbol, and the words of its axis."""


def sweep(document: Document, path: str | Path) -> None:
    """Draw one point for each coefficient, ends and chosen point marked: two roles, or lines over the coefficient."""
    with figure(path) as page:
        _draw(page.add_subplot(), document)


def patch(document: Document, path: str | Path) -> None:
    """Draw one panel for each patching step, supported against patching; parallel patching as its search."""
    if document.get("search"):
        history.search(document["search"], path)
        return
    steps = document["steps"]
    with figure(path, width=0.4 + 6.0 * len(steps)) as page:
        for i, step in enumerate(steps):
            axes = page.add_subplot(1, len(steps), i + 1)
            _draw(axes, step)
            if len(steps) > 1:
                axes.set_title(f"Patching, step {i + 1} of {len(steps)}")


def _draw(axes: "Axes", document: Document) -> None:
    title, _, _ = _words(document)
    axes.set_title(title)
    roles = _AXES.get(document["rule"]["name"], ())
    sides = [_splits(document, role) for role, _ in roles]
    if roles and all(sides):
        _tradeoff(axes, document, sides, [words for _, words in roles])
    else:
        _lines(axes, document)
    axes.legend(loc="best")


def _words(document: Document) -> tuple[str, str, str]:
    family = str(document.get("family", "sweep"))
    return _FAMILIES.get(family, (family.capitalize(), "coefficient", "coefficient"))


def _splits(document: Document, role: str) -> list[str]:
    """Return the splits that play a role; shifts are all but the ID split where the rule looks at none."""
    roles = document["rule"]["roles"]
    if role == "shift" and role not in roles:
        return [name for name in document["splits"] if name not in roles["id"]]
    return [name for name in roles.get(role, ()) if name in document["splits"]]


def _tradeoff(axes: "Axes", document: Document, sides: Sequence[Sequence[str]], words: Sequence[str]) -> None:
    points = document["points"]
    _, symbol, _ = _words(document)
    values = [float(point["coefficient"]) for point in points]
    x, y = (
        [sum(point["scores"][name]["value"] for name in side) / len(side) for point in points]
        for side in sides
    )
    axes.plot(x, y, color=BLUE, marker="o", markersize=4, linewidth=1.4, label=f"one point per {symbol}")
    ends = ("base", "finetuned")
    if symbol != "α":
        ends = (f"{symbol} {values[0]:g}", f"{symbol} {values[-1]:g}")
    for i, marker, colour, name in ((0, "s", BLACK, ends[0]), (-1, "D", VERMILION, ends[1])):
        axes.plot(x[i], y[i], marker, color=colour, markersize=9, label=name, linestyle="none")
    refused = [i for i, point in enumerate(points) if not point["allowed"]]
    if refused:
        axes.plot([x[i] for i in refused], [y[i] for i in refused], "x", color=GREY, markersize=9,
                  linestyle="none", label="not allowed by the rule")  # fmt: skip
    for i in [i for i, point in enumerate(points) if point["chosen"]][:1]:
        axes.plot(x[i], y[i], "*", color=ORANGE, markeredgecolor=BLACK, markersize=17, linestyle="none",
                  label=f"chosen, {symbol} = {values[i]:g}", zorder=5)  # fmt: skip
    grid = [i for i, point in enumerate(points) if not point.get("refined")]  # refined ones lie on each other
    step = max(1, round((len(grid) - 1) / 5))  # never more than six numbers; the legend tells the ends
    for i in grid[step:-1:step]:
        axes.annotate(f"{values[i]:g}", (x[i], y[i]), xytext=(6, -11), textcoords="offset points",
                      fontsize=8, color="#444444")  # fmt: skip
    axes.set_xlabel(_label(words[0], sides[0], document))
    axes.set_ylabel(_label(words[1], sides[1], document))
    percent(axes, "xy")


def _label(words: str, splits: Sequence[str], document: Document) -> str:
    names = splits[0] if len(splits) == 1 else f"mean of {', '.join(splits)}"
    what = words if names == words else f"{words} ({names})"
    return f"{what}, {metric_title(document)} %"


def _lines(axes: "Axes", document: Document) -> None:
    """Draw every split's score against the coefficient, for rules that are not a trade of two."""
    points = document["points"]
    for i, split in enumerate(document["splits"]):
        colour, marker, dash = LINES[i % len(LINES)]
        values = [float(point["scores"][split]["value"]) for point in points]
        axes.plot([p["coefficient"] for p in points], values, dash, color=colour, marker=marker, markersize=5,
                  label=split)  # fmt: skip
    chosen = float(document["coefficient"])
    axes.axvline(chosen, color=BLACK, linewidth=1.0, linestyle=":", label=f"chosen, {chosen:g}")
    axes.set_xlabel(_words(document)[2])
    axes.set_ylabel(f"{metric_title(document)} %")
    percent(axes, "y")
