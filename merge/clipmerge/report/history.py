"""Draw how a result came about: a soup's trials, a search's evaluations, a training's steps."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from clipmerge.report.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILION,
    figure,
    metric_title,
    percent,
)  # fmt: skip

Document = Mapping[str, Any]


def soup(document: Document, path: str | Path) -> None:
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
        for rows, key, label, style in (
            (alone, "alone", "alone", {"marker": ".", "color": GREY}),
            (accepted, "value", "accepted", {"marker": "o", "color": GREEN, "markersize": 9}),
            (refused, "value", "refused", {"marker": "x", "color": VERMILION, "markersize": 8}),
            (stopped, "at_most", "refused early, at most this",
             {"marker": "v", "color": VERMILION, "markerfacecolor": "white", "markersize": 8}),
        ):  # fmt: skip
            if rows:
                text = label if key == "alone" else f"{label} ({len(rows)})"
                x, y = [row["number"] for row in rows], [row[key] for row in rows]
                axes.plot(x, y, linestyle="none", label=text, **style)
        axes.set_title(f"Greedy {kind}: each checkpoint stays in if the held-out score does not fall")
        axes.set_xlabel("checkpoints tried")
        axes.set_ylabel(f"held-out score on {document['split']}, {metric_title(document)} %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        percent(axes, "y")
        axes.legend(loc="best")


def coefficients(document: Document, path: str | Path) -> None:
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
        axes.set_title("Learned soup: the share of each checkpoint")
        axes.set_xlabel("coefficient (they sum to 1)")
        axes.legend(loc="best")


def search(document: Document, path: str | Path) -> None:
    """Draw every evaluation of a search over several coefficients, and the best so far."""
    values = [float(point["value"]) for point in document["points"]]
    with figure(path) as page:
        axes = page.add_subplot()
        tried = range(1, len(values) + 1)
        axes.plot(tried, values, "o", color=GREY, markersize=5, label="tried")
        axes.step(tried, list(accumulate(values, max)), where="post", color=BLUE, label="best so far")
        axes.set_title("Search over several coefficients at once")
        axes.set_xlabel("evaluations of the held-out splits")
        axes.set_ylabel(f"{document['rule']['says']}, %")
        percent(axes, "y")
        axes.legend(loc="best")


def training(events: Sequence[Document], path: str | Path) -> None:
    """Draw a finetuning's log: loss above with the learning rate's shape, held-out scores below."""
    steps = [event for event in events if event["event"] == "step"]
    scores = [event for event in events if event["event"] == "score" and event.get("top1") is not None]
    number, losses = [s["step"] for s in steps], [s["loss"] for s in steps]
    with figure(path, height=5.6 if scores else 3.6) as page:
        loss = page.add_subplot(2 if scores else 1, 1, 1)
        loss.plot(number, losses, color=BLUE, linewidth=1.0, label="loss")
        peak = max((s["lr"] for s in steps), default=0.0)
        if peak > 0:
            shape = [s["lr"] / peak * max(losses) for s in steps]
            loss.plot(number, shape, ":", color=GREY, label=f"learning rate, peak {peak:g}")
        loss.set_title("Finetuning: training loss" + (" and held-out score" if scores else ""))
        loss.set_ylabel("training loss")
        loss.set_ylim(bottom=0)
        loss.legend(loc="best")
        lowest = loss
        if scores:
            lowest = page.add_subplot(2, 1, 2, sharex=loss)
            lowest.plot([s["step"] for s in scores], [s["top1"] for s in scores], "o-", color=ORANGE,
                        markeredgecolor=BLACK, label="held-out")  # fmt: skip
            lowest.set_ylabel("held-out, top-1 %")
            percent(lowest, "y")
        lowest.set_xlabel("training step")
