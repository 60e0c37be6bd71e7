"""The plan in words, before anything is read."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clipmerge.errors import MismatchError
from clipmerge.weights.blocks import BLOCK
from clipmerge.weights.look import describe, memory_of
from clipmerge.weights.methods import apply
from clipmerge.weights.plan import make_plan
from clipmerge.weights.weights import Weights, interpolate, load, mean

Point = Callable[..., Weights]


def test_inputs_groups_and_bytes(point: Point) -> None:
    def make(name: str) -> Weights:
        x = np.ones(4, np.float32)
        return point(name, **{"visual.x": x, "visual.y": x, "text_projection": x, "ids": np.arange(2)})

    told = describe(interpolate(make("base"), make("a"), {"visual": 0.25}))
    assert told.notation == '(1 - {"visual": 0.25})*base + {"visual": 0.25}*a'
    assert (told.total, told.gives) == (1, "a model")
    assert [(i.name, i.path, i.tensors, i.nbytes, i.dtypes) for i in told.inputs] == [
        ("a", None, 4, 64, {"F32": 3, "I64": 1}),
        ("base", None, 4, 64, {"F32": 3, "I64": 1}),
    ]
    assert {g.formula: (g.tensors, g.nbytes, dict(g.towers), g.example) for g in told.groups} == {
        "0.75*base + 0.25*a": (2, 32, {"visual": 2}, "visual.x"),
        "base": (1, 16, {"text": 1}, "text_projection"),
        "integers that must agree": (1, 16, {"other": 1}, "ids"),
    }
    assert (told.read_bytes, told.written_bytes) == (112, 64)
    assert 0 < told.memory_bytes < 150_000_000
    assert told.to_json()["inputs"][0]["name"] == "a"


def test_dtypes_signs_counters_and_methods(point: Point) -> None:
    a, b = (point(n, **{"x": [1.0], "bn.num_batches_tracked": np.array(1)}) for n in "ab")
    told = {g.formula: g.dtype for g in describe(a - 0.6 * (b - a), dtype="fp16").groups}
    assert told == {"1.6*a - 0.6*b": "F16", "integers that must agree": "I64"}
    assert "the largest step counter" in {g.formula for g in describe(mean([a, b])).groups}
    curved = describe(apply("slerp", [a, b]))
    assert {g.formula for g in curved.groups} == {"slerp([a, b], alpha=0.5)", "integers that must agree"}
    assert (describe(a - b).total, describe(a - b).gives) == (0, "a task vector")


def test_memory_counts_whole_tensors_of_methods(point: Point) -> None:
    a, b = (point(n, x=np.ones(10**6, np.float32)) for n in "ab")
    assert memory_of(make_plan(a), 4) == 2 * memory_of(make_plan(a), 2)
    linear, curved = (memory_of(make_plan(w)) for w in (mean([a, b]), apply("slerp", [a, b])))
    assert curved - linear >= 3 * 8 * 10**6


def test_memory_counts_one_large_tensor_beside_small_ones_and_every_input_s_block(point: Point) -> None:
    large, small = np.zeros(9 * 10**6, np.float32), np.zeros(10**6, np.float32)
    two = [point(n, large=large, small=small) for n in "ab"]
    more = memory_of(make_plan(apply("slerp", two)), 3) - memory_of(make_plan(mean(two)), 3)
    assert more == (2 + 8) * 8 * (9 * 10**6 + 2 * 10**6)
    base, *others = (point(f"m{i}", x=small) for i in range(40))
    wide, narrow = (apply("magmax", [o - base for o in some]) for some in (others, others[:2]))
    assert memory_of(make_plan(wide), 2) - memory_of(make_plan(narrow), 2) == 2 * 37 * 2 * BLOCK * 8


def test_no_tensor_is_read(tmp_path: Path, point: Point) -> None:
    """A file whose tensors are all hole: sparse, 40 GB as ls has it."""
    import json

    header = json.dumps({"x": {"dtype": "F32", "shape": [10**10], "data_offsets": [0, 4 * 10**10]}}).encode()
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * 10**10)
    told = describe(interpolate(load(path, "a"), load(path, "b"), 0.5))
    assert told.read_bytes == 8 * 10**10


def test_what_saving_would_refuse_is_refused(point: Point) -> None:
    with pytest.raises(MismatchError):
        describe(mean([point("a", x=[1.0]), point("b", y=[1.0])]))
