"""How a result came about: a soup's trials, a search's evaluations, a training's steps."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from clipmerge.report.style import BLACK, BLUE, GREEN, GREY, ORANGE, VERMILION, figure, percent, title_of

Document = Mapping[str, Any]


def soup(document: Document, path: str | Path) -> None:
    """Held-out score against number of checkpoints tried: accepted, refused, and each one alone."""
    from matplotlib.ticker import MaxNLocator

    steps = document["history"]
    kept = [step for step in steps if step["accepted"]]
    refused = [step for step in steps if not step["accepted"] and step["value"] is not None]
    cut = [step for step in steps if not step["accepted"] and step["value"] is None]
    with figure(path) as page:
        axes = page.add_subplot()
        axes.step([s["number"] for s in steps], [s["best"] for s in steps], where="post", color=BLUE,
                  linewidth=1.4, label="the soup so far")  # fmt: skip
        alone = [step for step in steps if step.get("alone") is not None]
        axes.plot([s["number"] for s in alone], [s["alone"] for s in alone], ".", color=GREY, label="alone")
        axes.plot([s["number"] for s in kept], [s["value"] for s in kept], "o", color=GREEN, markersize=9,
                  label=f"accepted ({len(kept)})")  # fmt: skip
        if refused:
            axes.plot([s["number"] for s in refused], [s["value"] for s in refused], "x", color=VERMILION,
                      markersize=8, markeredgewidth=2, label=f"refused ({len(refused)})")  # fmt: skip
        if cut:
            axes.plot([s["number"] for s in cut], [s["at_most"] for s in cut], "v",
                      color=VERMILION, markerfacecolor="white", markersize=8,
                      label=f"refused early, at most this ({len(cut)})")  # fmt: skip
        axes.set_xlabel("checkpoints tried")
        axes.set_ylabel(f"{document['split']}, {title_of(document)} %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        percent(axes, "y")
        axes.legend(loc="best")


def coefficients(document: Document, path: str | Path) -> None:
    """The learned coefficient of every ingredient; a box of them where each has one per tensor."""
    values = _columns(document["coefficients"])
    with figure(path, height=1.6 + 0.32 * len(values)) as page:
        axes = page.add_subplot()
        if all(len(column) == 1 for column in values.values()):
            axes.barh(list(values), [column[0] for column in values.values()], color=BLUE)
        else:
            axes.boxplot(list(values.values()), orientation="horizontal", medianprops={"color": VERMILION})
            axes.set_yticks(range(1, len(values) + 1), list(values))
        axes.axvline(1 / len(values), color=BLACK, linestyle=":", linewidth=1.0, label="uniform soup")
        axes.invert_yaxis()
        axes.set_xlabel("coefficient")
        axes.legend(loc="best")


def _columns(coefficients: Document) -> dict[str, list[float]]:
    """{name: number}, or {group: {name: number}} → each name's numbers."""
    columns: dict[str, list[float]] = {}
    for key, value in coefficients.items():
        for name, number in value.items() if isinstance(value, Mapping) else [(key, value)]:
            columns.setdefault(name, []).append(float(number))
    return columns


def search(document: Document, path: str | Path) -> None:
    """Every evaluation of a search over several coefficients, and the best so far."""
    values = [float(point["value"]) for point in document["points"]]
    with figure(path) as page:
        axes = page.add_subplot()
        tried = range(1, len(values) + 1)
        axes.plot(tried, values, "o", color=GREY, markersize=5, label="tried")
        axes.step(tried, list(accumulate(values, max)), where="post", color=BLUE, label="best so far")
        axes.set_xlabel("evaluations")
        axes.set_ylabel(f"{document['rule']['says']}, %")
        percent(axes, "y")
        axes.legend(loc="best")


def training(events: Sequence[Document], path: str | Path) -> None:
    """A finetuning's log: loss above with the learning rate's shape, held-out scores below."""
    steps = [event for event in events if event["event"] == "step"]
    scores = [event for event in events if event["event"] == "score" and event.get("top1") is not None]
    with figure(path, height=5.6 if scores else 3.6) as page:
        loss = page.add_subplot(2 if scores else 1, 1, 1)
        loss.plot(
            [s["step"] for s in steps], [s["loss"] for s in steps], color=BLUE, linewidth=1.0, label="loss"
        )
        peak = max((s["lr"] for s in steps), default=0.0)
        if peak > 0:
            top = max(s["loss"] for s in steps)
            shape = [s["lr"] / peak * top for s in steps]
            loss.plot(
                [s["step"] for s in steps], shape, ":", color=GREY, label=f"learning rate, peak {peak:g}"
            )
        loss.set_ylabel("training loss")
        loss.set_ylim(bottom=0)
        loss.legend(loc="best")
        below = loss
        if scores:
            below = page.add_subplot(2, 1, 2, sharex=loss)
            below.plot([s["step"] for s in scores], [s["top1"] for s in scores], "o-", color=ORANGE,
                       markeredgecolor=BLACK, label="held-out")  # fmt: skip
            below.set_ylabel("held-out, top-1 %")
            percent(below, "y")
        below.set_xlabel("step")
