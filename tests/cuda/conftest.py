"""Tests that need a GPU: `pytest -m cuda`. Elsewhere they are left out, and without a GPU skipped at once.

    CLIPMERGE_TEST_DEVICE=cpu pytest -m cuda       # a rehearsal: every line that has a meaning on a CPU

Tolerances: in fp32 (IEEE products and convolutions) a GPU sums in another order than a CPU and nothing else differs;
in bf16 numbers have 8 bits, so that choices are compared by what they are worth, not by name.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

DEVICE = os.environ.get("CLIPMERGE_TEST_DEVICE", "cuda")


def gpus() -> int:
    """How many GPUs this process may use, without importing torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine has too few GPUs for; warnings of torch's own are no errors here."""
    marked = [(item, list(item.iter_markers("cuda"))) for item in items]
    marked = [(item, marks) for item, marks in marked if marks]
    count = gpus() if marked and DEVICE == "cuda" else 0
    for item, marks in marked:
        item.add_marker(pytest.mark.filterwarnings("default"))
        needed = max(mark.kwargs.get("gpus", 1) for mark in marks)
        if DEVICE == "cuda" and count < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU(s), this machine has {count}"))
        elif DEVICE != "cuda" and any(mark.kwargs.get("only") for mark in marks):
            item.add_marker(pytest.mark.skip(reason="means something on a GPU only"))


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(scope="session")
def val() -> Any:
    from clipmerge import open_split

    return open_split("digits#val")


@pytest.fixture(scope="session")
def train() -> Any:
    from clipmerge import open_split

    return open_split("digits#train", limit=60)


@pytest.fixture(scope="session")
def weights(tiny_checkpoints: Any) -> list[Any]:
    """Five perturbed models that know the digits a little, each with its own mistakes."""
    from clipmerge import load

    return [load(tiny_checkpoints[f"ft{i}"]) for i in range(5)]


@pytest.fixture(scope="session")
def judge(tiny_spec: Any, val: Any) -> Callable[..., Any]:
    """An evaluator over the held-out digits: device, precision, and what else is to be different."""
    from clipmerge import Evaluator

    def make(device: str, precision: str | None = "fp32", **changed: Any) -> Any:
        return Evaluator({"val": val}, tiny_spec, device=device, precision=precision, **changed)

    return make


@pytest.fixture
def tune(
    tiny_checkpoints: Any, train: Any, tiny_spec: Any, tmp_path: Path, device: str
) -> Callable[..., Any]:
    """`finetune` on the device with small settings; a name and what is to be different."""
    from clipmerge import finetune, load

    def run(name: str = "ft", **changed: Any) -> Any:
        options = {"lr": 1e-3, "batch_size": 16, "steps": 6, "augment": "none", "precision": "fp32", "workers": 0,
                   "model": tiny_spec, "device": device, **changed}  # fmt: skip
        if options.get("method") == "linear-probe":  # takes no steps
            options = {name: value for name, value in options.items() if name not in ("lr", "steps")}
        images, base = options.pop("train", train), options.pop("base", None)
        base = load(tiny_checkpoints["base"]) if base is None else base
        return finetune(base, images, out=tmp_path / f"{name}.safetensors", **options)

    return run


def distance(ours: Any, theirs: Any) -> float:
    """The largest relative difference of a tensor, but for biases of keys: their gradient is rounding alone."""
    mine, other = (dict(weights.state_dict()) for weights in (ours, theirs))
    assert mine.keys() == other.keys()
    compared = [name for name in mine if not name.endswith("in_proj_bias")]
    return max(
        float((mine[n].double() - other[n].double()).norm() / other[n].double().norm().clamp_min(1e-6))
        for n in compared
    )


def python(*arguments: str, ranks: int = 0, timeout: int = 120, **environment: str) -> str:
    """Run a Python program, under torchrun where `ranks` are named; what it printed."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *(torchrun if ranks else []), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@contextmanager
def limited_memory(room: int) -> Iterator[None]:
    """Within, the GPU has room for so many bytes beside what is taken."""
    import torch

    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
