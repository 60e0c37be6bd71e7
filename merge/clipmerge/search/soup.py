"""Soups: the uniform mean, and the greedy choice of what goes into it.

Source: Wortsman et al. 2022, arXiv 2203.05482 (Recipe 1).
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from clipmerge.errors import SelectionError
from clipmerge.evaluate.score import Score, Stopped, is_better
from clipmerge.search.results import SoupResult, Step, count_images
from clipmerge.types import Progress
from clipmerge.weights.check import check
from clipmerge.weights.labels import names_of
from clipmerge.weights.weights import Source, Weights, mean, open_all

if TYPE_CHECKING:
    from clipmerge.evaluate.evaluator import Evaluator

Order = Literal["score", "given", "random"] | Sequence[int]
ScoreAlone = Callable[[Weights], Score]
ScoreWith = Callable[[Sequence[Weights], Weights, Score], Score | Stopped]
"""(members, candidate, the members' score) → the score of all of them together."""


def uniform_soup(
    checkpoints: Sequence[Source], evaluator: "Evaluator | None" = None, *, split: str | None = None
) -> SoupResult:
    """Average all checkpoints; the mean is scored where there is an evaluator.

    Raises:
        SelectionError: there are none.
        MismatchError: they do not fit together.
    """
    weights = open_candidates(checkpoints)
    names, soup, score = tuple(names_of(weights)), mean(weights), None
    if evaluator is not None:
        split = evaluator.split_name(split)
        score = evaluator.score(soup, split)
    return SoupResult("uniform_soup", soup, names, names, score=score, split=split)


def greedy_soup(
    checkpoints: Sequence[Source],
    evaluator: "Evaluator",
    *,
    split: str | None = None,
    strict: bool = False,
    order: Order = "score",
    seed: int = 0,
    early_stop: bool = True,
    on_progress: Progress | None = None,
) -> SoupResult:
    """Choose a soup's ingredients: each candidate in turn stays if the mean's held-out score does not fall.

    Args:
        split: the evaluator's split that decides; by default the only one, or "val".
        strict: keep a candidate only where the score rises.
        order: "score" (best alone first, ties in the order given), "given", "random" (by `seed`), or indices.
        early_stop: end a trial as soon as it cannot win; the choice is the same without.

    Raises:
        SelectionError: no checkpoints, an order that is no permutation, no such split.
    """
    weights, name = open_candidates(checkpoints), evaluator.split_name(split)
    images = count_images(evaluator)

    def score_with(members: Sequence[Weights], candidate: Weights, incumbent: Score) -> Score | Stopped:
        return evaluator.score_with(
            members, candidate, name, incumbent=incumbent, strict=strict, early_stop=early_stop
        )

    with evaluator.together(weights):
        evaluator.expect(weights)
        turns, alone = rank(weights, lambda each: evaluator.score(each, name), order, seed, on_progress)
        evaluator.expect([weights[turn] for turn in turns])
        members, steps, best = choose(weights, turns, alone, score_with, strict, on_progress)
    return SoupResult(
        "greedy_soup",
        mean(members),
        tuple(step.name for step in steps if step.accepted),
        tuple(names_of(weights)),
        history=tuple(steps),
        score=best,
        split=name,
        strict=strict,
        images=images(),
    )


def open_candidates(checkpoints: Sequence[Source]) -> list[Weights]:
    """Open what is a path, and refuse candidates that do not fit together, from their headers.

    Raises:
        SelectionError: there are none.
        MismatchError: names or shapes differ.
    """
    if not checkpoints:
        raise SelectionError("there are no checkpoints to choose from", hint="give at least one")
    weights = open_all(checkpoints)
    check(mean(weights), dtype="F32")  # whether float dtypes agree matters to a file only
    return weights


def rank(
    weights: Sequence[Weights],
    score_alone: ScoreAlone,
    order: Order,
    seed: int,
    on_progress: Progress | None,
) -> tuple[list[int], Mapping[int, Score]]:
    """Find the order of turns, and the scores alone that it took to find it."""
    n = len(weights)
    if order != "score":
        turns = _permutation(order, n, seed)
        return turns, {turns[0]: score_alone(weights[turns[0]])}
    scores = {}
    for index, candidate in enumerate(weights):
        if on_progress:
            on_progress("ranking", index, n)
        scores[index] = score_alone(candidate)
    if on_progress:
        on_progress("ranking", n, n)
    return sorted(range(n), key=lambda index: -scores[index].figure), scores


def choose(
    weights: Sequence[Weights],
    turns: Sequence[int],
    alone: Mapping[int, Score],
    score_with: ScoreWith,
    strict: bool,
    on_progress: Progress | None,
) -> tuple[list[Weights], list[Step], Score]:
    """Give every candidate its turn; the first is always in. Returns the members, the steps and their score."""
    names, members, best = names_of(weights), [weights[turns[0]]], alone[turns[0]]
    steps = [Step(1, names[turns[0]], best.value, best, True, 0, 1, best.value, None)]
    for number, turn in enumerate(turns[1:], 2):
        if on_progress:
            on_progress("trying", number - 1, len(turns))
        candidate, by_itself = weights[turn], alone[turn].value if turn in alone else None
        outcome, p, accepted = score_with(members, candidate, best), None, False
        scored = outcome.images_scored
        if isinstance(outcome, Score):
            p, accepted = best.p_value(outcome), is_better(outcome, best, strict=strict)
            if accepted:
                members, best = [*members, candidate], outcome
        size = len(members)
        steps.append(Step(number, names[turn], by_itself, outcome, accepted, scored, size, best.value, p))
    if on_progress:
        on_progress("trying", len(turns), len(turns))
    return members, steps, best


def _permutation(order: Order, count: int, seed: int) -> list[int]:
    turns = list(range(count))
    if order == "random":
        random.Random(seed).shuffle(turns)
    elif order != "given":
        if isinstance(order, str) or sorted(order) != turns:
            raise SelectionError(
                f"the order {order!r} does not name each of {count} checkpoints once",
                hint='use "score", "given", "random", or a permutation of 0, 1, 2 …',
            )
        turns = list(order)
    return turns
