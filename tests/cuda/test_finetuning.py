"""Finetuning on a GPU against the CPU: every method, given heads, compile, resume, the generators."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from .conftest import distance, limited_memory

pytestmark = pytest.mark.cuda

METHODS = ("flyp", "ce", "car-ft", "lp-ft", "linear-probe")
FP32 = 2e-2
"""Relative difference of a tensor after six steps of AdamW at 1e-3, which makes a whole step of a rounding error."""


@pytest.mark.parametrize("method", METHODS)
def test_fp32_trains_to_the_cpus_weights(
    method: str, tune: Callable[..., Any], judge: Callable[..., Any]
) -> None:
    ours, theirs = tune("ours", method=method), tune("theirs", method=method, device="cpu")
    if method not in ("lp-ft", "linear-probe"):  # LBFGS may stop an iteration earlier
        assert distance(ours, theirs) < FP32
    a, b = (judge("cpu").score(weights).value for weights in (ours, theirs))
    assert a == pytest.approx(b, abs=0.03)


@pytest.mark.parametrize("method", ["flyp", "ce", "car-ft", "lp-ft"])
def test_bf16_has_the_losses_of_fp32(method: str, tune: Callable[..., Any]) -> None:
    losses: dict[str, list[float]] = {"bf16": [], "fp32": []}
    for precision, line in losses.items():

        def take(event: Mapping[str, Any], line: list[float] = line) -> None:
            if event["event"] == "step":
                line.append(event["loss"])

        tune(precision, method=method, precision=precision, lr=1e-4, on_event=take)
    assert losses["bf16"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


def test_a_probe_in_bf16_is_worth_as_much(tune: Callable[..., Any], judge: Callable[..., Any]) -> None:
    rough, exact = (tune(p, method="linear-probe", precision=p) for p in ("bf16", "fp32"))
    assert judge("cpu").score(rough).value >= judge("cpu").score(exact).value - 0.05


@pytest.mark.parametrize(
    "changed",
    [
        {"augment": "crop:0.5+flip", "workers": 2},
        {"augment": "crop+randaugment:2,9", "workers": 2, "accumulate": 2},
        {"augment": "crop:0.5+flip", "augment_on": "device"},
        {"chunk": 4, "ema": 0.9},
        {"checkpointing": True, "clip_grad": 1.0},
        {"precision": "fp16", "clip_grad": 1.0},
        {"precision": "tf32"},
        {"precision": None},
        {"towers": "image"},
        {"towers": "text"},
        {"mixup": 0.3, "augment": "crop", "method": "ce"},
        {"multi_positive": True, "logit_scale": "clamped"},
    ],
    ids="+".join,
)
def test_every_option_trains(changed: dict[str, Any], tune: Callable[..., Any]) -> None:
    import torch

    assert all(bool(torch.isfinite(value).all()) for value in tune(**changed).state_dict().values())


def test_augmented_batches_are_the_cpus(tune: Callable[..., Any]) -> None:
    """Worker processes, pinned memory and a stream for copies change nothing about pixels or their order."""
    ours = tune("ours", augment="crop:0.5+flip", workers=2)
    theirs = tune("theirs", augment="crop:0.5+flip", workers=0, device="cpu")
    assert distance(ours, theirs) < FP32


def test_a_given_head_trains(tune: Callable[..., Any]) -> None:
    """It came from a file, to the CPU (finding A1)."""
    probe = tune("probe", method="linear-probe")
    ours = tune("ours", method="ce", head=probe)
    theirs = tune("theirs", method="ce", head=probe, device="cpu")
    assert distance(ours, theirs) < FP32


def test_compile_changes_rounding_only(tune: Callable[..., Any]) -> None:
    assert distance(tune("compiled", compile=True), tune("plain")) < FP32


class KilledError(Exception):
    """Stands for a process that dies."""


def die_after(step: int) -> Callable[[str, int, int], None]:
    def progress(what: str, done: int, total: int) -> None:
        if what == "steps" and done == step:
            raise KilledError

    return progress


@pytest.mark.parametrize("method", ["flyp", "ce"])
def test_resume_goes_on_where_it_was(method: str, tune: Callable[..., Any]) -> None:
    options = {"method": method, "save_every": 1, "ema": 0.9, "augment": "crop:0.5+flip"}
    whole = tune("whole", **options)
    with pytest.raises(KilledError):
        tune("part", on_progress=die_after(4), **options)
    assert distance(tune("part", resume=True, **options), whole) < FP32


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_deterministic_runs_end_in_the_same_bytes(
    precision: str, tune: Callable[..., Any], tiny_model_config: Any, tmp_path: Path
) -> None:
    """With 257 tokens, the backward pass of attention would else add up by atomics (finding A12)."""
    import clipmerge as cm
    from clipmerge.model import build_model, resolve_model

    vision = {**tiny_model_config["vision_cfg"], "image_size": 64, "patch_size": 4}
    config = {"model_cfg": {**tiny_model_config, "vision_cfg": vision}, "preprocess_cfg": {}}
    (tmp_path / "long.json").write_text(json.dumps(config))
    spec = resolve_model(tmp_path / "long.json")
    base = cm.from_state_dict(build_model(spec, seed=0).state_dict())
    options = {"base": base, "model": spec, "precision": precision, "deterministic": True, "save_every": 1,
               "augment": "crop:0.5+flip"}  # fmt: skip
    tune("whole", **options)
    tune("again", **options)
    with pytest.raises(KilledError):
        tune("part", on_progress=die_after(4), **options)
    tune("part", resume=True, **options)
    whole, again, part = (
        (tmp_path / f"{name}.safetensors").read_bytes() for name in ("whole", "again", "part")
    )
    assert whole == again == part


def test_resume_across_devices(tune: Callable[..., Any], device: str) -> None:
    """A state belongs to no device: begun on a CPU it goes on on a GPU, and the other way round."""
    whole = tune("whole", save_every=1, device="cpu")
    for name, first, then in (("up", "cpu", device), ("down", device, "cpu")):
        with pytest.raises(KilledError):
            tune(name, save_every=1, device=first, on_progress=die_after(4))
        assert distance(tune(name, save_every=1, device=then, resume=True), whole) < FP32


@pytest.mark.cuda(only=True)
def test_a_state_keeps_the_generator_of_its_own_gpu(tune: Callable[..., Any], tmp_path: Path) -> None:
    """Not one for each GPU of the machine, or it could not be resumed beside fewer (finding A11)."""
    import torch

    with pytest.raises(KilledError):
        tune("part", save_every=1, on_progress=die_after(4))
    state = torch.load(tmp_path / "part.state", weights_only=True, map_location="cpu")
    (generators,) = state["random"]
    assert [type(one) for one in generators] == [torch.Tensor, torch.Tensor]


@pytest.mark.cuda(only=True)
def test_seeding_a_model_or_an_augmentation_leaves_the_gpus_generator(tiny_spec: Any, train: Any) -> None:
    """Else dropout would follow which image was augmented last (finding A10)."""
    import torch

    from clipmerge.finetuning.augment import parse_augmentation
    from clipmerge.model import build_model

    before = torch.cuda.get_rng_state()
    build_model(tiny_spec, seed=1)
    augment = parse_augmentation("crop+randaugment:2,9", tiny_spec.preprocess)
    assert augment is not None
    augment(train.image(0), "0/0/0")
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.cuda(only=True)
def test_out_of_memory_says_what_helps(tune: Callable[..., Any], val: Any) -> None:
    from clipmerge.errors import DeviceError

    with limited_memory(0), pytest.raises(DeviceError, match="ran out of memory") as raised:
        tune(train=val, batch_size=len(val), steps=2)
    assert "--batch-size" in str(raised.value.hint)
