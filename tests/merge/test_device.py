"""Which device and precision are meant, as far as a machine without a GPU can pretend to have two."""

from typing import Any

import pytest
import torch

from clipmerge.device import (
    describe,
    deterministic,
    fits,
    float32_matmul,
    keep_on_device,
    resolve_device,
    resolve_precision,
)
from clipmerge.errors import DeviceError

CUDA = torch.device("cuda", 0)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """torch sees two GPUs; which of them became the process's own."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 << 30, 80 << 30))
    return chosen


@pytest.mark.parametrize("asked", [None, "auto", "cuda", torch.device("cuda"), "cuda:0"])
def test_the_gpu_is_the_default_and_becomes_the_processs_own(
    asked: Any, two_gpus: list[torch.device]
) -> None:
    assert resolve_device(asked) == CUDA
    assert two_gpus == [CUDA]
    assert resolve_precision(None, CUDA) == "bf16"
    assert describe(CUDA, "bf16") == "cuda:0 (NVIDIA H100), bf16 autocast, heads and losses fp32"


def test_each_process_of_torchrun_has_its_own(
    two_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resolve_device("cuda") == torch.device("cuda", 1)
    with pytest.raises(DeviceError, match="cuda:0 would be shared by all of torchrun's processes"):
        resolve_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(DeviceError, match="no GPU number 2; this machine has 2") as raised:
        resolve_device(None)
    assert "--nproc-per-node" in str(raised.value.hint)


@pytest.mark.parametrize(
    ("asked", "said", "hint"),
    [
        ("gpu", "'gpu' is no device", "use cuda"),
        ("cuda", "no CUDA device can be used here", "leave --device out"),
        ("cupu", "'cupu' is no device", "cpu"),
    ],
)
def test_a_device_that_is_not_there(
    asked: str, said: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device() == torch.device("cpu")
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"
    with pytest.raises(DeviceError, match=said) as raised:
        resolve_device(asked)
    assert hint in str(raised.value.hint)
    with pytest.raises(DeviceError, match="no precision 'fp8'"):
        resolve_precision("fp8", CUDA)


def _precisions() -> list[Any]:
    conv = getattr(torch.backends.cudnn, "conv", None)
    if hasattr(conv, "fp32_precision"):
        return [conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision]  # type: ignore[union-attr]
    return [torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32]


def test_fp32_is_ieee_in_convolutions_too() -> None:
    """torch's own default is TF32 there (finding B1)."""
    before = _precisions()
    with float32_matmul("fp32"):
        assert _precisions() in (["ieee", "ieee"], [False, False])
    with float32_matmul("tf32"):
        assert _precisions() in (["tf32", "tf32"], [True, True])
    assert _precisions() == before


def test_one_rule_says_what_stays_on_a_gpu(two_gpus: list[torch.device]) -> None:
    """50 of 80 GiB are free: 26 may be taken if 30 % are to be left, none if 75 % are."""
    assert fits(26 << 30, CUDA)
    assert not fits(27 << 30, CUDA)
    assert not fits(1, CUDA, free=0.75)
    assert not fits(1, torch.device("cpu"))
    nothing: Any = type("Pixels", (), {"nbytes": 1 << 40})()
    assert keep_on_device(nothing, CUDA, free=0.3) is None


def test_deterministic_algorithms_end_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for wanted in (True, False):
        with deterministic(torch.device("cpu"), wanted=wanted):
            assert torch.are_deterministic_algorithms_enabled() is wanted
        assert not torch.are_deterministic_algorithms_enabled()
