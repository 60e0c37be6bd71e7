"""Write the scores of many checkpoints on many data sets: as CSV with CLIP_benchmark's columns, Markdown or JSON."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipmerge.checkpoint.output import check_target, whole_file
from clipmerge.errors import OutputError
from clipmerge.report.documents import markdown, write_json

__all__ = ["check_scores_file", "mean_scores", "save_scores", "scores_by_data"]

_METRICS = {
    "acc1": "top1",
    "acc5": "top5",
    "mean_per_class_recall": "mean_per_class",
    "image_retrieval_recall@5": "image_recall@5",
    "text_retrieval_recall@5": "text_recall@5",
}
"""CLIP_benchmark's word → ours."""

_TASKS = {"zero-shot": "zeroshot_classification", "captions": "zeroshot_retrieval"}
"""Kind of head → CLIP_benchmark's word for the task; any other head was trained."""


def check_scores_file(path: Path, *, force: bool) -> None:
    """Refuse a file of scores that `save_scores` could not write, before anything is scored."""
    if path.suffix not in (".csv", ".md", ".json"):
        raise OutputError(
            f"{path} is no kind of table that is written", hint="use a name in .csv, .md or .json"
        )
    check_target(path, force=force)


def save_scores(document: Mapping[str, Any], path: Path, *, force: bool = False) -> Path:
    """Write what `clipmerge evaluate --json` prints to a file of the kind that its suffix says.

    A CSV has a row for each checkpoint and data set, with the columns of CLIP_benchmark's `benchmark.csv` first:
    `dataset` is the name of the images, `model` open_clip's name, `pretrained` the checkpoint's path.

    Raises:
        OutputError: the suffix is none of .csv, .md, .json; or the file exists, or cannot be written.
    """
    check_scores_file(path, force=force)
    if path.suffix == ".json":
        return write_json(document, path)
    with whole_file(path, force=force) as sibling:
        if path.suffix == ".md":
            sibling.write_text(markdown(*scores_by_data(document)), encoding="utf-8")
            return path
        rows = [
            _row(entry, name, score)
            for entry in document["checkpoints"]
            for name, score in entry["scores"].items()
        ]
        with sibling.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def scores_by_data(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Lay scores out as a leaderboard: a row for each checkpoint, the best mean first; a column for each data set."""
    names, metric = list(document["data"]), document["metric"]
    entries = sorted(document["checkpoints"], key=lambda entry: -entry["mean"].get(metric, 0))
    rows = [
        [entry["name"], *(f"{100 * entry['scores'][name]['value']:.2f}" for name in names)]
        + ([f"{100 * entry['mean'][metric]:.2f}" if metric in entry["mean"] else "–"] * (len(names) > 1))
        for entry in entries
    ]
    return ["checkpoint", *names, *(["mean"] * (len(names) > 1))], rows


def mean_scores(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Average each metric that all data sets have, every data set counting the same: data set → metrics."""
    first, *others = scores.values()
    shared = [metric for metric in first if all(metric in other for other in others)]
    return {metric: sum(row[metric] for row in scores.values()) / len(scores) for metric in shared}


def _row(entry: Mapping[str, Any], name: str, score: Mapping[str, Any]) -> dict[str, Any]:
    measured = {theirs: score["metrics"].get(ours) for theirs, ours in _METRICS.items()}
    task = _TASKS.get(entry["prompts"][name]["head"], "classification")
    facts = {"dataset": name, "model": entry["model"], "pretrained": entry["path"], "task": task}
    ours = {"name": entry["name"], "metric": score["metric"], "value": score["value"], "n": score["n"]}
    ends = dict(zip(("low", "high"), score["interval"], strict=True))
    return {**measured, **facts, "model_fullname": f"{entry['model']} {entry['path']}", **ours, **ends}
