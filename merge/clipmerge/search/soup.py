"""Soups: the uniform mean, and the greedy choice of what goes into it.

Source: Wortsman et al. 2022, arXiv 2203.05482.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from clipmerge.evaluate.score import Score, Stopped
from clipmerge.evaluate.sources import Source
from clipmerge.search.greedy import Order, choose, open_candidates
from clipmerge.search.results import SoupResult, count_images
from clipmerge.types import Progress
from clipmerge.weights.weights import mean

if TYPE_CHECKING:
    from clipmerge.evaluate.evaluator import Evaluator


def uniform_soup(
    checkpoints: Sequence[Source], evaluator: "Evaluator | None" = None, *, split: str | None = None
) -> SoupResult:
    """Average all checkpoints; the mean is scored where there is an evaluator.

    Raises:
        SelectionError: there are none.
        MismatchError: they do not fit together.
    """
    weights = open_candidates(checkpoints)
    names, soup = tuple(map(repr, weights)), mean(weights)
    score = None
    if evaluator is not None:
        split = evaluator.split_name(split)
        score = evaluator.score(soup, split)
    return SoupResult(
        kind="uniform_soup", soup=soup, ingredients=names, names=names, score=score, split=split
    )


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
    weights = open_candidates(checkpoints)
    name = evaluator.split_name(split)
    images = count_images(evaluator)

    def score_with(members: Sequence[int], candidate: int, incumbent: Score) -> Score | Stopped:
        soup = [weights[i] for i in members]
        return evaluator.score_with(
            soup, weights[candidate], name, incumbent=incumbent, strict=strict, early_stop=early_stop
        )

    names = tuple(map(repr, weights))
    chosen, steps, best = choose(
        names,
        lambda index: evaluator.score(weights[index], name),
        score_with,
        order=order,
        seed=seed,
        strict=strict,
        on_progress=on_progress,
    )
    return SoupResult(
        kind="greedy_soup",
        soup=mean([weights[i] for i in chosen]),
        ingredients=tuple(names[i] for i in chosen),
        names=names,
        history=tuple(steps),
        score=best,
        split=name,
        strict=strict,
        images=images(),
    )
