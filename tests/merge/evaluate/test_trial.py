"""Trials: the mean with one more, and the full pass's decision without the full pass."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmerge.errors import MismatchError, SelectionError
from clipmerge.evaluate.evaluator import Evaluator
from clipmerge.evaluate.metrics import METRICS, Predictions
from clipmerge.evaluate.score import score_of
from clipmerge.evaluate.trial import Hardness, better_than
from clipmerge.weights.weights import from_state_dict, load, mean


def resident_state(evaluator):
    return {k: v.clone() for k, v in evaluator.resident.module.state_dict().items()}


def test_a_proposal_is_the_mean_with_one_more(evaluator, weights):
    trial = evaluator.trial()
    trial.begin(weights["ft0"])
    trial.propose(weights["ft1"], 1 / 2, early_stop=False)
    trial.accept()
    outcome = trial.propose(weights["ft2"], 1 / 3, early_stop=False)
    exact = mean([weights["ft0"], weights["ft1"], weights["ft2"]])
    expected = exact.state_dict()
    for name, tensor in resident_state(evaluator).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
    assert outcome.score.correct == evaluator.score(exact).correct


def test_a_refused_proposal_leaves_the_mean(evaluator, weights):
    trial = evaluator.trial()
    trial.begin(weights["ft0"])
    trial.propose(weights["ft1"], 0.5)
    trial.propose(weights["ft0"], 0.5, early_stop=False)
    for name, tensor in weights["ft0"].state_dict().items():
        assert torch.equal(resident_state(evaluator)[name], tensor)


def test_candidates_in_other_dtypes_and_as_expressions(evaluator, weights):
    trial = evaluator.trial()
    trial.begin(weights["ft0"])
    tensors = weights["ft1"].state_dict()
    for dtype, close in ((torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        trial.propose(from_state_dict({k: v.to(dtype) for k, v in tensors.items()}), 1.0, early_stop=False)
        for name, tensor in resident_state(evaluator).items():
            torch.testing.assert_close(tensor, tensors[name], rtol=close, atol=close)
    trial.propose(mean([weights["ft1"], weights["ft2"]]), 1.0, early_stop=False)
    expected = mean([weights["ft1"], weights["ft2"]]).state_dict()
    for name, tensor in resident_state(evaluator).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("metric", ["top1", "top5", "mean_per_class", "macro_f1", "ece"])
@pytest.mark.parametrize("strict", [False, True])
def test_stopping_early_decides_as_the_full_pass(tiny_spec, digits, weights, metric, strict):
    outcomes = []
    for early in (False, True):
        evaluator = Evaluator(tiny_spec, digits, metric=metric)
        trial = evaluator.trial(strict=strict)
        trial.begin(weights["ft0"])
        tried = [trial.propose(weights[f"ft{i}"], 0.5, early_stop=early) for i in range(5)]
        outcomes.append([o.accepted for o in tried])
        for o in tried:
            assert o.images_scored + o.images_saved == len(digits)
            assert (o.score is None) == (o.images_saved > 0)
            assert o.score is None or o.bound == pytest.approx(o.score.value)
        saved = sum(o.images_saved for o in tried)
        assert saved == evaluator.images_saved
        assert (saved == 0) or (early and metric != "ece")
    assert outcomes[0] == outcomes[1]


def test_a_hopeless_trial_ends_with_its_first_images(tiny_spec, digits, weights):
    """Labels are what the incumbent says, so that one mistake is one too many."""
    from dataclasses import replace

    own = replace(digits, labels=Evaluator(tiny_spec, digits).score(weights["ft0"]).predictions)
    evaluator = Evaluator(tiny_spec, own)
    trial = evaluator.trial()
    assert trial.begin(weights["ft0"]).correct == 120
    first = trial.propose(weights["ft1"], 0.5)
    assert not first.accepted
    assert first.score is None
    assert first.images_saved >= 120 - 32
    assert not torch.is_inference_mode_enabled()
    assert trial.propose(weights["ft1"], 0.5).images_scored == 32, "images that were wrong before come first"


predicted = st.integers(20, 60).flatmap(
    lambda n: st.tuples(*(st.lists(st.integers(0, 3), min_size=n, max_size=n) for _ in range(4)))
)


@settings(deadline=None, max_examples=80)
@given(
    predicted,
    st.sampled_from(["top1", "mean_per_class", "macro_f1", "worst_group"]),
    st.booleans(),
    st.integers(1, 9),
)
def test_the_bound_is_certain_on_any_table_of_predictions(table, metric, strict, step):
    """Whatever the labels, the incumbent and the order: a stopped pass and the full one decide alike."""
    labels, groups, old, new = (np.array(column) for column in table)
    n = len(labels)

    def said(values: np.ndarray) -> Predictions:
        return Predictions(labels, values, values == labels, np.ones(n), groups)

    wins = better_than(score_of(said(old), metric), strict)
    hard = Hardness(n)
    hard.learn(old == labels, np.ones(n, bool))
    partial, stopped = labels.copy(), False
    order = hard.order()
    for start in range(0, n, step):
        chunk = order[start : start + step]
        partial[chunk] = new[chunk]
        if not wins(said(partial)):
            stopped = True
            break
    assert wins(said(new)) is not stopped


def test_images_often_wrong_come_first():
    hard = Hardness(4)
    hard.learn(np.array([True, False, True, False]), np.ones(4, bool))
    hard.learn(np.array([True, False, False, True]), np.array([True, True, True, False]))
    assert hard.order().tolist() == [1, 3, 2, 0]


def test_a_metric_never_falls_when_an_image_becomes_right():
    draw = np.random.default_rng(0)
    for metric in METRICS.values():
        if not metric.higher_is_better:
            continue
        labels, values = draw.integers(0, 5, 40), draw.integers(0, 5, 40)
        groups = draw.integers(0, 3, 40)
        before = -1.0
        for i in range(40):
            values[i] = labels[i]
            now = metric.compute(Predictions(labels, values.copy(), values == labels, np.ones(40), groups))
            assert now >= before
            before = now


def test_a_trained_head_is_part_of_the_mean(evaluator, weights):
    draw = torch.Generator().manual_seed(1)
    heads = [{"classification_head.weight": torch.randn(10, 16, generator=draw)} for _ in range(2)]
    both = [from_state_dict({**weights[f"ft{i}"].state_dict(), **heads[i]}, f"m{i}") for i in range(2)]
    trial = evaluator.trial()
    trial.begin(both[0])
    outcome = trial.propose(both[1], 0.5, early_stop=False)
    name = "classification_head.weight"
    expected = (heads[0][name] + heads[1][name]) / 2
    torch.testing.assert_close(resident_state(evaluator)[name], expected)
    assert outcome.score.correct == evaluator.score(mean(both)).correct


def test_counters_of_a_resnet_are_not_averaged(tiny_model_config, digits):
    from clipmerge.model import ModelSpec, build_model

    tower = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    config = {**tiny_model_config, "vision_cfg": tower}
    spec = ModelSpec("resnet", config, {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3})
    states = [dict(build_model(spec, seed=i).state_dict()) for i in range(2)]
    for i, state in enumerate(states):
        state["visual.bn1.num_batches_tracked"] = torch.tensor(10 + i)
        state["visual.bn1.running_mean"] = torch.full((4,), float(i))
    weights = [from_state_dict(state, f"m{i}") for i, state in enumerate(states)]
    evaluator = Evaluator(spec, digits)
    trial = evaluator.trial()
    trial.begin(weights[0])
    trial.propose(weights[1], 0.5)
    after = resident_state(evaluator)
    assert after["visual.bn1.num_batches_tracked"] == 10
    assert after["visual.bn1.running_mean"].tolist() == [0.5] * 4


def test_mistakes_are_told(evaluator, weights, tiny_checkpoints):
    trial = evaluator.trial()
    with pytest.raises(SelectionError, match="there is no mean yet"):
        trial.propose(weights["ft0"], 0.5)
    trial.begin(weights["ft0"])
    with pytest.raises(SelectionError, match="no proposal to accept"):
        trial.accept()
    tensors = weights["ft1"].state_dict()
    del tensors["ln_final.bias"]
    with pytest.raises(MismatchError, match=r"1 names differ, first 'ln_final.bias'"):
        trial.propose(from_state_dict(tensors), 0.5)
    wide = {**weights["ft1"].state_dict(), "ln_final.bias": torch.zeros(9)}
    with pytest.raises(MismatchError, match=r"'ln_final.bias' is \[9\]"):
        trial.propose(from_state_dict(wide), 0.5)
    assert load(tiny_checkpoints["ft0"]).names == weights["ft0"].names
