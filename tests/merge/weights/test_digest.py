"""Content digests: what is held decides, nothing else."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from blake3 import blake3

from clipmerge.checkpoint.cache import cache_dir
from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import Checkpoint, Extent, Tensor
from clipmerge.weights import blocks
from clipmerge.weights.digest import content_digest
from clipmerge.weights.methods import apply
from clipmerge.weights.weights import Weights, interpolate, load, mean

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
        patch.setattr("clipmerge.weights.digest.for_each_tensor", None)  # would be called without the memory
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
    lines = [("x", "[2, 3]", X), ("y", "[1]", np.float32([1.0]))]
    text = "".join(f"{n}\0F32\0{shape}\0{blake3(v.tobytes()).hexdigest()}\n" for n, shape, v in lines)
    assert digest(point("a", x=X, y=[1.0])) == blake3(text.encode()).hexdigest()


def test_progress_ends_with_all_bytes(put: Put) -> None:
    told: list[tuple[str, int, int]] = []
    content_digest(load(put("a", x=X, y=X)).checkpoints[0], lambda *args: told.append(args))
    assert told[-1] == ("hashing a", 48, 48)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of bytes of each read of a file from here on."""
    sizes: list[int] = []
    pread = Reader._read

    def counting(reader: Reader, path: Path, offset: int, out: npt.NDArray[np.uint8]) -> None:
        sizes.append(out.size)
        pread(reader, path, offset, out)

    monkeypatch.setattr(Reader, "_read", counting)
    return sizes


TENSORS = {"w": np.ones((300, 200)), "v": np.ones(7), "e": np.ones((0, 3)), "s": np.array(2.0)}


def test_a_merge_takes_digests_from_the_bytes_that_it_reads_anyway(
    put: Put, tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a block is a part of a tensor, and where integers, a method and a pattern read it otherwise."""
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    monkeypatch.setenv("CLIPMERGE_CACHE", str(tmp_path / "cache"))
    made = {n: {k: np.float32(v * i) for k, v in TENSORS.items()} for i, n in enumerate("abc", 1)}
    a, b, c = (load(put(name, ids=np.arange(5), **tensors), name) for name, tensors in made.items())
    recipes = {
        "mean": mean([a, b, c]),
        "some": interpolate(a, b, {"w": 0.5, "s": 1}),
        "stock": apply("model_stock", [a, b, c]),
        "vectors": a + 0.5 * apply("magmax", [b - a, c - a]),
    }
    for name, weights in recipes.items():
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        reads.clear()
        first = weights.save(tmp_path / f"{name}-first.safetensors")
        held = sum(t.nbytes for c in weights.checkpoints for t in c.tensors.values())
        heads = 64 * sum(
            len(c.tensors) for c in weights.checkpoints
        )  # of each tensor, for the order of the sum
        assert held <= sum(reads) <= held + heads
        reads.clear()
        known = weights.save(tmp_path / f"{name}-known.safetensors")
        assert sum(reads) <= held + heads
        assert first.read_bytes() == known.read_bytes()
        parents = load(first).record["parents"]
        shutil.rmtree(tmp_path / "cache")
        for checkpoint in weights.checkpoints:
            assert parents[checkpoint.name]["digest"] == content_digest(checkpoint)


def test_shards_and_threads_take_the_same_digests(put: Put, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    files = [put(n, **{k: rng.standard_normal((90, 50)).astype("f4") for k in "xyz"}) for n in "ab"]
    digests = set()
    for number, options in enumerate(({"threads": 1}, {"threads": 5}, {"shard_size": 20_000})):
        shutil.rmtree(cache_dir(), ignore_errors=True)
        merged = mean([load(file) for file in files]).save(tmp_path / f"{number}.safetensors", **options)
        digests.add(str(load(merged).record["parents"]))
    assert len(digests) == 1
