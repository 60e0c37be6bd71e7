"""WiSE-FT (arXiv 2109.01903): the line between base and finetuned model, for four ways of finetuning, "
"under shifts."""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from study import Job, Study, claim, claims_table, interval, weights

Curve = dict[float, dict[str, float]]
"""alpha → {"id", "shifts"}, in percent."""

Points = dict[str, list[dict[str, float]]]
"""What a point is → by seed: {"id", "shifts"}, in percent."""

RULES = ("best mean", "best in distribution", "within 1 point")
"""What `clipmerge interpolate --rule` calls best-mean, best-id and within:1."""


def finetuned_by(study: Study, task: str, method: str, lr: float, seed: int) -> Job:
    """Return the finetuning of the base on all training images of a task, which other chapters use too."""
    options = {**study.setting["wiseft"]["options"], "method": method, "lr": lr, "seed": seed}
    return study.finetuned(
        name_of(task, method, lr, seed), study.images("--train", task, "train", 0), options
    )


def name_of(task: str, method: str, lr: float, seed: int) -> str:
    """Return what `finetuned_by` is called."""
    return f"finetuned/{task}-{method}-{lr:g}-{seed}"


def run(study: Study) -> None:
    """Finetune by each method and seed, draw the curve on held-out and on test images, choose by the "
    "held-out one."""
    setting = study.setting["wiseft"]
    cells = [
        (t, method, seed) for t in setting["tasks"] for method in setting["methods"] for seed in study.seeds
    ]
    study.run(finetuned_by(study, task, method, setting["lr"], seed) for task, method, seed in cells)
    jobs = []
    for task, method, seed in cells:
        model = weights(name_of(task, method, setting["lr"], seed))
        for part in ("val", "test"):
            line = [
                "interpolate",
                study.base,
                model,
                "--alphas",
                setting["alphas"],
                *_eval(study, task, part),
            ]
            jobs.append((f"wiseft/{task}-{method}-{seed}-{part}", line))
    curves = [_curve(document) for document in study.run(jobs)]
    lines = zip(cells, curves[::2], curves[1::2], strict=True)
    _chapter(study, {cell: {"curve": test, "alphas": _choose(val)} for cell, val, test in lines})


def _eval(study: Study, task: str, part: str) -> list[str]:
    shifts = study.setting["wiseft"]["tasks"][task]["shifts"]
    named = study.images("--eval", task, part, alias="id")
    return named + [
        word for label, source in shifts.items() for word in study.images("--eval", source, part, alias=label)
    ]


def _curve(document: Mapping[str, Any]) -> Curve:
    curve: Curve = {}
    for point in document["history"]:
        first, *others = (100 * score["value"] for score in point["scores"].values())
        curve[point["coefficients"]["alpha"]] = {"id": first, "shifts": mean(others)}
    return curve


def _choose(held_out: Curve) -> dict[str, float]:
    """Return the alpha of each rule, by held-out images alone; equal figures take the smaller alpha."""
    best = max(point["id"] for point in held_out.values())
    figures: dict[str, Callable[[dict[str, float]], float]] = {
        "best mean": lambda point: point["id"] + point["shifts"],
        "best in distribution": lambda point: point["id"],
        "within 1 point": lambda point: float(point["id"] >= best - 1),
    }
    return {
        rule: max(held_out, key=lambda alpha: (figure(held_out[alpha]), -alpha))
        for rule, figure in figures.items()
    }


