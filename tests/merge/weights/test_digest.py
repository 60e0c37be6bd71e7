"""Content digests: what is held decides, nothing else."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from clipmerge.checkpoint.cache import cache_dir
from clipmerge.checkpoint.tensors import Checkpoint, Extent, Tensor
from clipmerge.weights.digest import combine, content_digest, tensor_digests
from clipmerge.weights.weights import Weights, load

Point = Callable[..., Weights]
Put = Callable[..., Path]
X = np.arange(6, dtype=np.float32).reshape(2, 3)


def digest(weights: Weights) -> str:
    return content_digest(weights.checkpoints[0])


def test_it_is_blake3_of_names_dtypes_shapes_and_bytes(point: Point) -> None:
    inner = blake3(X.tobytes()).hexdigest()
    assert digest(point("a", x=X)) == blake3(f"x\0F32\0[2, 3]\0{inner}\n".encode()).hexdigest()


def test_file_name_metadata_and_order_do_not_count(put: Put, point: Point) -> None:
    one = load(put("one", {"key": "value"}, x=X, y=np.ones(2, np.float32)))
    two = load(put("two", y=np.ones(2, np.float32), x=X))
    assert digest(one) == digest(two) == digest(point("memory", y=np.ones(2, np.float32), x=X))


def test_names_dtypes_shapes_and_bytes_count(point: Point) -> None:
    changed = X.copy()
    changed[1, 1] = np.nextafter(changed[1, 1], np.float32(9))
    others = [{"y": X}, {"x": X.reshape(3, 2)}, {"x": X.view(np.int32).astype(np.int64)}, {"x": changed}]
    assert len({digest(point("a", **tensors)) for tensors in [{"x": X}, *others]}) == 5


def test_stored_order_does_not_count() -> None:
    """A transposed tensor has the digest of its row-major twin."""
    turned = np.ascontiguousarray(X.T).reshape(-1).view(np.uint8)
    strided = Checkpoint("s", {"x": Tensor("F32", (2, 3), (Extent(turned, 0, 24),), (1, 2))})
    raw = X.reshape(-1).view(np.uint8)
    parts = Checkpoint("p", {"x": Tensor("F32", (2, 3), (Extent(raw, 0, 8), Extent(raw, 8, 16)))})
    plain = Checkpoint("r", {"x": Tensor("F32", (2, 3), (Extent(raw, 0, 24),))})
    assert content_digest(strided) == content_digest(parts) == content_digest(plain)


def test_it_is_remembered_until_the_file_changes(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put("a", x=X)
    first = digest(load(path))
    assert list((cache_dir() / "digests").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("clipmerge.weights.digest.tensor_digests", None)  # would be called without the memory
        assert digest(load(path)) == first
    put("a", x=X + 1)
    os.utime(path, ns=(1, 1))
    assert digest(load(path)) != first


def test_a_damaged_or_unwritable_memory_is_no_harm(
    put: Put, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = put("a", x=X)
    monkeypatch.setenv("CLIPMERGE_CACHE", str(tmp_path / "cache"))
    first = digest(load(path))
    (remembered,) = (tmp_path / "cache" / "digests").iterdir()
    remembered.write_text("not a digest")
    assert digest(load(path)) == first
    monkeypatch.setenv("CLIPMERGE_CACHE", str(path))  # a file, not a folder
    assert digest(load(path)) == first


def test_each_tensor_has_its_own(point: Point) -> None:
    checkpoint = point("a", x=X, y=[1.0]).checkpoints[0]
    found = tensor_digests(checkpoint, "xy")
    assert found == {"x": blake3(X.tobytes()).hexdigest(), "y": blake3(np.float32(1).tobytes()).hexdigest()}
    assert combine(checkpoint.tensors, found) == content_digest(checkpoint)


def test_progress_ends_with_all_bytes(put: Put) -> None:
    told: list[tuple[str, int, int]] = []
    content_digest(load(put("a", x=X, y=X)).checkpoints[0], lambda *args: told.append(args))
    assert told[-1] == ("hashing a", 48, 48)
