"""What commands that score on images share: their options, an evaluator, and how results show."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args

import clipmerge
from clipmerge_cli import show
from clipmerge_cli.groups import opt, refuse_unused
from clipmerge_cli.options import INPUT, PLOT, SCORING, SEARCH, Grid, Images, Several, Talk, by_data
from clipmerge_cli.writing import Output

if TYPE_CHECKING:
    from clipmerge.evaluate.journal import Journal
    from clipmerge.search.results import SoupResult, SweepResult
    from clipmerge.search.rules import Rule
    from clipmerge.types import Progress
    from clipmerge.weights.coefficient import Scalar
    from clipmerge.weights.weights import Weights

    Result: TypeAlias = SoupResult | SweepResult
Metric = Literal[
    "top1", "top5", "mean_per_class", "macro_f1", "worst_group", "ece",
    "recall@1", "recall@5", "recall@10", "text_recall@1", "text_recall@5", "text_recall@10",
    "image_recall@1", "image_recall@5", "image_recall@10",
]  # fmt: skip
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]


_METRIC = (
    f"What decides: {', '.join(get_args(Metric))}; default top1, with captions in place of classes recall@1."
)


class Search(Protocol):
    """Chooses weights by an evaluator."""

    def __call__(self, evaluator: "clipmerge.Evaluator", *, on_progress: "Progress | None") -> "Result": ...


@dataclass(frozen=True, kw_only=True)
class Scoring(Images):
    """How weights are scored."""

    head: list[str] | None = opt(
        None,
        "A classification head for the images, in place of prompts; repeat.",
        INPUT,
        metavar="[NAME=]FILE",
    )
    text_tower: str | None = opt(
        None, "Whose text tower a checkpoint without one takes; default: BASE's.", INPUT, metavar="CKPT"
    )
    holdout: str | None = opt(None, "Use only this share of the images, e.g. 2%.", INPUT, metavar="SHARE")
    metric: Metric | None = opt(None, _METRIC, SCORING, metavar="M", show_default=False)
    precision: Precision = opt("auto", "bf16 and fp16 by autocast; auto: bf16 on a GPU, else fp32.", SCORING)
    device: str = opt("auto", "cpu, cuda, cuda:1, mps; auto: the GPU where there is one.", SCORING)
    batch_size: int | None = opt(None, "Images at once; default 256, on a GPU 512.", SCORING, min=1)

    @contextmanager
    def evaluator(
        self,
        data: Mapping[str, str],
        talk: Talk,
        *,
        role: str | Mapping[str, str],
        models: "Sequence[Weights]",
        as_one: bool,
        journal: "Journal | None" = None,
    ) -> "Iterator[tuple[clipmerge.Evaluator, Progress | None]]":
        """Make an evaluator over the named data, together with torchrun's other processes where there are any.

        Says in one summary what is scored how, before anything is.

        Args:
            role: the part of each data set to use where DATA names none, the same for all or by name.
            models: what will be scored: each as it says of itself, or `as_one`, as all of them agree.
        """
        with talk.loading():
            from clipmerge import distributed
            from clipmerge.data.split import shared_images
            from clipmerge.device import describe, resolve_device, resolve_precision
            from clipmerge.evaluate import evaluator as _  # noqa: F401  (torch and open_clip)
            from clipmerge.weights.names import lacks_text

        roles = dict.fromkeys(data, role) if isinstance(role, str) else role
        parts = dict.fromkeys(data) if self.holdout else roles
        device = resolve_device(self.device)
        precision = resolve_precision(self.precision, device)
        distributed.start(device)
        heads = by_data(self.head, "--head", list(data))
        tower: Any = self.text_tower or (None if lacks_text(models[0].names) else models[0])
        try:
            with distributed.explain_lost_peer(), talk.progress() as on_progress, ExitStack() as stack:
                changes: Any = {"holdout": self.holdout, "on_progress": on_progress, "among": list(data)}
                evaluator = clipmerge.Evaluator(
                    {
                        name: self.open(name, source, parts[name], talk, **changes)
                        for name, source in data.items()
                    },
                    self.model,
                    device=device,
                    precision=precision,
                    batch_size=self.batch_size,
                    heads=heads,
                    text_tower=tower,
                    metric=self.metric,
                    journal=journal,
                    on_progress=on_progress,
                )
                if as_one:
                    stack.enter_context(evaluator.together(models))
                for remark in shared_images(evaluator.splits):
                    talk.say(remark)
                place = describe(device, precision)
                talk.say(f"scoring on {place}: {_summary(evaluator, models[:1] if as_one else models)}")
                yield evaluator, on_progress
        finally:
            distributed.finish()


def _summary(evaluator: "clipmerge.Evaluator", models: "Sequence[Weights]") -> str:
    """Say which model, images, classes and prompts score: in one line where they are the same for all models."""
    from clipmerge.weights.labels import names_of

    splits, data, how = evaluator.splits, list[str](), dict[str, list[str]]()
    for name, split in splits.items():
        source = split.source + (f", #{split.part}" if split.part and "#" not in split.source else "")
        classes, choices = len(split.classes), split.choices
        classes_text = f"{classes} classes" if choices == classes else f"{choices} of {classes} classes"
        said = f"{split.pictures} images of {source}, {classes_text if classes else f'{len(split)} captions'}"
        data.append(said if len(splits) == 1 else f"{name}: {said}")
    for label, weights in zip(names_of(models), models, strict=True):
        setups = {name: evaluator.setup(weights, name) for name in splits}
        prompts = {name: setup.says() for name, setup in setups.items()}
        one = next(iter(setups.values()))
        same = len(set(prompts.values())) == 1
        says = prompts[next(iter(prompts))] if same else "; ".join(f"{n}: {p}" for n, p in prompts.items())
        how.setdefault(f"{one.spec.name} ({one.spec_from}); {says}", []).append(label)
    if len(how) == 1:
        (text,) = how
        return "; ".join([text, *data])
    return "\n".join([*data, *(f"{', '.join(names)}: {text}" for text, names in how.items())])


@dataclass(frozen=True, kw_only=True)
class Choosing(Scoring):
    """How a search on held-out images scores, remembers and draws."""

    journal: Path | None = opt(
        None, "Where scores are remembered; default: the cache.", SEARCH, metavar="FILE"
    )
    fresh: bool = opt(False, "Ignore scores that are remembered.", SEARCH)
    plot: Path | None = PLOT


def open_journal(path: Path | None, talk: Talk, *, fresh: bool, anew: str) -> "Journal":
    """Open the file where scores are remembered, by default the cache's.

    Args:
        fresh: take none of them. anew: says how, where some are taken.
    """
    from clipmerge.checkpoint.cache import cache_dir
    from clipmerge.evaluate.journal import Journal

    remembered = path or cache_dir() / "scores.jsonl"
    resumed = f"going on from the scores remembered in {show.short(remembered)}; {anew} scores anew"
    return Journal(remembered, fresh=fresh, on_resume=lambda: talk.say(resumed))


def choose(
    name: str,
    models: "Sequence[Weights]",
    vector: "Weights",
    value: float | None,
    grid: Grid,
    data: Mapping[str, str],
    choosing: Choosing,
    out: Output,
    *,
    rule: "Rule | None" = None,
    refine: bool = False,
    search: Search | None = None,
    remark: str | None = None,
) -> None:
    """Write the model at one coefficient: at `value`, or at the one that is chosen on images.

    Args:
        name: the command, which is also what results call the family of models.
        models: the base, then the others.
        vector: what is added to the base, times the coefficient: a sum of task vectors.
        value: the coefficient; None: it is chosen.
        grid: what is tried; a dry run shows the last.
        data: split → DATA.
        search: what chooses, where that is not a sweep over the grid by `rule`.
        remark: said where `value` is written.
    """
    if value is not None:
        why = "without --eval" if name == "interpolate" else "without --scale auto"
        chosen = ("rule", "refine", "scales", "keep", "per")
        refuse_unused(why, Choosing, Several, *chosen, but=("model",))

    def at(coefficient: "Scalar") -> "Weights":
        return models[0] + coefficient * vector

    coefficient = "alpha" if name in ("interpolate", "patch") else "scale"
    if value is not None or out.dry_run:
        if value is None:
            value = grid[-1]
            remark = f"{coefficient} is chosen among {len(grid)}; the plan shows {value:g}"
        elif value == 0:
            remark = f"{coefficient} 0 changes nothing: this is the base"
        out.merge(at(value), model=choosing.model, remark=remark)
        return

    if rule is not None:
        search = partial(clipmerge.sweep, at, grid, rule=rule, refine=refine, name=name)
    assert search is not None
    run_search(search, data, models, choosing, out, coefficient)


def run_search(
    search: Search,
    data: Mapping[str, str],
    models: "Sequence[Weights]",
    choosing: Choosing,
    out: Output,
    coefficient: str | None = None,
) -> None:
    """Search on the named splits, write what was chosen, and show it.

    Args:
        coefficient: what is chosen, "alpha" or "scale"; None: ingredients are, and there is no base.
    """
    from clipmerge.weights.check import check
    from clipmerge.weights.plan import float_dtype

    out.check_usage()
    dtype = float_dtype(out.dtype) or (None if coefficient is None else "F32")  # else all inputs must agree
    check(clipmerge.mean(models), dtype=dtype)
    out.check(clipmerge.mean(models), choosing.model, dtype)
    out.say_left_alone(clipmerge.mean(models))
    journal = open_journal(choosing.journal, out, fresh=choosing.fresh, anew="--fresh")
    scoring = choosing.evaluator(data, out, role="val", models=models, as_one=True, journal=journal)
    with scoring as (evaluator, on_progress):
        result = search(evaluator, on_progress=on_progress)
        written = None
        if show.is_first() and out.output is not None:
            written = out.write(
                result.weights, _record(result, evaluator, data), on_progress, choosing.device
            )
        prompts = {name: evaluator.setup(split=name).to_json() for name in data}
    if not show.is_first():
        return
    drawn = clipmerge.plot(result, choosing.plot) if choosing.plot else []
    if out.json:
        figures = {"figures": drawn} if drawn else {}
        show.document(result.to_json() | {"prompts": prompts, "output": written} | figures)
    else:
        table = result.table()
        show.table(table.headers, table.rows, title=table.title or None)
    out.say_twins(models)
    for remark in (*(f"drew {path}" for path in drawn), *_remarks(result, coefficient)):
        out.say(remark)
    if written is None and result.kind != "greedy_ensemble":
        again = "; the scores are remembered" if result.kind != "learned_soup" else ""
        out.say(f"nothing was written: the same command with -o FILE writes the model{again}")
    out.finish(written)


def _record(result: "Result", evaluator: "clipmerge.Evaluator", data: Mapping[str, str]) -> dict[str, Any]:
    """Return what the written file records about how it was chosen; folders stay private, in `images/val` too.

    Prompts that were given are its own from now on.
    """
    from clipmerge.search.results import SoupResult

    names = [re.sub(r"[^:#@]*/(?=[^/#@])", "", text) for text in data.values()]
    facts: dict[str, Any] = {"by": result.kind, "data": ", ".join(names)}
    if isinstance(result, SoupResult) and result.transductive:
        facts["transductive"] = True
    if isinstance(result, SoupResult) and result.score:
        score = result.score
        facts |= {"metric": score.metric, "value": score.value, "n": score.n}
        facts["ingredients"] = [checkpoint.name for checkpoint in result.weights.checkpoints]
    setups = {name: evaluator.setup(split=name) for name in data}
    facts |= {"digests": {name: evaluator.data_key(name) for name in data}}
    facts |= {"prompts": {name: setup.to_json() for name, setup in setups.items()}}
    given = [s.entry(evaluator.splits[name]) for name, s in setups.items() if s.templates_from == "given"]
    inherited = [entry for entry in result.weights.prompts if not any(_same_classes(entry, g) for g in given)]
    prompts = [*inherited, *(g for i, g in enumerate(given) if g not in given[:i])]
    return {"model": evaluator.model.to_metadata(), "selection": facts} | (
        {"prompts": prompts} if given else {}
    )


def _same_classes(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return "classes" not in one or set(one["classes"]) == set(other["classes"])


def _remarks(result: "Result", coefficient: str | None) -> Iterator[str]:
    from clipmerge.evaluate.metrics import METRICS
    from clipmerge.search.results import SoupResult

    if isinstance(result, SoupResult):
        counts = f"{len(result.ingredients)} of {len(result.names)} checkpoints"
        uniform = result.kind == "uniform_soup"
        if result.kind != "adamerging":
            yield f"uniform soup (no --greedy): {counts}" if uniform else f"kept {counts}"
        elif result.transductive:
            yield "transductive: it has learned on test images, so scores on them say nothing of others"
        if score := result.score:
            right = (
                f"{score.correct} of {score.n} right"
                if score.metric == "top1"
                else f"{score.n} {'queries' if METRICS[score.metric].retrieval else 'images'}"
            )
            value, bounds = show.percent(score.value), show.interval(score.interval, 2)
            yield f"held out: {METRICS[score.metric].title} {value} (95 %: {bounds}, {right})"
        if result.images and result.images["saved"]:
            scored, saved = result.images["scored"], result.images["saved"]
            yield f"scored {scored} images; stopping early and the journal spared {saved}"
    elif len(result.coefficients) > 1:
        yield "chose " + ", ".join(f"{name} {number:g}" for name, number in result.coefficients.items())
    else:
        ends = {0.0: " (the base)", 1.0: " (the finetuned model)" if coefficient == "alpha" else ""}
        yield f"chose {coefficient} = {result.coefficient:g}{ends.get(result.coefficient, '')}"
