"""`clipmerge evaluate`: checkpoints × labelled images → scores with intervals."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipmerge_cli import show
from clipmerge_cli.options import (
    BatchSize,
    Checkpoints,
    Classnames,
    Device,
    Json,
    Limit,
    Metric,
    Model,
    Precision,
    Quiet,
    SkipBad,
    Templates,
    named,
)
from clipmerge_cli.scoring import Holdout, is_first, say_left_out, searching

if TYPE_CHECKING:
    from clipmerge.evaluate.score import Score

Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        metavar="DATA",
        help="Labelled images, or NAME=DATA; may be given several times.",
        rich_help_panel="Model and images",
        show_default=False,
    ),
]


def evaluate(
    checkpoints: Checkpoints,
    data: Data,
    model: Model = None,
    templates: Templates = None,
    classnames: Classnames = None,
    holdout: Holdout = None,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    metric: Metric = "top1",
    device: Device = "cpu",
    precision: Precision = "fp32",
    batch_size: BatchSize = 256,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score checkpoints on labelled images, with 95 % intervals.

    \b
    clipmerge evaluate ckpts/*.safetensors --model ViT-B-32 --data images/
    clipmerge evaluate soup.safetensors --data id=digits#test \\
        --data shift=digits#test@rotate:30

    A checkpoint that holds a trained head is scored by it, any other by a zero-shot head built from prompts.
    p is McNemar's: how surprising the difference to the first checkpoint would be, were both equally good.
    """
    from clipmerge.data.open import open_split
    from clipmerge.evaluate.evaluator import Evaluator
    from clipmerge.weights.weights import load_all

    texts = sources(data)
    weights = load_all(checkpoints)
    with searching(device, quiet=quiet or json) as on_progress:
        splits = {
            name: open_split(
                text,
                classnames=classnames,
                role=None if holdout else "test",
                holdout=holdout,
                limit=limit,
                skip_bad=skip_bad,
                on_progress=on_progress,
            )
            for name, text in texts.items()
        }
        say_left_out(splits, quiet=quiet)
        evaluator = Evaluator(
            model,
            splits,
            device=device,
            precision=precision,
            batch_size=batch_size,
            templates=templates,
            metric=metric,
            on_progress=on_progress,
        )
        scores = [evaluator.scores(w) for w in weights]
    if is_first():
        names = [repr(w) for w in weights]
        if json:
            show.document(_document(names, checkpoints, scores, texts, evaluator.model.name, metric))
        else:
            _table(names, scores, metric)


def sources(data: Sequence[str]) -> dict[str, str]:
    """`["id=digits#val", "images/"]` → `{"id": "digits#val", "images/": "images/"}`."""
    found: dict[str, str] = {}
    for value in data:
        head, equals, _ = value.partition("=")
        pair = named([value], "--data") if equals and head.isidentifier() else {value: value}
        if pair.keys() & found.keys():
            raise typer.BadParameter(f"{next(iter(pair))!r} is given twice", param_hint="--data")
        found |= pair
    return found


def _table(names: Sequence[str], scores: Sequence[Mapping[str, "Score"]], metric: str) -> None:
    from clipmerge.evaluate.metrics import METRICS

    others = [
        m for m in METRICS if m != metric and all(m in s.metrics for row in scores for s in row.values())
    ]
    columns = ["checkpoint", "data", "images", METRICS[metric].title, "95 %"]
    columns += ["p"] if len(names) > 1 else []
    columns += [METRICS[m].title for m in others]
    rows = []
    for name, row in zip(names, scores, strict=True):
        for split, score in row.items():
            low, high = score.interval
            cells = [name, split, str(score.n), _percent(score.value), f"{100 * low:.1f}–{100 * high:.1f}"]
            if len(names) > 1:
                cells.append("" if row is scores[0] else f"{score.p_value(scores[0][split]):.2g}")
            rows.append(cells + [_percent(score.metrics[m]) for m in others])
    show.table(columns, rows)


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _document(
    names: Sequence[str],
    paths: Sequence[str],
    scores: Sequence[Mapping[str, "Score"]],
    texts: Mapping[str, str],
    model: str,
    metric: str,
) -> dict[str, Any]:
    rows = [
        {
            "name": name,
            "path": path,
            "scores": {
                split: {**score.to_dict(), "p": score.p_value(scores[0][split])}
                for split, score in row.items()
            },
        }
        for name, path, row in zip(names, paths, scores, strict=True)
    ]
    return {"kind": "evaluation", "model": model, "metric": metric, "data": dict(texts), "checkpoints": rows}
