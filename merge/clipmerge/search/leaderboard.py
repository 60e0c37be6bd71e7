"""Merging methods on held-out images: the free number of any expression, and methods against each other."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from clipmerge.checkpoint.open import open_checkpoint
from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.errors import SelectionError
from clipmerge.evaluate.score import Score
from clipmerge.search.consensus import consensus_thresholds
from clipmerge.search.results import SweepResult, Table
from clipmerge.search.rules import Scores
from clipmerge.search.sweep import MakeWeights, steps, sweep_scale
from clipmerge.types import Progress
from clipmerge.weights.coefficient import Scalar
from clipmerge.weights.digest import content_digest
from clipmerge.weights.expression import Applied
from clipmerge.weights.methods import METHODS
from clipmerge.weights.parse import parse
from clipmerge.weights.record import FORMAT, write_record
from clipmerge.weights.statistics_files import company_of, statistics_path, statistics_record
from clipmerge.weights.weights import Source, Weights, from_state_dict, mean, open_all

if TYPE_CHECKING:
    import torch

    from clipmerge.evaluate.evaluator import Evaluator

SUM = "task_arithmetic"
LINEAR = ("mean", SUM)
"""Rows of a leaderboard that are no method of the table: the mean of the models, and the sum of their task vectors."""


def search_scale(
    family: MakeWeights,
    tasks: Mapping[str, Source],
    evaluator: "Evaluator",
    *,
    grid: Sequence[Scalar] | None = None,
    refine: bool | float = False,
    hold: "Callable[[Weights], Weights] | None" = None,
    on_progress: Progress | None = None,
) -> SweepResult:
    """Choose the free number of an expression: the best mean normalised score; equal means take the smaller number.

    A method that the number is not inside of is computed once and kept in memory.

    Args:
        family: number → model.
        tasks: split → that task's finetuned model.
        grid: as in `sweep`; by default that of the expression's first method, or 0, 0.05 … 1.
        hold: what computes methods and keeps them, where that goes on to be used.
    """
    hold = Held(evaluator.predictor.device) if hold is None else hold
    if grid is None:
        outer = (leaf for leaf in family(Fraction(1)).terms if isinstance(leaf, Applied))
        grid = steps(*next((map(Fraction, leaf.method.grid) for leaf in outer), (0, 1, Fraction(1, 20))))
    options: dict[str, Any] = {"grid": grid, "refine": refine, "name": "merge", "on_progress": on_progress}
    result = sweep_scale(lambda number: hold(family(number)), tasks, evaluator, **options)
    (number,) = result.chosen.coefficients.values()
    return replace(result, weights=family(number))


class Held:
    """Replaces the methods in an expression by what they give, each computed once, in float32.

    Args:
        device: as for `Weights.save`.
    """

    def __init__(self, device: "torch.device | None" = None) -> None:
        self._device = device
        self._known: dict[tuple[str, tuple[Checkpoint, ...]], Weights] = {}

    def __call__(self, weights: Weights) -> Weights:
        leaves = [leaf for leaf in weights.terms if isinstance(leaf, Applied)]
        terms = dict(weights.terms)
        for leaf in leaves:
            alone = Weights.of(leaf)
            key = (repr(alone), alone.sources)
            if key not in self._known:
                record = {
                    "format": FORMAT,
                    "total": alone.kind(),
                    **({"model": m} if (m := alone.model) else {}),
                }
                self._known[key] = from_state_dict(
                    alone.state_dict("F32", device=self._device), "held", write_record(record)
                )
            (held,) = self._known[key].terms
            terms[held] = terms.pop(leaf)
        return Weights(terms, weights.base) if leaves else weights


@dataclass(frozen=True)
class Entry:
    """One method of a leaderboard.

    Attributes:
        scale: the number that was chosen, None where there is none.
        weights: the merged model; None for the finetuned models, each on its own task.
        scores: task → score.
        mean, normalised: over tasks, of scores and of scores ÷ the task's own finetuned model's.
    """

    name: str
    scale: float | None
    weights: Weights | None
    scores: Mapping[str, Score]
    mean: float
    normalised: float

    def to_json(self) -> dict[str, Any]:
        """Return everything, the weights as notation, ready for `json.dumps`."""
        scores = {task: score.to_json() for task, score in self.scores.items()}
        notation = None if self.weights is None else repr(self.weights)
        facts = {name: getattr(self, name) for name in ("name", "scale", "mean", "normalised")}
        return {**facts, "notation": notation, "scores": scores}


@dataclass(frozen=True)
class Leaderboard:
    """See `leaderboard`.

    Attributes:
        entries: the base and the finetuned models, then the methods, best normalised mean first.
        reported: "test", or "val" where scales were chosen on the very images that are reported.
    """

    entries: tuple[Entry, ...]
    tasks: tuple[str, ...]
    reported: str

    def table(self) -> Table:
        """Return one row a method: its scale, each task's score, the absolute and the normalised mean, in percent."""
        rows = []
        for entry in self.entries:
            scores = [entry.scores[task].value for task in self.tasks]
            shown = [f"{100 * value:.2f}" for value in (*scores, entry.mean, entry.normalised)]
            rows.append((entry.name, "–" if entry.scale is None else f"{entry.scale:g}", *shown))
        title = "on test images, scales chosen on held-out ones"
        if self.reported == "val":
            title = "on the held-out images that the scales were chosen on: a little too high"
        return Table(("method", "scale", *self.tasks, "mean", "normalised"), tuple(rows), title)

    def to_json(self) -> dict[str, Any]:
        """Return everything, ready for `json.dumps`."""
        entries = [entry.to_json() for entry in self.entries]
        return {
            "kind": "leaderboard",
            "tasks": list(self.tasks),
            "reported": self.reported,
            "entries": entries,
        }


