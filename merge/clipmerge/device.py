"""Resolve `--device` and `--precision` once, for scoring and for training."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch

from clipmerge.distributed import local_rank
from clipmerge.errors import DeviceError
from clipmerge.text import did_you_mean

__all__ = [
    "Precision",
    "autocast",
    "autocast_dtype",
    "describe",
    "deterministic",
    "fits",
    "float32_matmul",
    "keep_on_device",
    "out_of_memory_hint",
    "resolve_device",
    "resolve_precision",
    "to_device",
]

Precision: TypeAlias = Literal["fp32", "tf32", "bf16", "fp16"]
"""What towers compute in: IEEE fp32; fp32 with TF32 products; autocast. Heads, losses and weights are fp32."""

_BLOCK = 1024
"""Images that are copied to a GPU at a time: their file need not be in memory as a whole."""

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str | torch.device | None = None) -> torch.device:
    """Return the device to use; None or "auto" is this process's own GPU where there is one, else the CPU.

    Under torchrun "cuda" is `cuda:LOCAL_RANK`. A CUDA device becomes the process's current one.

    Raises:
        DeviceError: no such device, it cannot be used here, or one GPU is named for all of torchrun's processes.
    """
    asked = "auto" if name is None else str(name)
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        hint = did_you_mean(asked, ("auto", "cpu", "cuda", "mps"), "use auto, cpu, cuda, cuda:1 or mps")
        raise DeviceError(f"{asked!r} is no device", hint="use cuda" if asked == "gpu" else hint) from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise DeviceError(f"{asked!r} cannot be computed on here", hint="use auto, cpu, cuda, cuda:1 or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("this machine has no MPS device", hint="leave --device out, or use --device cpu")
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise DeviceError(
            "no CUDA device can be used here",
            hint="leave --device out to use the CPU; `nvidia-smi` shows GPUs",
        )
    local = local_rank()
    if local is not None:
        if device.index is not None and device.index != local:
            raise DeviceError(
                f"{asked} would be shared by all of torchrun's processes",
                hint="use --device cuda: each process takes its own GPU",
            )
        device = torch.device("cuda", local)
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise DeviceError(
            f"there is no GPU number {index}; this machine has {torch.cuda.device_count()}",
            hint="torchrun --nproc-per-node must not exceed the number of GPUs",
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def resolve_precision(name: str | None, device: torch.device) -> Precision:
    """Return the precision to compute in; None or "auto" is bf16 on a CUDA device that has it, else fp32.

    Raises:
        DeviceError: there is no such precision.
    """
    if name is None or name == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    for precision in get_args(Precision):
        if name == precision:
            return precision  # type: ignore[no-any-return]
    raise DeviceError(f"there is no precision {name!r}", hint="use auto, fp32, tf32, bf16 or fp16")


def to_device(numbers: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy a few numbers to the device; a GPU's copy is not waited for."""
    tensor = torch.from_numpy(np.ascontiguousarray(numbers))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def fits(nbytes: int, device: torch.device, *, free: float = 0.3) -> bool:
    """Decide whether data may stay on a GPU: the share `free` of its memory must be left. A CPU's is never copied.

    Args:
        free: a pass needs 0.3 for its activations; training, which has yet to make gradients and moments, 0.75.
    """
    if device.type != "cuda":
        return False
    there, total = torch.cuda.mem_get_info(device)
    return nbytes <= there - free * total


def keep_on_device(
    pixels: npt.NDArray[np.uint8], device: torch.device, *, free: float
) -> torch.Tensor | None:
    """Copy pixels to the GPU, if the share `free` of its memory is left beside them; else return None."""
    if not fits(pixels.nbytes, device, free=free):
        return None
    whole = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(whole), _BLOCK):
        block = np.ascontiguousarray(pixels[start : start + _BLOCK])
        whole[start : start + _BLOCK].copy_(torch.from_numpy(block))
    return whole


def describe(device: torch.device, precision: str) -> str:
    """Return what a summary line says: "cuda:0 (NVIDIA H100), bf16 autocast, heads and losses fp32" or "…, fp64"."""
    card = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    how = f"{precision} autocast, heads and losses fp32" if precision in _AUTOCAST else precision
    return f"{device}{card}, {how}"


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """Return the half precision that towers compute in; None for fp32 and tf32."""
    return _AUTOCAST.get(precision)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which towers compute."""
    if precision in _AUTOCAST:
        return torch.autocast(device.type, _AUTOCAST[precision])
    return nullcontext()


@contextmanager
def float32_matmul(precision: Precision) -> Iterator[None]:
    """Make fp32 products and convolutions on CUDA mean what `precision` says: TF32 for "tf32", else IEEE fp32.

    torch's own default is IEEE for products but TF32 for convolutions, so that "fp32" would be neither.
    """
    tf32 = precision == "tf32"
    conv = getattr(torch.backends.cudnn, "conv", None)
    if conv is not None and hasattr(
        conv, "fp32_precision"
    ):  # torch 2.9 and later; mixing the two ways is an error
        places = [conv, torch.backends.cuda.matmul]
        before = [place.fp32_precision for place in places]
        values = ["tf32" if tf32 else "ieee"] * 2
        names = ["fp32_precision"] * 2
    else:
        places = [torch.backends.cudnn, torch.backends.cuda.matmul]
        before = [place.allow_tf32 for place in places]
        values = [tf32] * 2  # type: ignore[list-item]
        names = ["allow_tf32"] * 2
    try:
        for place, name, value in zip(places, names, values, strict=True):
            setattr(place, name, value)
        yield
    finally:
        for place, name, value in zip(places, names, before, strict=True):
            setattr(place, name, value)


@contextmanager
def deterministic(device: torch.device, *, wanted: bool) -> Iterator[None]:
    """Let torch use algorithms alone that give the same bits each time, where that is wanted: slower on a GPU.

    Else the backward passes of attention and of some convolutions add in an order that changes from run to run.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it by this name
    try:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False  # it would choose convolutions by how fast they happen to be
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


@contextmanager
def out_of_memory_hint(hint: str) -> Iterator[None]:
    """Turn a device's out-of-memory error into a sentence with `hint`, the options that need less.

    Raises:
        DeviceError: the device ran out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError("the GPU ran out of memory", hint=hint) from error
