"""The greedy soup's decisions, on score tables: order, ties, early stopping, resuming."""

import json
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.merge.search.table import Recipe, point, random_bits, recipe, table_evaluator

from clipmerge.checkpoint.tensors import Checkpoint, Extent, Tensor
from clipmerge.errors import MismatchError, SelectionError
from clipmerge.search.soup import greedy_soup, uniform_soup
from clipmerge.weights.coefficient import Coefficient, number_text
from clipmerge.weights.weights import Weights, mean

NAMES = ("a", "b", "c", "d", "e")


def straight_line(names: Sequence[str], bits: Any, strict: bool) -> tuple[list[str], list[str], int]:
    """The published procedure on a table, by counting: (order of trials, ingredients, held-out count)."""

    def count(members: list[str]) -> int:
        share = number_text(Fraction(1, len(members)))
        return int(np.sum(bits(tuple(sorted((m, share) for m in members)), "val")))

    order = []
    left = list(names)
    while left:
        top = max(count([name]) for name in left)
        first = next(name for name in left if count([name]) == top)
        order.append(first)
        left.remove(first)
    chosen, best = [order[0]], count([order[0]])
    for name in order[1:]:
        new = count([*chosen, name])
        if new > best or (new == best and not strict):
            chosen.append(name)
            best = new
    return order, chosen, best


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1, 2, 3, 8, 40]),
    right=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    strict=st.booleans(),
    early=st.booleans(),
)
def test_on_random_tables_the_choice_is_the_straight_line_one(
    seed: int, size: int, right: float, strict: bool, early: bool
) -> None:
    bits = random_bits(seed, size, right)
    evaluator, _ = table_evaluator({"val": size}, bits)
    soup = greedy_soup([point(n) for n in NAMES], evaluator, strict=strict, early_stop=early)
    order, chosen, best = straight_line(NAMES, bits, strict)
    assert [step.name for step in soup.history] == order
    assert list(soup.ingredients) == chosen
    assert soup.score.correct == best
    assert recipe(soup.weights) == recipe(mean([point(n) for n in chosen]))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), strict=st.booleans(), keep=st.integers(0, 12))
def test_a_resumed_search_decides_the_same_and_pays_for_nothing_twice(
    tmp_path_factory: pytest.TempPathFactory, seed: int, strict: bool, keep: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "scores.jsonl"
    points = [point(n) for n in NAMES]
    bits = random_bits(seed, 20)
    evaluator, whole = table_evaluator({"val": 20}, bits, journal=path)
    first = greedy_soup(points, evaluator, strict=strict)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:keep]))
    evaluator, rest = table_evaluator({"val": 20}, bits, journal=path)
    second = greedy_soup(points, evaluator, strict=strict)
    assert second.ingredients == first.ingredients
    assert [(s.name, s.accepted, s.best) for s in second.history] == [
        (s.name, s.accepted, s.best) for s in first.history
    ]
    assert len(rest.asked) == max(len(whole.asked) - keep, 0)
    assert len(path.read_text().splitlines()) == len(lines)


def test_early_stopping_saves_images_and_says_how_many() -> None:
    def bits(made: Recipe, split: str) -> Any:
        alone = len(made) == 1
        return np.arange(100) < (90 if alone else 10)

    evaluator, table = table_evaluator({"val": 100}, bits)
    soup = greedy_soup([point(n) for n in NAMES], evaluator)
    assert soup.ingredients == ("a",)
    assert soup.images == {"scored": table.images, "saved": 900 - table.images}
    assert table.images < 700
    assert all(step.value is None and (step.at_most or 1) < 0.9 for step in soup.history[1:])


def test_ties_are_accepted_unless_strict_and_come_in_the_order_given() -> None:
    evaluator, _ = table_evaluator({"val": 4}, lambda made, split: np.array([True, True, False, False]))
    points = [point(n) for n in "cab"]
    assert greedy_soup(points, evaluator).ingredients == ("c", "a", "b")
    assert greedy_soup(points, evaluator, strict=True).ingredients == ("c",)