def leaderboard(
    base: Source,
    tuned: Mapping[str, Source],
    evaluator: "Evaluator",
    methods: Sequence[str] | None = None,
    *,
    test: Mapping[str, str] | None = None,
    grid: Sequence[Scalar] | None = None,
    on_progress: Progress | None = None,
) -> Leaderboard:
    """Run methods on the same task vectors, each with the scale that suits it, and compare their models.

    Args:
        tuned: task → its finetuned model; the task is also the split on which scales are chosen.
        methods: such as "ties" or "ties(density=0.1)"; "mean" and "task_arithmetic" too; of "consensus" alone the
            thresholds are chosen by the tasks' own splits. By default all that take so
            many models, and whose statistics, where they need some, lie beside all of these.
        test: task → the split to report on; None: report on the tasks' own splits.
        grid: the scales that every method of task vectors tries, by default its own, as in `search_scale`.

    Raises:
        SelectionError: no task, or no such method.
    """
    if not tuned:
        raise SelectionError(
            "a leaderboard needs finetuned models", hint="give each with its held-out images"
        )
    start, *others = open_all([base, *tuned.values()])
    models = dict(zip(tuned, (w if w.kind() == 1 else start + w for w in others), strict=True))
    if methods is None:
        methods = (*default_methods(len(models)), *methods_with_statistics(list(models.values())))
    families = {name: family_of(name, start, list(models.values())) for name in methods}
    splits = {task: (test or {}).get(task, task) for task in models}
    with evaluator.together([start, *models.values()]):
        own = {task: evaluator.score(weights, splits[task]) for task, weights in models.items()}

        def entry(
            name: str, weights: Weights | None, scale: float | None = None, held: Weights | None = None
        ) -> Entry:
            scores = own
            if weights is not None:
                found = evaluator.scores(weights if held is None else held, list(splits.values()))
                scores = {task: found[split] for task, split in splits.items()}
            return Entry(name, scale, weights, scores, *means(scores, own))

        entries = [entry("zero-shot", start), entry("finetuned", None)]
        ranked = []
        for name, family in families.items():
            if name == "consensus":  # there are images to choose its thresholds on
                thresholds = consensus_thresholds(start, models, evaluator, on_progress=on_progress)
                text = f"consensus(threshold={list(thresholds)})"
                family = family_of(text, start, list(models.values()))
            weights, scale, hold = family(Fraction(1)), None, Held(evaluator.predictor.device)
            if _free(name):
                result = search_scale(
                    family, models, evaluator, grid=grid, hold=hold, on_progress=on_progress
                )
                weights, scale = result.weights, result.coefficient
            ranked.append(entry(name, weights, scale, hold(weights)))
        ranked.sort(key=lambda entry: -entry.normalised)
    return Leaderboard((*entries, *ranked), tuple(models), "test" if test else "val")


