"""Scores and choices on a GPU against the CPU's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .conftest import limited_memory

pytestmark = pytest.mark.cuda

LOGITS = {"fp32": 1e-3, "tf32": 0.5, "bf16": 5.0, "fp16": 1.0}
"""Largest difference of a logit, which is up to 100 times a cosine."""
WORTH = 0.03
"""What a choice made in bf16 may be worth less than the CPU's: a share of the images."""


@pytest.mark.parametrize("precision", LOGITS)
def test_logits_are_the_cpus(
    precision: str, judge: Callable[..., Any], weights: list[Any], device: str
) -> None:
    evaluator = judge(device, precision)
    ours, theirs = evaluator.logits(weights[0]), judge("cpu").logits(weights[0])
    assert float((ours - theirs).abs().max()) < LOGITS[precision]
    assert evaluator.features(weights[0]).norm(dim=-1).numpy() == pytest.approx(1, abs=1e-5)


def test_convolutions_are_ieee_in_fp32(tiny_model_config: Any, val: Any, tmp_path: Path, device: str) -> None:
    """cuDNN's own default is TF32, which has 11 bits (finding B1)."""
    import clipmerge as cm
    from clipmerge.model import build_model, resolve_model

    resnet = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    config = {"model_cfg": {**tiny_model_config, "embed_dim": 32, "vision_cfg": resnet}, "preprocess_cfg": {}}
    (tmp_path / "resnet.json").write_text(json.dumps(config))
    spec = resolve_model(tmp_path / "resnet.json")
    weights = cm.from_state_dict(build_model(spec, seed=0).state_dict())
    ours, theirs = (
        cm.Evaluator({"val": val}, spec, device=place, precision="fp32").logits(weights)
        for place in (device, "cpu")
    )
    assert float((ours - theirs).abs().max()) < 1e-3


def test_a_score_is_the_cpus_but_for_an_image_on_the_fence(
    judge: Callable[..., Any], weights: list[Any], device: str
) -> None:
    ours, theirs = judge(device), judge("cpu")
    for candidate in weights:
        a, b = ours.score(candidate), theirs.score(candidate)
        assert int((a.correct_mask != b.correct_mask).sum()) <= 1
        assert a.metrics["ece"] == pytest.approx(b.metrics["ece"], abs=5e-3)


def test_the_default_is_bf16_on_a_gpu(judge: Callable[..., Any], weights: list[Any], device: str) -> None:
    named = judge(device, "bf16" if device == "cuda" else "fp32").logits(weights[0])
    default = judge("auto" if device == "cuda" else device, None).logits(weights[0])
    assert bool((default == named).all())


@pytest.mark.parametrize("strict", [False, True])
def test_the_greedy_soup_is_the_cpus(
    strict: bool, judge: Callable[..., Any], weights: list[Any], device: str
) -> None:
    import clipmerge as cm

    theirs = cm.greedy_soup(weights, judge("cpu"), strict=strict)
    ours = cm.greedy_soup(weights, judge(device), strict=strict)
    assert ours.ingredients == theirs.ingredients
    assert ours.score.value == pytest.approx(theirs.score.value, abs=1.5 / theirs.score.n)
    rough = cm.greedy_soup(weights, judge(device, "bf16"), strict=strict)
    assert judge("cpu").score(rough.weights).value >= theirs.score.value - WORTH


def test_stopping_early_changes_no_choice(judge: Callable[..., Any], weights: list[Any], device: str) -> None:
    import clipmerge as cm

    early = cm.greedy_soup(weights, judge(device, batch_size=32))
    whole = cm.greedy_soup(weights, judge(device, batch_size=32), early_stop=False)
    assert early.ingredients == whole.ingredients
    assert early.images["scored"] <= whole.images["scored"]


def test_the_ensemble_is_the_cpus(judge: Callable[..., Any], weights: list[Any], device: str) -> None:
    from clipmerge.search.ensemble import greedy_ensemble

    ours, theirs = (greedy_ensemble(weights, judge(place)) for place in (device, "cpu"))
    assert ours.ingredients == theirs.ingredients


