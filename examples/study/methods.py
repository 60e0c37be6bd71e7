"""The methods of the field on the same task vectors, for 2, 4 and 8 tasks."""

from statistics import mean
from typing import Any

from arithmetic import finetune_tasks, tuned
from study import SEEDS_NOTE, Study, claim, claims_table, half_width, interval, weights


def run(study: Study) -> None:
    """Run the leaderboard for each number of tasks and each seed."""
    setting, tasks = study.setting["methods"], study.setting["tasks"]["names"]
    finetune_tasks(study, tasks)
    if "only" not in setting:
        study.run(
            (f"methods/{kind}-{task}-{seed}", _statistics(study, kind, task, seed))
            for kind in setting["statistics"]
            for seed in study.seeds
            for task in tasks
        )
    chosen = ["--scales", setting["scales"]]
    chosen += [word for name in setting.get("only", ()) for word in ("--method", name)]
    cells = [(seed, count) for seed in study.seeds for count in setting["counts"]]
    jobs = []
    for seed, count in cells:
        members = tasks[:count]
        images = [word for task in members for word in study.images("--val", task, "val", setting["val"])]
        for task in members:
            images += ["--test", f"{task}={study.source(task, 'test', setting['test'])}"]
        files = [weights(tuned(task, seed)) for task in members]
        jobs.append((f"methods/{count}-tasks-{seed}", ["leaderboard", study.base, *files, *images, *chosen]))
    jobs.sort(key=lambda job: -len(job[1]))  # the longest first: two workers end together
    documents = dict(zip((name for name, _ in jobs), study.run(jobs), strict=True))
    found: dict[int, dict[str, list[dict[str, Any]]]] = {count: {} for count in setting["counts"]}
    for seed, count in cells:
        for entry in documents[f"methods/{count}-tasks-{seed}"]["entries"]:
            found[count].setdefault(entry["name"], []).append(entry)
    _chapter(study, found)


def _statistics(study: Study, kind: str, task: str, seed: int) -> list[Any]:
    source = study.source(task, "train", study.setting["methods"]["statistics"][kind])
    images = ["--data", source, "--templates", study.template(task)]
    images += ["--towers", "image"]  # the text tower is the base's in all of them
    return ["statistics", weights(tuned(task, seed)), "--method", kind, *images, "--force"]


def _chapter(study: Study, found: dict[int, dict[str, list[dict[str, Any]]]]) -> None:
    counts, most = list(found), max(found)
    order = sorted(found[most], key=lambda name: -mean(entry["normalised"] for entry in found[most][name]))
    rows = []
    for name in order:
        scales = ", ".join(
            "–" if entry["scale"] is None else f"{entry['scale']:g}" for entry in found[most][name]
        )
        row = [name, scales]
        for count in counts:
            entries = found[count].get(name)
            row.append(interval([100 * entry["normalised"] for entry in entries]) if entries else "–")
        row.append(interval([100 * entry["mean"] for entry in found[most][name]]))
        notations = {f"seed {s}": e["notation"] for s, e in zip(study.seeds, found[most][name], strict=True)}
        rows.append({"cells": row, "details": notations} if all(notations.values()) else row)

    def side(name: str, count: int = most) -> list[float]:
        return [100 * entry["normalised"] for entry in found[count][name]]

    pairs = [
        ("TIES is better than task arithmetic", "ties", "task_arithmetic"),
        ("DARE is at least as good as task arithmetic", "dare", "task_arithmetic"),
        ("Breadcrumbs is better than task arithmetic", "breadcrumbs", "task_arithmetic"),
        ("Consensus TA is better than TIES", "consensus", "ties"),
        ("TSV-M is better than TIES", "tsv", "ties"),
        ("Iso-C is better than TSV-M", "iso_c", "tsv"),
        ("Iso-CTS is better than Iso-C", "iso_cts", "iso_c"),
        ("task arithmetic with a chosen scale is better than the mean", "task_arithmetic", "mean"),
        ("(added later) Fisher merging is better than the mean", "fisher", "mean"),
        ("(added later) RegMean is better than the mean", "regmean", "mean"),
    ]
    claims = [
        claim(f"{text} ({most} tasks)", side(left), side(right))
        for text, left, right in pairs
        if left in found[most] and right in found[most]
    ]
    series = [
        {
            "label": name,
            "points": [
                [count, mean(side(name, count)), _reach(side(name, count))]
                for count in counts
                if name in found[count]
            ],
        }
        for name in order
        if name
        in ("finetuned", "tsv", "iso_c", "ties", "task_arithmetic", "mean", "zero-shot", "fisher", "lines")
    ]
    setting = study.setting["methods"]
    study.write_chapter(
        4,
        "methods",
        title="Methods",
        text=[
            "Every method that `clipmerge methods` lists, on the same finetunings, each added to the base "
            "with the scale that is best on held-out images (the mean of normalised scores). Options are "
            "the defaults, which are those of the papers; Consensus TA chooses its thresholds on held-out images, "
            "too. Fisher merging and RegMean go by statistics of "
            f"training images ({_counts(setting['statistics'])}) and have no scale; they were run after the other "
            "rows had been seen, with their defaults.",
        ],
        tables=[
            {
                "caption": "Mean accuracy on test images over tasks, %: normalised by the task's own "
                "model, and absolute",
                "columns": [
                    "method",
                    f"scales ({most} tasks)",
                    *(f"{c} tasks, normalised" for c in counts),
                    f"{most} tasks, absolute",
                ],
                "rows": rows,
                "note": f"n = {setting['test']} test images a task; scales by {setting['val']} held-out "
                "images a task. " + SEEDS_NOTE.format(n=len(study.seeds)),
            },
            claims_table(claims, study.seeds),
        ],
        charts=[
            {
                "caption": "Normalised mean accuracy against the number of tasks",
                "x": "tasks",
                "y": "normalised mean accuracy in %",
                "kind": "line",
                "series": series,
            }
        ],
        settings={"tasks": ", ".join(study.setting["tasks"]["names"])},
    )


def _counts(statistics: dict[str, int]) -> str:
    return " and ".join(f"{kind}: {count} a task" for kind, count in statistics.items()) or "none were taken"


def _reach(values: list[float]) -> str:
    return f"± {half_width(values):.1f}" if len(values) > 1 else "one seed"