def test_given_and_random_orders_ask_for_one_score_alone() -> None:
    points = [point(n) for n in NAMES]
    evaluator, table = table_evaluator({"val": 9}, random_bits(0, 9))
    given_order = greedy_soup(points, evaluator, order=[3, 1, 0, 2, 4])
    assert [s.name for s in given_order.history] == ["d", "b", "a", "c", "e"]
    assert [s.alone is None for s in given_order.history] == [False, True, True, True, True]
    assert len(table.asked) == 5
    orders = {
        tuple(s.name for s in greedy_soup(points, evaluator, order="random", seed=seed).history)
        for seed in (0, 0, 1, 2)
    }
    assert len(orders) == 3
    assert [s.name for s in greedy_soup(points, evaluator, order="given").history] == list(NAMES)


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 2, 3, 3], "best"])
def test_an_order_that_is_no_permutation_is_refused(order: Any) -> None:
    evaluator, _ = table_evaluator({"val": 4}, random_bits(0, 4))
    with pytest.raises(SelectionError, match="does not name each of 5 checkpoints once"):
        greedy_soup([point(n) for n in NAMES], evaluator, order=order)


def test_no_checkpoints_and_no_such_split_are_refused() -> None:
    evaluator, _ = table_evaluator({"val": 4, "test": 4}, random_bits(0, 4))
    with pytest.raises(SelectionError, match="no checkpoints"):
        greedy_soup([], evaluator)
    with pytest.raises(SelectionError, match="no split 'vall'") as caught:
        greedy_soup([point("a")], evaluator, split="vall")
    assert caught.value.hint == "did you mean val?"


def test_checkpoints_that_do_not_fit_are_refused_before_a_score_is_paid_for() -> None:
    evaluator, table = table_evaluator({"val": 4}, random_bits(0, 4))
    raw = np.zeros(8, np.uint8)
    other = Checkpoint("other", {"x": Tensor("I32", (2,), (Extent(raw, 0, 8),))})
    with pytest.raises(MismatchError, match=r"'x' is \[1\] in a and \[2\] in other"):
        greedy_soup([point("a"), Weights({other: Coefficient.of(1)}, other)], evaluator)
    assert table.asked == []


def test_a_split_with_any_name_will_do_where_there_is_one() -> None:
    evaluator, _ = table_evaluator({"images": 4}, random_bits(0, 4))
    assert greedy_soup([point("a"), point("b")], evaluator).split == "images"


def test_the_result_is_a_table_and_json() -> None:
    evaluator, _ = table_evaluator({"val": 30}, random_bits(3, 30))
    soup = greedy_soup([point(n) for n in NAMES], evaluator)
    table = soup.table()
    assert len(table.rows) == 5
    assert {len(row) for row in table.rows} == {len(table.headers)}
    document = json.loads(json.dumps(soup.to_json()))
    assert document["kind"] == "greedy_soup"
    assert document["ingredients"] == list(soup.ingredients)
    assert document["score"]["correct"] == soup.score.correct
    assert [step["name"] for step in document["history"]] == document["order"]


def test_a_uniform_soup_is_the_mean_of_everything() -> None:
    soup = uniform_soup([point("a"), point("b"), point("a2")])
    assert isinstance(soup.weights, Weights)
    assert dict(recipe(soup.weights)) == {"a": "1/3", "b": "1/3", "a2": "1/3"}
    assert soup.ingredients == soup.names == ("a", "b", "a2")
    assert soup.table().rows == (("a",), ("b",), ("a2",))


DATA = os.environ.get("CLIPMERGE_TEST_DATA", "")
RESULTS = Path(DATA) / "model_soups_results" / "individual_model_results.jsonl"


@pytest.mark.skipif(not DATA or not RESULTS.exists(), reason="CLIPMERGE_TEST_DATA names no published results")
def test_with_the_authors_accuracies_the_order_of_trials_is_theirs() -> None:
    """Their code sorts ascending by ImageNet2p, stably, and reverses; scores are counts of 26,000 images."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    held_out = {row["model_name"]: round(row["ImageNet2p"] * 26000) for row in rows}
    assert len(held_out) == 72

    def bits(made: Recipe, split: str) -> Any:
        return np.arange(26000) < (held_out[made[0][0]] if len(made) == 1 else 0)

    evaluator, _ = table_evaluator({"val": 26000}, bits)
    soup = greedy_soup([point(name) for name in held_out], evaluator)
    ours = [step.name for step in soup.history]
    theirs = sorted(rows, key=lambda row: row["ImageNet2p"])[::-1]
    assert [held_out[n] for n in ours] == [held_out[row["model_name"]] for row in theirs]
    untied = [n for n in ours if list(held_out.values()).count(held_out[n]) == 1]
    assert untied == [r["model_name"] for r in theirs if r["model_name"] in untied]
    assert len(untied) > 30