def test_the_sweeps_coefficient_is_the_cpus(
    judge: Callable[..., Any], tiny_checkpoints: Any, weights: list[Any], device: str
) -> None:
    import clipmerge as cm
    from clipmerge.search.rules import best_id

    base, grid = cm.load(tiny_checkpoints["base"]), [i / 10 for i in range(11)]

    def chosen(place: str, precision: str) -> float:
        result = cm.sweep(
            lambda x: cm.interpolate(base, weights[0], x), grid, judge(place, precision), rule=best_id("val")
        )
        return float(result.coefficient)

    def worth(coefficient: float) -> float:
        return float(judge("cpu").score(cm.interpolate(base, weights[0], coefficient)).value)

    theirs = chosen("cpu", "fp32")
    assert chosen(device, "fp32") == theirs
    assert worth(chosen(device, "bf16")) >= worth(theirs) - WORTH


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-3), ("bf16", 5e-2)])
def test_the_learned_soups_shares_are_the_cpus(
    precision: str, tolerance: float, judge: Callable[..., Any], weights: list[Any], device: str
) -> None:
    from clipmerge.search.learned import learned_soup

    theirs = learned_soup(weights[:3], judge("cpu"), epochs=2, batch_size=128)
    ours = learned_soup(weights[:3], judge(device, precision), epochs=2, batch_size=128)
    assert dict(ours.coefficients or {}) == pytest.approx(dict(theirs.coefficients or {}), abs=tolerance)


def test_a_journal_tells_devices_and_precisions_apart(
    judge: Callable[..., Any], weights: list[Any], device: str, tmp_path: Path
) -> None:
    def scored(place: str, precision: str) -> int:
        evaluator = judge(place, precision, journal=tmp_path / "journal")
        evaluator.score(weights[0])
        return int(evaluator.images_scored)

    assert scored("cpu", "fp32") > 0
    assert scored(device, "bf16") > 0
    assert scored(device, "bf16") == 0
    assert (scored(device, "fp32") > 0) == (device != "cpu")


@pytest.mark.cuda(only=True)
def test_no_batch_waits_for_the_gpu(judge: Callable[..., Any], weights: list[Any]) -> None:
    """Rows are read one batch late, through pinned memory: nothing else synchronises (finding C2)."""
    import torch

    evaluator = judge("cuda", "bf16", batch_size=32)
    evaluator.load(weights[0])
    order = np.arange(len(evaluator.labels()))
    before = [rows.copy() for _, rows in evaluator.predictor.rows("val", order)]  # moves what is moved once
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = [rows.copy() for _, rows in evaluator.predictor.rows("val", order)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(rows) > 8
    assert all((a == b).all() for a, b in zip(rows, before, strict=True))


@pytest.mark.cuda(only=True)
def test_pixels_that_do_not_fit_are_copied_batch_by_batch(
    judge: Callable[..., Any], weights: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipmerge.evaluate import device_split

    resident = judge("cuda", batch_size=32).logits(weights[0])
    monkeypatch.setattr(device_split, "_FREE", 1.0)
    assert bool((judge("cuda", batch_size=32).logits(weights[0]) == resident).all())


@pytest.mark.cuda(only=True)
def test_a_step_of_the_learned_soup_uploads_no_candidate(
    judge: Callable[..., Any], weights: list[Any], tmp_path: Path
) -> None:
    """Candidates lie on the GPU as one matrix; a step needs indices and shares (finding C5)."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from clipmerge.search.mixture import Mixture

    evaluator = judge("cuda")
    evaluator.load(weights[0])
    mixture = Mixture(evaluator, "val", weights, ("*",))
    shares = torch.full((1, len(weights)), 1 / len(weights))
    mixture.gradients(shares, 1.0, torch.arange(128))
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        mixture.gradients(shares, 1.0, torch.arange(128))
        torch.cuda.synchronize()
    profiled.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    up = [int(e["args"].get("bytes", 0)) for e in events if "Memcpy HtoD" in str(e.get("name"))]
    assert sum(up) < 100_000  # a candidate has 1.7 MB, the batch's pixels 98 kB


@pytest.mark.cuda(only=True)
def test_out_of_memory_says_what_helps(judge: Callable[..., Any], weights: list[Any]) -> None:
    from clipmerge.errors import DeviceError

    judge("cuda", batch_size=8).score(weights[0])
    evaluator = judge("cuda", batch_size=4096)
    evaluator.load(weights[0])
    with limited_memory(0), pytest.raises(DeviceError, match="ran out of memory") as raised:
        evaluator.score(weights[0])
    assert "--batch-size" in str(raised.value.hint)