def means(scores: Scores, own: Scores) -> tuple[float, float]:
    """Return the mean of scores and of scores ÷ the finetuned models' over tasks.

    Raises:
        SelectionError: a finetuned model scores 0 on its own task.
    """
    parts = [scores[task].figure for task in own]
    references = [score.figure for score in own.values()]
    if 0 in references:
        raise SelectionError(
            "a finetuned model scores 0 on its own task", hint="is the order of the data right?"
        )
    absolute = sum(parts) / len(parts)
    normalised = sum(x / r for x, r in zip(parts, references, strict=True)) / len(parts)
    return float(absolute), float(normalised)


def default_methods(tasks: int) -> tuple[str, ...]:
    """Return the rows of a leaderboard of so many models, but for methods that need statistics."""
    fitting = []
    for name, method in METHODS.items():
        least, most = method.operands
        count = tasks + (name == "model_stock")
        if least <= count and (most is None or count <= most) and method.statistics is None:
            fitting.append(name)
    return (*LINEAR, *fitting)


def methods_with_statistics(models: Sequence[Weights]) -> tuple[str, ...]:
    """Return the methods whose statistics lie beside every model, and were taken in this company where that counts."""
    lone = [model.checkpoints[0] for model in models if len(model.checkpoints) == 1]
    paths = [checkpoint.path for checkpoint in lone if checkpoint.path is not None]
    if len(paths) < len(models):
        return ()
    fitting = []
    for name, method in METHODS.items():
        files = [statistics_path(path, method.statistics) for path in paths] if method.statistics else []
        if not files or not all(file.is_file() for file in files):
            continue
        company = company_of(statistics_record(open_checkpoint(files[0])) or {})
        if company is None or company == sorted(map(content_digest, lone)):
            fitting.append(name)
    return tuple(fitting)


def family_of(text: str, base: Weights, models: Sequence[Weights]) -> Callable[[Fraction], Weights]:
    """Return number → model of a method by its name, with options where they are given: `ties(density=0.1)`.

    Methods of task vectors are added to the base times the number; those of models do not depend on it.

    Raises:
        SelectionError: it is no name of a method with options.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    name, options = match.groups() if match else (text, None)
    if name not in METHODS and name not in LINEAR:
        known = ", ".join((*LINEAR, *METHODS))
        raise SelectionError(
            f"there is no method {text!r}", hint=f"one of {known}, with options: ties(density=0.1)"
        )
    if name == "mean":
        return lambda _: mean(models)
    names = {f"m{i}": model for i, model in enumerate(models)}
    vectors = [f"{name} - base" for name in names]
    more = f", {options}" if options and options.strip() else ""
    if name == SUM:
        expression = f"base + scale*({' + '.join(f'({v})' for v in vectors)})"
    elif METHODS[name].takes == "vectors":
        expression = f"base + scale*{name}([{', '.join(vectors)}]{more})"
    else:
        expression = f"{name}([{', '.join((['base'] if name == 'model_stock' else []) + list(names))}]{more})"
    if "base" in expression:
        names["base"] = base
    return lambda number: parse(expression, names, numbers={"scale": number})


def _free(text: str) -> bool:
    """Whether a method's model depends on a number: those of task vectors do."""
    name = text.partition("(")[0].strip()
    return name == SUM or (name in METHODS and METHODS[name].takes == "vectors")
