"""What a checkpoint holds, part by part."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clipmerge.checkpoint.tensors import Checkpoint, Extent, Tensor
from clipmerge.errors import CheckpointError
from clipmerge.weights.digest import content_digest
from clipmerge.weights.look import group_names, inspect
from clipmerge.weights.weights import Weights, load

Point = Callable[..., Weights]


def test_parts_counts_and_sizes(point: Point) -> None:
    weights = point(
        "a", 1, {"training": {"lr": 1}},
        **{
            "visual.conv1.weight": np.ones((2, 3), np.float32),
            "visual.transformer.resblocks.1.x": ("BF16", [1.0, 2.0]),
            "visual.transformer.resblocks.0.x": [1.0],
            "visual.transformer.resblocks.0.y": [1.0],
            "transformer.resblocks.0.x": [1.0],
            "logit_scale": 1.0,
            "ids": np.arange(3),
        },
    )  # fmt: skip
    found = inspect(weights.checkpoints[0])
    assert [
        (p.tower, p.block, p.tensors, p.parameters, p.nbytes, p.dtypes, p.nonfinite) for p in found.parts
    ] == [
        ("visual", None, 1, 6, 24, {"F32": 1}, 0),
        ("visual", 0, 2, 2, 8, {"F32": 2}, 0),
        ("visual", 1, 1, 2, 4, {"BF16": 1}, 0),
        ("text", 0, 1, 1, 4, {"F32": 1}, 0),
        ("other", None, 2, 4, 28, {"F32": 1, "I64": 1}, 0),
    ]
    assert (found.tensors, found.parameters, found.nbytes) == (7, 15, 68)
    assert found.digest == content_digest(weights.checkpoints[0])
    assert found.kind == "a model"
    assert found.record["training"] == {"lr": 1}
    assert found.to_json()["parts"][0]["tower"] == "visual"


def test_values_that_are_not_finite_are_counted_in_every_dtype(point: Point) -> None:
    bad = [1.0, np.nan, np.inf, -np.inf]
    names = {d: (d, bad) for d in ("F16", "BF16", "F8_E5M2", "F8_E4M3")}
    checkpoint = point(
        "a", F32=np.float32(bad), F64=np.float64(bad), ok=[1.0], ids=np.arange(2), **names
    ).checkpoints[0]
    assert inspect(checkpoint).nonfinite == dict.fromkeys(
        ["BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2"], 3
    )
    assert sum(part.nonfinite or 0 for part in inspect(checkpoint).parts) == 18


def test_transposed_tensors_are_counted_too() -> None:
    turned = np.float32([[np.nan, 1.0], [2.0, 3.0]]).reshape(-1).view(np.uint8)
    checkpoint = Checkpoint("t", {"x": Tensor("F32", (2, 2), (Extent(turned, 0, 16),), (1, 2))})
    assert inspect(checkpoint).nonfinite == {"x": 1}


def test_headers_alone_read_nothing(point: Point) -> None:
    found = inspect(point("a", x=[np.nan]).checkpoints[0], headers=True)
    assert (found.nonfinite, found.digest, found.parts[0].nonfinite) == (None, None, None)


def test_a_vector_says_so(point: Point) -> None:
    assert inspect(point("tv", 0).checkpoints[0]).kind == "a task vector"


def test_groups_come_in_order_of_towers_and_blocks() -> None:
    names = ["logit_scale", "transformer.resblocks.2.x", "visual.transformer.resblocks.10.x", "visual.proj",
             "visual.transformer.resblocks.9.x", "classification_head.bias", "ln_final.bias"]  # fmt: skip
    assert list(group_names(names)) == [
        ("visual", None), ("visual", 9), ("visual", 10), ("text", None), ("text", 2), ("head", None), ("other", None),
    ]  # fmt: skip


def test_a_file_that_changed_since_its_header_was_read_is_refused(put: Callable[..., Path]) -> None:
    path = put("a", x=1.0)
    opened = load(path).checkpoints[0]
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(CheckpointError, match="changed after it was opened"):
        inspect(opened)
