"""Checkpoints made of a few numbers, in memory or on disk."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipmerge.checkpoint.tensors import Checkpoint, Extent, Tensor
from clipmerge.dtypes import Scratch, narrow, storage_dtype
from clipmerge.weights.coefficient import Coefficient
from clipmerge.weights.plan import make_plan
from clipmerge.weights.record import write_record
from clipmerge.weights.run import into_arrays
from clipmerge.weights.weights import Weights

_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "bool": "BOOL"}

Point = Callable[..., Weights]
Arrays = Callable[..., dict[str, Any]]
Put = Callable[..., Path]


def _stored(value: Any) -> Tensor:
    """An array as it is, numbers as float32, ("BF16", numbers) as that dtype."""
    if isinstance(value, tuple):
        dtype, numbers = value[0], np.array(value[1], np.float64)
        array = np.empty(numbers.size, storage_dtype(dtype))
        narrow(numbers.reshape(-1), dtype, array, Scratch(numbers.size))
        array = array.reshape(numbers.shape)
    else:
        array = value if isinstance(value, np.ndarray) else np.array(value, np.float32)
        dtype = _NAMES[array.dtype.name]
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return Tensor(dtype, array.shape, (Extent(raw, 0, raw.size),))


def _point(name: str, total: int = 1, record: Mapping[str, Any] | None = None, /, **tensors: Any) -> Weights:
    held = tensors or {"x": 0.0}
    document = {"format": 1, "total": total, **(record or {})}
    metadata = write_record(document) if record is not None or total != 1 else {}
    checkpoint = Checkpoint(name, {key: _stored(held[key]) for key in sorted(held)}, metadata)
    return Weights({checkpoint: Coefficient.of(1)}, checkpoint)


def _arrays(weights: Weights, dtype: str | None = None) -> dict[str, Any]:
    plan = make_plan(weights, dtype=dtype)
    out = {name: np.empty(step.shape, storage_dtype(step.dtype)) for name, step in plan.steps.items()}
    into_arrays(plan, lambda name: out[name].reshape(-1).view(np.uint8))
    return out


@pytest.fixture(scope="session")
def point() -> Point:
    """`point("a", x=array, y=("BF16", numbers))`: weights over tensors in memory, called `a`."""
    return _point


@pytest.fixture(scope="session")
def arrays() -> Arrays:
    """Computed tensors by name, as numpy arrays (BF16 and F8 as their bits)."""
    return _arrays


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """`put("a", x=array)`: writes tmp_path/a.safetensors with the safetensors library."""
    from safetensors.numpy import save_file

    def write(name: str, metadata: Mapping[str, str] | None = None, /, **tensors: Any) -> Path:
        path = tmp_path / (name if "." in name else f"{name}.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: np.asarray(v) for k, v in tensors.items()}, path, metadata=dict(metadata or {}) or None)
        return path

    return write
