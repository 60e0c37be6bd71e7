"""Sweeps over one coefficient: what is gained on one axis against what is paid on the other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipmerge.report import progress
from clipmerge.report.style import BLACK, BLUE, GREY, LINES, ORANGE, VERMILION, figure, percent, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Document = Mapping[str, Any]

_ROLES: Mapping[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "best-id": (("id", "in-distribution"), ("shift", "shift")),
    "best-mean": (("id", "in-distribution"), ("shift", "shift")),
    "paint": (("supported", "supported"), ("patching", "patching")),
    "keep-control": (("control", "control"), ("target", "target, to be forgotten")),
}
"""Rule → the role on the x axis and the role on the y axis, each with the words of its label."""

_COEFFICIENT = {"interpolate": "α", "patch": "α", "add": "scale", "negate": "scale"}


def sweep(document: Document, path: str | Path) -> None:
    """One point for each coefficient; ends and chosen point marked. A curve of two roles, or lines over α."""
    with figure(path) as page:
        _sweep(page.add_subplot(), document)


def patch(document: Document, path: str | Path) -> None:
    """One panel for each patching step, supported against patching; parallel patching as its search."""
    if document.get("search"):
        progress.search(document["search"], path)
        return
    steps = document["steps"]
    with figure(path, width=0.4 + 6.0 * len(steps)) as page:
        for i, step in enumerate(steps):
            axes = page.add_subplot(1, len(steps), i + 1)
            _sweep(axes, step)
            if len(steps) > 1:
                axes.set_title(f"step {i + 1}", loc="left")


def _sweep(axes: "Axes", document: Document) -> None:
    roles = _ROLES.get(document["rule"]["name"])
    sides = [_splits(document, role) for role, _ in roles] if roles else []
    if roles and all(sides):
        _tradeoff(axes, document, sides, [words for _, words in roles])
    else:
        _lines(axes, document)


def _splits(document: Document, role: str) -> list[str]:
    """The splits that play a role; shifts are everything but the ID split where the rule looks at none."""
    roles = document["rule"]["roles"]
    if role == "shift" and role not in roles:
        return [name for name in document["splits"] if name not in roles["id"]]
    return [name for name in roles.get(role, ()) if name in document["splits"]]


def _mean(point: Document, splits: Sequence[str]) -> float:
    return sum(float(point["scores"][name]["value"]) for name in splits) / len(splits)


def _tradeoff(axes: "Axes", document: Document, sides: Sequence[Sequence[str]], words: Sequence[str]) -> None:
    points = document["points"]
    x, y = ([_mean(point, side) for point in points] for side in sides)
    symbol = _COEFFICIENT.get(str(document.get("family")), "coefficient")
    axes.plot(x, y, color=BLUE, marker="o", markersize=4, linewidth=1.4, label=f"one point per {symbol}")
    ends = (
        ("base", "finetuned")
        if symbol == "α"
        else (f"{symbol} {points[0]['alpha']:g}", f"{symbol} {points[-1]['alpha']:g}")
    )
    for i, marker, colour, name in ((0, "s", BLACK, ends[0]), (-1, "D", VERMILION, ends[1])):
        axes.plot(x[i], y[i], marker, color=colour, markersize=9, label=name, linestyle="none")
    refused = [i for i, point in enumerate(points) if not point["allowed"]]
    if refused:
        axes.plot([x[i] for i in refused], [y[i] for i in refused], "x", color=GREY, markersize=9,
                  linestyle="none", label="not allowed by the rule")  # fmt: skip
    chosen = next((i for i, point in enumerate(points) if point["chosen"]), None)
    if chosen is not None:
        name = f"chosen, {symbol} = {points[chosen]['alpha']:g}"
        axes.plot(x[chosen], y[chosen], "*", color=ORANGE, markeredgecolor=BLACK, markersize=17,
                  linestyle="none", label=name, zorder=5)  # fmt: skip
    grid = [i for i, point in enumerate(points) if not point.get("refined")]  # refined ones lie on each other
    _annotate(axes, [x[i] for i in grid], [y[i] for i in grid], [points[i]["alpha"] for i in grid])
    axes.set_xlabel(_label(words[0], sides[0], document))
    axes.set_ylabel(_label(words[1], sides[1], document))
    percent(axes, "xy")
    axes.legend(loc="best")


def _label(words: str, splits: Sequence[str], document: Document) -> str:
    names = splits[0] if len(splits) == 1 else f"mean of {', '.join(splits)}"
    what = words if names == words else f"{words} ({names})"
    return f"{what}, {title_of(document)} %"


def _annotate(axes: "Axes", x: Sequence[float], y: Sequence[float], alphas: Sequence[float]) -> None:
    """Write the coefficient beside every few points, never more than six, ends left to the legend."""
    step = max(1, round((len(alphas) - 1) / 5))
    for i in range(step, len(alphas) - 1, step):
        axes.annotate(f"{alphas[i]:g}", (x[i], y[i]), xytext=(6, -11), textcoords="offset points",
                      fontsize=8, color="#444444")  # fmt: skip


def _lines(axes: "Axes", document: Document) -> None:
    """Every split's score against the coefficient, for rules that are not a trade of two."""
    points = document["points"]
    alphas = [point["alpha"] for point in points]
    for i, split in enumerate(document["splits"]):
        colour, marker, dash = LINES[i % len(LINES)]
        values = [float(point["scores"][split]["value"]) for point in points]
        axes.plot(alphas, values, dash, color=colour, marker=marker, markersize=5, label=split)
    axes.axvline(document["alpha"], color=BLACK, linewidth=1.0, linestyle=":",
                 label=f"chosen, {document['alpha']:g}")  # fmt: skip
    axes.set_xlabel(_COEFFICIENT.get(str(document.get("family")), "coefficient"))
    axes.set_ylabel(f"{title_of(document)} %")
    percent(axes, "y")
    axes.legend(loc="best")
