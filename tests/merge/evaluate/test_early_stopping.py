"""One more in the mean, and the full pass's decision without the full pass."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.merge.search.table import point, table_evaluator

from clipmerge.errors import MismatchError
from clipmerge.evaluate.evaluator import Evaluator
from clipmerge.evaluate.metrics import METRICS, Predictions
from clipmerge.evaluate.score import Stopped, is_better, score_of
from clipmerge.weights.weights import from_state_dict, mean


def resident_state(evaluator):
    return {k: v.clone() for k, v in evaluator.predictor.resident.module.state_dict().items()}


def hold(evaluator, weights):
    """What `score_with` does before the lerp."""
    evaluator.load(weights)
    evaluator.predictor.resident.hold()
    return evaluator.predictor.resident


def test_a_candidate_is_scored_as_the_mean_with_one_more(evaluator, weights, tiny_spec, digits):
    first = [weights["ft0"], weights["ft1"]]
    incumbent = evaluator.score(mean(first))
    result = evaluator.score_with(first, weights["ft2"], incumbent=incumbent, early_stop=False)
    exact = mean([*first, weights["ft2"]])
    expected = exact.state_dict()
    for name, tensor in resident_state(evaluator).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
    assert result.correct == Evaluator(digits, tiny_spec).score(exact).correct


def test_a_refused_candidate_leaves_the_mean(evaluator, weights):
    resident = hold(evaluator, weights["ft0"])
    resident.lerp(weights["ft1"], 0.5)
    resident.lerp(weights["ft0"], 0.5)
    for name, tensor in weights["ft0"].state_dict().items():
        assert torch.equal(resident_state(evaluator)[name], tensor)


def test_candidates_in_other_dtypes_and_as_expressions(evaluator, weights):
    resident = hold(evaluator, weights["ft0"])
    tensors = weights["ft1"].state_dict()
    for dtype, close in ((torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        resident.lerp(from_state_dict({k: v.to(dtype) for k, v in tensors.items()}), 1.0)
        for name, tensor in resident_state(evaluator).items():
            torch.testing.assert_close(tensor, tensors[name], rtol=close, atol=close)
    resident.lerp(mean([weights["ft1"], weights["ft2"]]), 1.0)
    expected = mean([weights["ft1"], weights["ft2"]]).state_dict()
    for name, tensor in resident_state(evaluator).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("metric", ["top1", "top5", "mean_per_class", "macro_f1", "ece"])
@pytest.mark.parametrize("strict", [False, True])
def test_stopping_early_decides_as_the_full_pass(tiny_spec, digits, weights, metric, strict):
    outcomes = []
    for early in (False, True):
        evaluator = Evaluator(digits, tiny_spec, metric=metric)
        incumbent = evaluator.score(weights["ft0"])
        results = [
            evaluator.score_with(
                [weights["ft0"]], weights[f"ft{i}"], incumbent=incumbent, strict=strict, early_stop=early
            )
            for i in range(1, 5)
        ]
        outcomes.append([is_better(result, incumbent, strict=strict) for result in results])
        saved = sum(len(digits) - result.images_scored for result in results)
        assert saved == evaluator.images_saved
        assert all(isinstance(r, Stopped) is (r.images_scored < len(digits)) for r in results)
        assert (saved == 0) or (early and metric != "ece")
    assert outcomes[0] == outcomes[1]


def test_a_hopeless_candidate_is_known_by_its_first_images(tiny_spec, digits, weights):
    """Labels are what the incumbent says, so that one mistake is one too many."""
    own = replace(digits, labels=Evaluator(digits, tiny_spec).score(weights["ft0"]).predictions)
    evaluator = Evaluator(own, tiny_spec)
    incumbent = evaluator.score(weights["ft0"])
    assert incumbent.correct == 120
    first = evaluator.score_with([weights["ft0"]], weights["ft1"], incumbent=incumbent)
    assert isinstance(first, Stopped)
    assert not is_better(first, incumbent)
    assert first.images_scored <= 32
    assert not torch.is_inference_mode_enabled()
    again = from_state_dict(weights["ft1"].state_dict())
    second = evaluator.score_with([weights["ft0"]], again, incumbent=incumbent)
    assert second.images_scored == 32, "images that were wrong before come first"


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

    incumbent = score_of(said(old), metric)
    partial, stopped = labels.copy(), False
    order = np.argsort(old == labels, kind="stable")
    for start in range(0, n, step):
        chunk = order[start : start + step]
        partial[chunk] = new[chunk]
        best_case = Stopped(metric, METRICS[metric].compute(said(partial)), n, start)
        if not is_better(best_case, incumbent, strict=strict):
            stopped = True
            break
    assert is_better(score_of(said(new), metric), incumbent, strict=strict) is not stopped


def test_images_often_wrong_come_first():
    """By how often they were wrong of how often they were seen: 1 of 1, 1 of 2, 1 of 2, 0 of 2."""
    right = {"a": [True, False, True, False], "b": [True, False, False, True]}
    orders = []
    evaluator, table = table_evaluator({"val": 4}, lambda made, split: right.get(made[0][0], [True] * 4))
    rows = table.rows
    table.rows = lambda split, order: orders.append(order.tolist()) or rows(split, order)
    scores = [evaluator.score(point(name)) for name in "ab"]
    evaluator.score_with([point("a")], point("c"), incumbent=scores[0])
    assert orders[-1] == [1, 2, 3, 0]


def test_a_metric_never_falls_when_an_image_becomes_right():
    draw = np.random.default_rng(0)
    for metric in METRICS.values():
        if not metric.higher_is_better or metric.retrieval:
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
    incumbent = evaluator.score(both[0])
    result = evaluator.score_with(both[:1], both[1], incumbent=incumbent, early_stop=False)
    name = "classification_head.weight"
    expected = (heads[0][name] + heads[1][name]) / 2
    torch.testing.assert_close(resident_state(evaluator)[name], expected)
    assert result.correct == Evaluator(evaluator.splits, evaluator.model).score(mean(both)).correct


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
    evaluator = Evaluator(digits, spec)
    hold(evaluator, weights[0]).lerp(weights[1], 0.5)
    after = resident_state(evaluator)
    assert after["visual.bn1.num_batches_tracked"] == 10
    assert after["visual.bn1.running_mean"].tolist() == [0.5] * 4


def test_a_candidate_with_other_tensors_is_refused(evaluator, weights):
    resident = hold(evaluator, weights["ft0"])
    tensors = weights["ft1"].state_dict()
    del tensors["ln_final.bias"]
    with pytest.raises(MismatchError, match=r"1 names differ, first 'ln_final.bias'"):
        resident.lerp(from_state_dict(tensors), 0.5)
    wide = {**weights["ft1"].state_dict(), "ln_final.bias": torch.zeros(9)}
    with pytest.raises(MismatchError, match=r"'ln_final.bias' is \[9\]"):
        resident.lerp(from_state_dict(wide), 0.5)


def test_a_shared_text_tower_is_digested_once(tiny_spec, digits, tiny_checkpoints, tmp_path, monkeypatch):
    """Between two checkpoints with one text tower, every point has it: nothing is hashed again."""
    from safetensors.torch import load_file

    from clipmerge.evaluate import resident as resident_module
    from clipmerge.weights.weights import load

    base, other = load_file(tiny_checkpoints["base"]), load_file(tiny_checkpoints["ft0"])
    for i in range(3):
        tensors = {k: base[k].lerp(other[k], i / 2) if k.startswith("visual.") else base[k] for k in base}
        from_state_dict(tensors).save(tmp_path / f"m{i}.safetensors")
    evaluator = Evaluator(digits, tiny_spec)
    models = [load(tmp_path / f"m{i}.safetensors") for i in range(3)]
    scores = [evaluator.score(model) for model in models]
    digests, real = [], resident_module.text_digest
    monkeypatch.setattr(resident_module, "text_digest", lambda tensors: digests.append(1) or real(tensors))
    for model in models[1:]:
        evaluator.score_with(models[:1], model, incumbent=scores[0], early_stop=False)
        state = evaluator.predictor.resident.module.state_dict()
        assert evaluator.predictor.resident.text_digest() == real(state)
    assert len(digests) == 1, "the mean's own"
