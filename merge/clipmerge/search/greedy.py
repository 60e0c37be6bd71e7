"""Choose checkpoints greedily: each in turn stays if the score of those chosen with it does not fall.

Source: Wortsman et al. 2022, arXiv 2203.05482 (Recipe 1).
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from clipmerge.errors import SelectionError
from clipmerge.evaluate.score import Score, Stopped, is_better
from clipmerge.evaluate.sources import Source, open_all
from clipmerge.search.results import Step
from clipmerge.types import Progress
from clipmerge.weights.check import check
from clipmerge.weights.weights import Weights, mean

Order = Literal["score", "given", "random"] | Sequence[int]
ScoreAlone = Callable[[int], Score]
ScoreWith = Callable[[Sequence[int], int, Score], Score | Stopped]
"""(members, candidate, the members' score) → the score of all of them together."""


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


def choose(
    names: Sequence[str],
    score_alone: ScoreAlone,
    score_with: ScoreWith,
    *,
    order: Order,
    seed: int,
    strict: bool,
    on_progress: Progress | None,
) -> tuple[list[int], list[Step], Score]:
    """Give every candidate its turn: the indices chosen, the steps, and the score of those chosen.

    Args:
        order: "score" (best alone first, ties in the order given), "given", "random" (by `seed`), or indices.
        strict: keep a candidate only where the score rises.
    """
    turns, alone = _turns(len(names), score_alone, order, seed, on_progress)
    chosen, best = [turns[0]], alone[turns[0]]
    first, n = turns[0], len(turns)
    steps = [Step(1, names[first], best.value, best, True, 0, 1, best.value, None)]
    for number, turn in enumerate(turns[1:], 2):
        if on_progress:
            on_progress("trying", number - 1, n)
        outcome = score_with(chosen, turn, best)
        accepted = isinstance(outcome, Score) and is_better(outcome, best, strict=strict)
        p = best.p_value(outcome) if isinstance(outcome, Score) else None
        if accepted and isinstance(outcome, Score):
            chosen, best = [*chosen, turn], outcome
        own = alone[turn].value if turn in alone else None
        scored = outcome.images_scored
        steps.append(Step(number, names[turn], own, outcome, accepted, scored, len(chosen), best.value, p))
    if on_progress:
        on_progress("trying", n, n)
    return chosen, steps, best


def _turns(
    count: int, score_alone: ScoreAlone, order: Order, seed: int, on_progress: Progress | None
) -> tuple[list[int], Mapping[int, Score]]:
    """Find the order of turns, and the scores alone that it took to find it."""
    if order != "score":
        turns = _permutation(order, count, seed)
        return turns, {turns[0]: score_alone(turns[0])}
    scores = {}
    for index in range(count):
        if on_progress:
            on_progress("ranking", index, count)
        scores[index] = score_alone(index)
    if on_progress:
        on_progress("ranking", count, count)
    return sorted(range(count), key=lambda index: -scores[index].figure), scores


def _permutation(order: Order, count: int, seed: int) -> list[int]:
    if order == "given":
        return list(range(count))
    if order == "random":
        turns = list(range(count))
        random.Random(seed).shuffle(turns)
        return turns
    if isinstance(order, str) or sorted(order) != list(range(count)):
        raise SelectionError(
            f"the order {order!r} does not name each of {count} checkpoints once",
            hint='use "score", "given", "random", or a permutation of 0, 1, 2 …',
        )
    return list(order)
