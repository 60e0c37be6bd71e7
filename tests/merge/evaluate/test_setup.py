"""Every checkpoint speaks for itself: model, prompts, class names and head are its own, whatever stands beside it."""

from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch

import clipmerge as cm
from clipmerge.data.open import open_split
from clipmerge.errors import ModelError, SelectionError
from clipmerge.evaluate.evaluator import Evaluator, score
from clipmerge.model import ModelSpec
from clipmerge.weights.record import write_record
from clipmerge.weights.weights import Weights, from_state_dict, mean

A, B = "a blurry {}", "the number {} on paper"
DIGITS = tuple("0123456789")
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="session")
def few(digits: Any) -> Any:
    return digits.subset(range(40))


@pytest.fixture
def recorded(weights: Any, tiny_spec: Any) -> Any:
    """Make weights that record a model and prompts: (name of a tiny checkpoint, entries, spec) → Weights."""

    def make(
        source: str, *entries: dict[str, Any], spec: ModelSpec = tiny_spec, name: str = "w", **more: Any
    ) -> Weights:
        record = {"format": 1, "total": 1, "model": spec.to_metadata(), "prompts": list(entries), **more}
        return from_state_dict(weights[source].state_dict(), name, write_record(record))

    return make


def entry(template: str, classes: Any = DIGITS, words: Any = ()) -> dict[str, Any]:
    return {"templates": [template], "classes": list(classes)} | ({"words": list(words)} if words else {})


def variants(spec: ModelSpec) -> dict[str, ModelSpec]:
    """The tiny model, and others that differ in one thing that the tensors do not show."""

    def prepared(**changes: Any) -> ModelSpec:
        return replace(spec, preprocess={**spec.preprocess, **changes})

    return {
        "plain": spec,
        "quick": replace(spec, config={**spec.config, "quick_gelu": True}),
        "mean": prepared(mean=[0.1, 0.2, 0.3]),
        "std": prepared(std=[1.0, 0.5, 0.5]),
        "interpolation": prepared(interpolation="bilinear"),
        "resize": prepared(resize_mode="longest", fill_color=9),
    }


def test_scored_together_or_alone_a_model_gets_the_same_number(recorded, tiny_spec, few):
    made = {name: recorded("base", spec=spec, name=name) for name, spec in variants(tiny_spec).items()}
    wide = few.subset(range(20))
    splits = {"few": few, "wide": replace(wide, shifts=tuple(open_split("digits#val@rotate:30").shifts))}
    alone = {
        name: {split: s.metrics for split, s in Evaluator(splits).scores(w).items()}
        for name, w in made.items()
    }
    numbers = [metrics["few"]["ece"] for name, metrics in alone.items() if name != "resize"]
    assert len(set(numbers)) == len(numbers)  # square images: there is nothing to pad
    for order in (list(made), list(reversed(made))):
        together = Evaluator(splits)
        for name in [*order, order[0]]:
            assert {split: s.metrics for split, s in together.scores(made[name]).items()} == alone[name]
    table = score([made["quick"], made["plain"]], splits)
    assert [row["few"].metrics for row in table.values()] == [alone["quick"]["few"], alone["plain"]["few"]]


def test_an_activation_that_only_the_file_tells_is_its_own_beside_a_named_model(recorded, tiny_spec, few):
    quick, plain = recorded("base", quick_gelu=True), recorded("base")
    alone = {w: Evaluator(few, tiny_spec).score(w).metrics for w in (quick, plain)}
    assert alone[quick] != alone[plain]
    for order in permutations([quick, plain]):
        together = Evaluator(few, tiny_spec)
        assert [together.score(w).metrics for w in order] == [alone[w] for w in order]


@pytest.mark.parametrize("other", ["quick", "mean", "std", "interpolation", "resize"])
def test_a_search_over_models_that_disagree_is_refused_whichever_comes_first(recorded, tiny_spec, few, other):
    models = [recorded("ft0"), recorded("ft1", spec=variants(tiny_spec)[other])]
    for a, b in permutations(models):
        with pytest.raises(cm.ClipmergeError, match=r"made (by|for|with different)"):
            cm.greedy_soup([a, b], Evaluator(few))
        with pytest.raises(cm.ClipmergeError, match=r"made (by|for|with different)"):
            cm.sweep(lambda x, a=a, b=b: a + x * (b - a), [0, 1], Evaluator(few), rule=cm.best_id("val"))
    if other not in ("quick",):  # one thing said for both decides, where the tensors mean the same
        assert cm.greedy_soup(models, Evaluator(few, tiny_spec)).score is not None


def test_a_checkpoints_own_prompts_are_used_unless_others_are_given(recorded, weights, tiny_spec, few):
    own, plain = recorded("base", entry(A)), weights["base"]
    expected = {
        text: Evaluator(few, tiny_spec, templates=text).score(plain).metrics
        for text in (A, B, *few.templates)
    }
    assert len({metrics["ece"] for metrics in expected.values()}) == 3
    evaluator = Evaluator(few, tiny_spec)
    assert evaluator.score(own).metrics == expected[A]
    assert evaluator.score(plain).metrics == expected[few.templates[0]]
    assert evaluator.score(own).metrics == expected[A]
    assert Evaluator(few, tiny_spec, templates=B).score(own).metrics == expected[B]
    chosen = open_split("digits#val", limit=120, templates=B).subset(range(40))
    assert Evaluator(chosen, tiny_spec, templates=A).score(own).metrics == expected[B]