def _chapter(study: Study, lines: Mapping[tuple[str, str, int], Mapping[str, Any]]) -> None:
    setting = study.setting["wiseft"]
    tables, charts = [], []
    claims: list[list[str]] = []
    for task in setting["tasks"]:
        rows, series = [], []
        points = {
            method: _points([lines[task, method, seed] for seed in study.seeds])
            for method in setting["methods"]
        }
        for method, found in points.items():
            these = [lines[task, method, seed] for seed in study.seeds]
            for name in ("finetuned", *RULES):
                alphas = (
                    "1" if name == "finetuned" else ", ".join(f"{line['alphas'][name]:g}" for line in these)
                )
                scores = [interval([point[key] for point in found[name]]) for key in ("id", "shifts")]
                rows.append([method, name, alphas, *scores])
            series.append(_series(method, these))
        claims += _claims(task, "mean of the methods (added later)", _mean_points(list(points.values())))
        for method, found in points.items():
            claims += _claims(task, method, found)
        zero = [lines[task, setting["methods"][0], seed]["curve"][0.0] for seed in study.seeds]
        first = [
            "(none)",
            "zero-shot",
            "0",
            interval([p["id"] for p in zero]),
            interval([p["shifts"] for p in zero]),
        ]
        shifts = ", ".join(setting["tasks"][task]["shifts"].values())
        tables.append(
            {
                "caption": f"{task}, and {shifts}: accuracy on test images, %",
                "columns": ["finetuned by", "α", "α of each seed", "in distribution", "mean of the shifts"],
                "rows": [first, *rows],
                "note": f"n = {study.setting['images']['test']} test images a column, seeds "
                f"{study.seeds}; each α was chosen on {study.setting['images']['val']} held-out images "
                "(of the shifts too, where the rule looks at them).",
            }
        )
        charts.append(
            {
                "caption": f"{task}: from zero-shot (α = 0) to finetuned (α = 1), mean over seeds, test "
                "images",
                "x": f"{task}, accuracy in %",
                "y": "mean of the shifts, accuracy in %",
                "kind": "line",
                "series": series,
            }
        )
    tables.append(claims_table(claims, study.seeds))
    study.write_chapter(
        2,
        "wiseft",
        title="WiSE-FT",
        text=[
            "One finetuning by each method and seed, and eleven models on the line from the base to it. A "
            "rule chooses α on held-out images; the curve is drawn on test images. For ce and lp-ft, "
            "whose head is trained, the base gets the zero-shot head of its own text tower.",
        ],
        tables=tables,
        charts=charts,
        settings={"finetuning": f"lr {setting['lr']:g}, {setting['options']}"},
    )


def _points(lines: Sequence[Mapping[str, Any]]) -> Points:
    """Return the ends of lines, and the point of each rule, by seed."""
    points = {
        "finetuned": [line["curve"][1.0] for line in lines],
        "zero-shot": [line["curve"][0.0] for line in lines],
    }
    return points | {rule: [line["curve"][line["alphas"][rule]] for line in lines] for rule in RULES}


def _mean_points(methods: Sequence[Points]) -> Points:
    """Return the means over methods, seed by seed."""
    means: Points = {}
    for name in methods[0]:
        seeds = zip(*(points[name] for points in methods), strict=True)
        means[name] = [
            {key: mean(point[key] for point in seed) for key in ("id", "shifts")} for seed in seeds
        ]
    return means


def _claims(task: str, method: str, points: Points) -> list[list[str]]:
    def side(name: str, key: str) -> list[float]:
        return [point[key] for point in points[name]]

    chosen = "best mean"
    return [
        claim(
            f"{task}, {method}: the chosen α is better under shift than finetuned",
            side(chosen, "shifts"),
            side("finetuned", "shifts"),
        ),
        claim(f"{task}, {method}: … and than zero-shot", side(chosen, "shifts"), side("zero-shot", "shifts")),
        claim(
            f"{task}, {method}: … and costs nothing in distribution",
            side(chosen, "id"),
            side("finetuned", "id"),
        ),
    ]


def _series(method: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    points = []
    for alpha in lines[0]["curve"]:
        here = [line["curve"][alpha] for line in lines]
        marks = [rule for rule in RULES if alpha in [line["alphas"][rule] for line in lines]]
        label = f"α = {alpha:g}" + (f", chosen: {', '.join(marks)}" if marks else "")
        points.append([mean(p["id"] for p in here), mean(p["shifts"] for p in here), label])
    return {"label": method, "points": points}
