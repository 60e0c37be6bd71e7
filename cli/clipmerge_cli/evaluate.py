"""`clipmerge evaluate`: checkpoints × labelled images → scores with intervals."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clipmerge_cli import show
from clipmerge_cli.groups import opt
from clipmerge_cli.options import CHECKPOINTS, INPUT, Talk, named
from clipmerge_cli.scoring import Scoring

if TYPE_CHECKING:
    from clipmerge.evaluate.score import Score


def evaluate(
    *,
    checkpoints: list[str] = CHECKPOINTS,
    data: list[str] = opt(..., "Labelled images, or NAME=DATA; repeat.", INPUT, metavar="DATA"),
    scoring: Scoring,
    talk: Talk,
) -> None:
    """Score checkpoints on labelled images, with 95 % intervals.

    \b
    clipmerge evaluate ckpts/*.safetensors --model ViT-B-32 --data images/
    clipmerge evaluate soup.safetensors --data id=digits#test \\
        --data shift=digits#test@rotate:30

    A checkpoint that holds a trained head is scored by it, any other by a zero-shot head built from prompts.
    p is McNemar's: how surprising the difference to the first checkpoint would be, were both equally good.
    """
    from clipmerge.weights.weights import load_all

    sources = named(data, "--data", data)
    weights = load_all(checkpoints)
    with scoring.evaluator(sources, talk, role="test") as (evaluator, _):
        scores = [evaluator.scores(w) for w in weights]
    if not show.is_first():
        return
    names = [repr(w) for w in weights]
    if not talk.json:
        _table(names, scores, scoring.metric)
        return
    rows = [
        {
            "name": name,
            "path": path,
            "scores": {
                split: {**score.to_json(), "p": score.p_value(scores[0][split])}
                for split, score in row.items()
            },
        }
        for name, path, row in zip(names, checkpoints, scores, strict=True)
    ]
    facts = {"model": evaluator.model.name, "metric": scoring.metric, "data": sources}
    show.document({"kind": "evaluation", **facts, "checkpoints": rows})


def _table(names: Sequence[str], scores: "Sequence[Mapping[str, Score]]", metric: str) -> None:
    from clipmerge.evaluate.metrics import METRICS

    every = [score for row in scores for score in row.values()]
    others = [name for name in METRICS if name != metric and all(name in score.metrics for score in every)]
    compares = ["p"] if len(names) > 1 else []
    columns = ["checkpoint", "data", "images", METRICS[metric].title, "95 %", *compares]
    rows: list[list[Any]] = []
    for name, row in zip(names, scores, strict=True):
        for split, score in row.items():
            cells = [name, split, score.n, show.percent(score.value), show.interval(score.interval)]
            if compares:
                cells.append("" if row is scores[0] else f"{score.p_value(scores[0][split]):.2g}")
            rows.append(cells + [show.percent(score.metrics[name]) for name in others])
    show.table([*columns, *(METRICS[name].title for name in others)], rows)