def test_prompts_of_other_classes_are_not_these_datas(recorded, tiny_spec, few):
    evaluator = Evaluator(few, tiny_spec)
    cats = recorded("base", entry(A, ["cat", "dog"]))
    assert evaluator.setup(cats).templates == few.templates
    assert evaluator.setup(cats).templates_from == "the data's"
    both = recorded("base", entry(B, ["cat", "dog"]), entry(A))
    assert (evaluator.setup(both).templates, evaluator.setup(both).templates_from) == ((A,), "recorded")


def test_recorded_class_names_stand_for_the_datas_words(recorded, weights, tiny_spec, few):
    plain = weights["base"]
    by_name = recorded("base", entry(A, NAMES, words=DIGITS))
    named = Evaluator(replace(few, classes=NAMES), tiny_spec, templates=A).score(plain).metrics
    assert Evaluator(few, tiny_spec).score(by_name).metrics == named
    # in another order, and with classes that these data lack
    turned = recorded("base", entry(A, (*NAMES[::-1], "ten"), words=(*DIGITS[::-1], "10")))
    setup = Evaluator(few, tiny_spec).setup(turned)
    assert (setup.classes, setup.classes_from) == (NAMES, "recorded")
    assert Evaluator(few, tiny_spec).score(turned).metrics == named
    # data that number their classes, and say no more
    numbers = replace(few, words=())
    assert Evaluator(numbers, tiny_spec).setup(recorded("base", entry(A, NAMES))).classes == NAMES
    assert Evaluator(numbers, tiny_spec).setup(recorded("base", entry(A, NAMES[:9]))).classes == DIGITS
    # what the user gave stays
    given = replace(few, classes=NAMES[::-1], given=frozenset({"classes"}))
    assert Evaluator(given, tiny_spec).setup(by_name).classes == NAMES[::-1]


def test_a_search_asks_where_prompts_differ_and_takes_the_only_ones_that_are_said(
    recorded, weights, tiny_spec, few
):
    a, b, silent = recorded("ft0", entry(A)), recorded("ft1", entry(B)), weights["base"]
    for pair in permutations([a, b]):
        with pytest.raises(SelectionError, match=r"record different prompts for val: '.*' and '.*'") as error:
            cm.greedy_soup(list(pair), Evaluator(few, tiny_spec))
        assert "--templates" in str(error.value.hint)
    with pytest.raises(SelectionError, match="different prompts"):
        Evaluator(few, tiny_spec).score(mean([a, b]))
    evaluator = Evaluator(few, tiny_spec, templates=B)
    assert cm.greedy_soup([a, b], evaluator).score is not None
    # the whole curve is scored with what one end says, that end or not
    evaluator = Evaluator(few, tiny_spec)
    curve = cm.sweep(
        lambda x: silent + x * (a - silent), [0, 0.5, 1], evaluator, rule=cm.best_id("val"), splits=["val"]
    )
    expected = Evaluator(few, tiny_spec, templates=A)
    for point, w in zip(curve.history, (silent, cm.interpolate(silent, a, 0.5), a), strict=True):
        assert point.scores["val"].metrics == expected.score(w).metrics
    # and afterwards each again speaks for itself
    assert evaluator.setup(silent).templates == few.templates


def test_a_trained_head_is_read_by_its_classes(recorded, weights, tiny_spec, few):
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(10, 16, generator=generator)
    tensors = weights["base"].state_dict()

    def with_head(rows: Any, classes: Any) -> Weights:
        record = {"format": 1, "total": 1, "prompts": [entry(A, classes)]}
        tensors["classification_head.weight"] = rows
        return from_state_dict(dict(tensors), "headed", write_record(record))

    evaluator = Evaluator(few, tiny_spec)
    straight = evaluator.logits(with_head(head, DIGITS))
    turned = evaluator.logits(with_head(torch.cat([head[:1], head.flip(0)]), ("10", *DIGITS[::-1])))
    assert torch.allclose(straight, turned, atol=1e-5)
    assert torch.allclose(straight, evaluator.features(weights["base"]) @ head.T, atol=1e-5)
    with pytest.raises(
        ModelError, match="was trained on a, b, c, d … and 6 more, and digits#val has 0, 1, 2"
    ):
        evaluator.score(with_head(head, "abcdefghij"))
    with pytest.raises(ModelError, match="the head has 9 classes, digits#val has 10"):
        evaluator.score(with_head(head[:9], ()))
    nine = replace(few, class_subset=np.arange(9), classes=DIGITS[:9], words=DIGITS[:9]).subset(
        np.flatnonzero(few.labels < 9)
    )
    whole, part = with_head(head, DIGITS), with_head(head[:9], DIGITS[:9])
    evaluator = Evaluator(nine, tiny_spec)
    assert torch.allclose(evaluator.logits(whole), evaluator.logits(part), atol=1e-5)
