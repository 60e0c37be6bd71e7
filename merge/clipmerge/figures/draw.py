"""Draw results, each kind by one function: `plot` looks it up in the table at the end."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from clipmerge.errors import SelectionError
from clipmerge.evaluate.metrics import METRICS
from clipmerge.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    LINES,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    figure,
    percent,
    targets,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Result", "draw", "plot", "training"]

Document = Mapping[str, Any]

_AXES: Mapping[str, Mapping[str, str]] = {
    "best-id": {"id": "in-distribution", "shift": "shift"},
    "best-mean": {"id": "in-distribution", "shift": "shift"},
    "paint": {"supported": "supported", "patching": "patching"},
    "keep-control": {"control": "control", "target": "target, to be forgotten"},
}
"""Rule → the role on the x axis and the role on the y axis, each with the words of its label."""

_FAMILIES: Mapping[str, tuple[str, str, str]] = {
    "interpolate": ("Interpolation of base and finetuned weights", "α", "α (0: base, 1: finetuned)"),
    "patch": ("Patching the base with a finetuned model", "α", "α (0: base, 1: finetuned)"),
    "add": ("Adding task vectors to the base", "scale", "scaling coefficient of the task vectors"),
    "negate": ("Subtracting a task vector from the base", "scale", "scaling coefficient of the task vector"),
}
"""Family of a sweep → the figure's title, its coefficient's symbol, and the words of its axis."""

_MARKS: Mapping[str, tuple[str, str, float, str]] = {
    "base": ("s", BLACK, 9, "base"),
    "ingredient": ("o", GREY, 6, "finetuned, each one"),
    "best": ("D", VERMILION, 9, "best single (held-out)"),
    "uniform": ("^", BLUE, 11, "uniform soup"),
    "greedy": ("*", ORANGE, 17, "greedy soup"),
    "ensemble": ("P", GREEN, 10, "logit ensemble"),
    "wise-ft": ("X", PURPLE, 11, "WiSE-FT, α chosen on held-out"),
}
"""Role of a model in a comparison → marker, colour, size and words."""


class Result(Protocol):
    """What a search returns."""

    def to_json(self) -> dict[str, Any]: ...


def plot(result: Result | Document, path: str | Path) -> list[Path]:
    """Draw any result of a search. Returns the files written.

    Args:
        result: it, or the document of its `to_json()`, as `--json` prints it.
        path: the figure; PNG and SVG are both written, whichever suffix it has.

    Raises:
        SelectionError: there is no figure of this kind of result.
    """
    draw(result if isinstance(result, Mapping) else result.to_json(), path)
    return targets(path)


def draw(document: Document, path: str | Path | None = None) -> "Figure":
    """Draw the document of a result's `to_json()`; with a path, write it as PNG and SVG too.

    Raises:
        SelectionError: there is no figure of this kind of result.
    """
    kind = str(document.get("kind"))
    if kind not in _DRAW:
        raise SelectionError(
            f"results of kind {kind!r} cannot be plotted", hint=f"these can: {', '.join(_DRAW)}"
        )
    return _DRAW[kind](document, path)


def training(events: Sequence[Document], path: str | Path) -> list[Path]:
    """Draw a finetuning's log: loss above with the learning rate's shape, held-out scores below."""
    steps = [event for event in events if event["event"] == "step"]
    scores = [event for event in events if event["event"] == "score" and event.get("top1") is not None]
    number, losses = [s["step"] for s in steps], [s["loss"] for s in steps]
    with figure(path, height=5.6 if scores else 3.6) as page:
        loss = lowest = page.add_subplot(2 if scores else 1, 1, 1)
        loss.plot(number, losses, color=BLUE, linewidth=1.0, label="loss")
        peak = max((s["lr"] for s in steps), default=0.0)
        if peak > 0:
            shape = [s["lr"] / peak * max(losses) for s in steps]
            loss.plot(number, shape, ":", color=GREY, label=f"learning rate, peak {peak:g}")
        loss.set(title="Finetuning: training loss" + (" and held-out score" if scores else ""))
        loss.set(ylabel="training loss", ylim=(0, None))
        if scores:
            lowest = page.add_subplot(2, 1, 2, sharex=loss)
            x, y = [s["step"] for s in scores], [s["top1"] for s in scores]
            lowest.plot(x, y, "o-", color=ORANGE, markeredgecolor=BLACK)
            percent(lowest, y="held-out, top-1")
        lowest.set_xlabel("training step")
    return targets(path)


def _sweep(document: Document, path: str | Path | None) -> "Figure":
    """Draw a sweep in one panel, patching in one for each of its sweeps; parallel patching as its search."""
    steps = document.get("steps", [document])
    if steps[0]["kind"] == "coefficients":
        return _search(steps[0], path)
    with figure(path, width=0.4 + 6.0 * len(steps)) as page:
        for i, step in enumerate(steps, 1):
            axes = page.add_subplot(1, len(steps), i)
            _points(axes, step)
            if len(steps) > 1:
                axes.set_title(f"Patching, step {i} of {len(steps)}")
    return page


def _points(axes: "Axes", document: Document) -> None:
    """Draw one point for each coefficient, ends and chosen point marked: two roles, or lines over the coefficient."""
    family = str(document.get("family", "sweep"))
    title, symbol, words = _FAMILIES.get(family, (family.capitalize(), "coefficient", "coefficient"))
    axes.set_title(title)
    sides = {role: _splits(document, role) for role in _AXES.get(document["rule"]["name"], ())}
    if sides and all(sides.values()):
        _tradeoff(axes, document, sides, symbol)
    else:
        _lines(axes, document)
        axes.set_xlabel(words)


def _splits(document: Document, role: str) -> list[str]:
    """Return the splits that play a role; shifts are all but the ID split where the rule looks at none."""
    roles = document["rule"]["roles"]
    if role == "shift" and role not in roles:
        return [name for name in document["splits"] if name not in roles["id"]]
    return [name for name in roles.get(role, ()) if name in document["splits"]]


def _tradeoff(axes: "Axes", document: Document, sides: Mapping[str, Sequence[str]], symbol: str) -> None:
    """Draw what is gained on one axis against what is paid on the other."""
    points = document["history"]
    values = [float(point["coefficient"]) for point in points]
    x, y = (
        [sum(point["scores"][name]["value"] for name in side) / len(side) for point in points]
        for side in sides.values()
    )
    axes.plot(x, y, color=BLUE, marker="o", markersize=4, linewidth=1.4, label=f"one point per {symbol}")

    def mark(which: Sequence[int], marker: str, colour: str, size: float, label: str, **style: Any) -> None:
        if all(len(side) == 1 for side in sides.values()):
            splits = [side[0] for side in sides.values()]
            for scores in [points[i]["scores"] for i in which if colour != GREY]:
                ends = {name: _ends(scores[name]) for name in splits}
                _cross(axes, {name: scores[name]["value"] for name in splits}, ends, splits, colour)
        _mark(axes, [x[i] for i in which], [y[i] for i in which], marker, colour, size, label, **style)

    ends = ("base", "finetuned") if symbol == "α" else [f"{symbol} {values[i]:g}" for i in (0, -1)]
    mark([0], "s", BLACK, 9, ends[0])
    mark([-1], "D", VERMILION, 9, ends[1])
    mark([i for i, p in enumerate(points) if not p["allowed"]], "x", GREY, 9, "not allowed by the rule")
    for i in [i for i, point in enumerate(points) if point["chosen"]][:1]:
        mark([i], "*", ORANGE, 17, f"chosen, {symbol} = {values[i]:g}", markeredgecolor=BLACK, zorder=5)
    grid = [i for i, point in enumerate(points) if not point.get("refined")]  # refined ones lie on each other
    step = max(1, round((len(grid) - 1) / 5))  # never more than six numbers; the legend tells the ends
    for i in grid[step:-1:step]:
        axes.annotate(f"{values[i]:g}", (x[i], y[i]), xytext=(6, -11), textcoords="offset points",
                      fontsize=8, color="#444444")  # fmt: skip
    words, labels = _AXES[document["rule"]["name"]], []
    for role, splits in sides.items():
        names = splits[0] if len(splits) == 1 else f"mean of {', '.join(splits)}"
        labels.append(f"{words[role]}{'' if names == words[role] else f' ({names})'}, {_metric(document)}")
    percent(axes, x=labels[0], y=labels[1])


def _lines(axes: "Axes", document: Document) -> None:
    """Draw every split's score against the coefficient, for rules that are not a trade of two."""
    points = document["history"]
    for i, split in enumerate(document["splits"]):
        colour, marker, dash = LINES[i % len(LINES)]
        x, y = [p["coefficient"] for p in points], [float(p["scores"][split]["value"]) for p in points]
        axes.plot(x, y, dash, color=colour, marker=marker, markersize=5, label=split)
        low, high = zip(*(_ends(p["scores"][split]) for p in points), strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    chosen = float(document["coefficient"])
    axes.axvline(chosen, color=BLACK, linewidth=1.0, linestyle=":", label=f"chosen, {chosen:g}")
    percent(axes, y=f"{_metric(document)} (shaded: 95 %)")


def _soup(document: Document, path: str | Path | None) -> "Figure":
    """Draw held-out score against number of checkpoints tried: accepted, refused, and each one alone."""
    from matplotlib.ticker import MaxNLocator

    steps = document["history"]
    accepted = [step for step in steps if step["accepted"]]
    refused = [step for step in steps if not step["accepted"] and step["value"] is not None]
    stopped = [step for step in steps if not step["accepted"] and step["value"] is None]
    alone = [step for step in steps if step.get("alone") is not None]
    kind = "ensemble" if document["kind"] == "greedy_ensemble" else "soup"
    with figure(path) as page:
        axes = page.add_subplot()
        axes.step([s["number"] for s in steps], [s["best"] for s in steps], where="post", color=BLUE,
                  linewidth=1.4, label=f"the {kind} so far")  # fmt: skip
        for rows, key, marker, colour, size, label, inside in (
            (alone, "alone", ".", GREY, None, "alone", None),
            (accepted, "value", "o", GREEN, 9, f"accepted ({len(accepted)})", None),
            (refused, "value", "x", VERMILION, 8, f"refused ({len(refused)})", None),
            (stopped, "at_most", "v", VERMILION, 8, f"refused early, at most this ({len(stopped)})", "white"),
        ):
            x, y = [row["number"] for row in rows], [row[key] for row in rows]
            _mark(axes, x, y, marker, colour, size, label, markerfacecolor=inside)
            if key == "value":
                for row in rows:
                    axes.plot([row["number"]] * 2, _ends(row), color=colour, linewidth=1.0, alpha=0.6)
        axes.set_title(f"Greedy {kind}: each checkpoint stays in if the held-out score does not fall")
        axes.set_xlabel("checkpoints tried")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        percent(axes, y=f"held-out score on {document['split']} (bars: 95 %), {_metric(document)}")
    return page


def _coefficients(document: Document, path: str | Path | None) -> "Figure":
    """Draw the learned share of every ingredient; a box of shares where each has one per tensor or group."""
    columns: dict[str, list[float]] = {}
    for key, value in document["coefficients"].items():
        for name, number in value.items() if isinstance(value, Mapping) else [(key, value)]:
            columns.setdefault(name, []).append(float(number))
    with figure(path, height=1.8 + 0.32 * len(columns)) as page:
        axes = page.add_subplot()
        if all(len(column) == 1 for column in columns.values()):
            axes.barh(list(columns), [column[0] for column in columns.values()], color=BLUE)
        else:
            axes.boxplot(list(columns.values()), orientation="horizontal", medianprops={"color": VERMILION})
            axes.set_yticks(range(1, len(columns) + 1), list(columns))
        axes.axvline(1 / len(columns), color=BLACK, linestyle=":", linewidth=1.0, label="uniform soup")
        axes.invert_yaxis()
        axes.set(title="Learned soup: the share of each checkpoint", xlabel="coefficient (they sum to 1)")
    return page


def _search(document: Document, path: str | Path | None) -> "Figure":
    """Draw every evaluation of a search over several coefficients, and the best so far."""
    values = [float(point["value"]) for point in document["history"]]
    with figure(path) as page:
        axes = page.add_subplot()
        tried = range(1, len(values) + 1)
        axes.plot(tried, values, "o", color=GREY, markersize=5, label="tried")
        axes.step(tried, list(accumulate(values, max)), where="post", color=BLUE, label="best so far")
        axes.set(
            title="Search over several coefficients at once", xlabel="evaluations of the held-out splits"
        )
        percent(axes, y=f"{document['rule']['says']},")
    return page


def _comparison(document: Document, path: str | Path | None) -> "Figure":
    """Draw many models: in-distribution score on x, score under shift on y.

    The document is `{"x", "y": split names, "rows": [{"role", "scores"}], "curve": [{"alpha", "scores"}]}`; a row may
    have "intervals", which are drawn as crosses.
    """
    x, y = document["x"], document["y"]
    labels = {x: x, y: y} | document.get("labels", {})
    with figure(path, width=7.2, height=4.8) as page:
        axes = page.add_subplot()
        if curve := [point["scores"] for point in document.get("curve") or ()]:
            axes.plot([s[x] for s in curve], [s[y] for s in curve], "-", color=SKY, marker=".",
                      label="WiSE-FT, one point per α", zorder=1)  # fmt: skip
        for role, (marker, colour, size, label) in _MARKS.items():
            given = [row for row in document["rows"] if row["role"] == role]
            rows = [row["scores"] for row in given]
            for row in given if role != "ingredient" else ():
                if ends := row.get("intervals"):
                    _cross(axes, row["scores"], ends, (x, y), colour)
            edge = "white" if role == "ingredient" else BLACK
            _mark(axes, [s[x] for s in rows], [s[y] for s in rows], marker, colour, size, label,
                  markeredgecolor=edge, markeredgewidth=0.7)  # fmt: skip
        crosses = any("intervals" in row for row in document["rows"])
        title = "Every model by its score in distribution and under shift"
        axes.set_title(title + "\ncrosses: 95 % intervals" * crosses)
        percent(axes, x=f"in-distribution: {labels[x]}, top-1", y=f"shift: {labels[y]}, top-1")
    return page


def _task_vectors(document: Document, path: str | Path | None) -> "Figure":
    """Draw cosines and sign conflicts of each two tasks as heat-maps: parts of the model down, pairs across."""
    tasks, parts = document["tasks"], [*document["parts"], document["whole"]]
    pairs = [(i, j) for i in range(len(tasks)) for j in range(i)]
    rows = [f"{p['tower'] or 'all'}" + ("" if p["block"] is None else f" {p['block']}") for p in parts]
    wide, high = 4 + 0.3 * len(pairs), 1.6 + 0.2 * len(parts)
    kinds = (("cosines", "cosine", -1, "RdBu_r"), ("conflicts", "share of opposite signs", 0, "viridis"))
    with figure(path, width=min(2 * wide, 24), height=high) as page:
        for number, (key, title, least, colours) in enumerate(kinds, 1):
            axes = page.add_subplot(1, 2, number)
            values = [
                [float("nan") if p[key][i][j] is None else p[key][i][j] for i, j in pairs] for p in parts
            ]
            image = axes.imshow(values, vmin=least, vmax=1, cmap=colours, aspect="auto")
            axes.set_yticks(range(len(rows)), rows, fontsize=7)
            names = [f"{tasks[j]}–{tasks[i]}" for i, j in pairs]
            axes.set_xticks(range(len(pairs)), names, rotation=90, fontsize=7)
            axes.set_title(f"Task vectors: {title}")
            axes.grid(visible=False)
            page.colorbar(image, ax=axes)
    return page


def _ends(score: Document) -> Sequence[float]:
    """Return a score's 95 % interval; the score itself where a document has none."""
    return score.get("interval") or (score["value"], score["value"])


def _cross(
    axes: "Axes",
    value: Mapping[str, float],
    ends: Mapping[str, Sequence[float]],
    splits: Sequence[str],
    colour: str,
) -> None:
    """Draw the 95 % intervals of a point's two scores."""
    x, y = splits
    for a, b in (((ends[x]), (value[y],) * 2), ((value[x],) * 2, ends[y])):
        axes.plot(a, b, "-", color=colour, linewidth=0.9, alpha=0.6, zorder=1.5)


def _mark(
    axes: "Axes",
    x: Sequence[float],
    y: Sequence[float],
    marker: str,
    colour: str,
    size: float | None,
    label: str,
    **style: Any,
) -> None:
    """Draw points that no line joins; where there are none, the legend does not name them."""
    if x:
        axes.plot(x, y, marker, color=colour, markersize=size, linestyle="none", label=label, **style)


def _metric(document: Document) -> str:
    """Return the metric of a result, as tables call it."""
    name = str(document.get("metric", "top1"))
    return METRICS[name].title if name in METRICS else name


_DRAW: Mapping[str, "Callable[[Document, str | Path | None], Figure]"] = {
    "sweep": _sweep,
    "patch": _sweep,
    "greedy_soup": _soup,
    "greedy_ensemble": _soup,
    "learned_soup": _coefficients,
    "coefficients": _search,
    "comparison": _comparison,
    "task_vectors": _task_vectors,
}
