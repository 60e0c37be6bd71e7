"""Positional embeddings of another image size or context length, brought to a base's."""

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from typing import Any, TypeVar

import numpy as np

from clipmerge.checkpoint.processors import OWN_KEYS
from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import Checkpoint, Extent, Tensor
from clipmerge.dtypes import BY_TORCH_NAME, to_float64, torch_dtype
from clipmerge.errors import MismatchError
from clipmerge.weights.coefficient import Coefficient
from clipmerge.weights.expression import Expression
from clipmerge.weights.names import IMAGE_POSITIONS as IMAGE
from clipmerge.weights.names import POSITIONS
from clipmerge.weights.record import FORMAT, model_record, read_record, write_record

E = TypeVar("E", bound=Expression)


def resize_positions(weights: E, base: Expression) -> E:
    """Bring the positional embeddings of one checkpoint to the grid of `base`, as open_clip does when it loads one.

    Image positions are interpolated bicubically with antialiasing, the class token's is kept; text positions linearly.
    The result is linear in the weights: it takes task vectors too. What needs no change is returned as it is.

    Raises:
        MismatchError: a grid that is not square, or another width.
    """
    (checkpoint,) = weights.checkpoints
    changed = resized(checkpoint, base.reference)
    if changed is checkpoint:
        return weights
    return type(weights)({changed: Coefficient.of(1)}, changed)


def resized(checkpoint: Checkpoint, base: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the positions of `base`; what it says of its model follows."""
    names = [n for n in POSITIONS if n in checkpoint.tensors and n in base.tensors]
    changed = {
        name: _interpolated(checkpoint, name, base.tensors[name].shape)
        for name in names
        if checkpoint.tensors[name].shape != base.tensors[name].shape
    }
    if not changed:
        return checkpoint
    record = {"format": FORMAT, "total": 1, **read_record(checkpoint.metadata)}
    if (model := model_record(checkpoint)) is not None:
        record["model"] = _said(model, {name: tensor.shape[0] for name, tensor in changed.items()})
    extra = {key: value for key, value in checkpoint.extra.items() if key != "model"}
    return replace(
        checkpoint,
        tensors={**checkpoint.tensors, **changed},
        metadata={**checkpoint.metadata, **write_record(record)},
        extra={**extra, "resized": tuple(changed)},
    )


def _interpolated(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor of this name, with as many positions as `shape` has: open_clip's `resize_pos_embed`, in fp32."""
    import torch
    from torch.nn.functional import interpolate

    tensor = checkpoint.tensors[name]
    where = f"{checkpoint.path or checkpoint.name}: {name!r}"
    if len(tensor.shape) != 2 or len(shape) != 2 or tensor.shape[1] != shape[1]:
        shapes = f"{list(tensor.shape)}, and {list(shape)} in the base"
        raise MismatchError(f"{where} is {shapes}: another width, which no resizing bridges")
    with Reader([checkpoint]) as reader:
        values = torch.from_numpy(to_float64(reader.dense(tensor), tensor.dtype)).to(torch.float32)
    if name == IMAGE:
        (old, new), width = (isqrt(rows - 1) for rows in (tensor.shape[0], shape[0])), shape[1]
        if old * old + 1 != tensor.shape[0] or new * new + 1 != shape[0]:
            raise MismatchError(
                f"{where} has {tensor.shape[0]} positions, the base {shape[0]}: one of the grids is not square",
                hint="only square grids with one class token are resized",
            )
        grid = values[1:].reshape(1, old, old, width).permute(0, 3, 1, 2)
        grid = interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
        values = torch.cat([values[:1], grid.permute(0, 2, 3, 1).reshape(new * new, width)])
    else:
        line = interpolate(values.T[None], size=shape[0], mode="linear", align_corners=False)
        values = line[0].T
    stored = values.to(torch_dtype(tensor.dtype)).contiguous()
    assert BY_TORCH_NAME[str(stored.dtype).removeprefix("torch.")] == tensor.dtype
    data = stored.reshape(-1).view(torch.uint8).numpy().astype(np.uint8, copy=False)
    return Tensor(tensor.dtype, shape, (Extent(data, 0, data.size),))


def _said(model: Mapping[str, Any], rows: Mapping[str, int]) -> dict[str, Any]:
    """What is said of the model, with the sizes that its new positions are for."""
    said = {
        **model,
        "config": dict(model.get("config") or {}),
        "preprocess": dict(model.get("preprocess") or {}),
    }
    for name, count in rows.items():
        tower, key = ("vision_cfg", "image_size") if name == IMAGE else ("text_cfg", "context_length")
        if isinstance(config := said["config"].get(tower), Mapping):
            size = isqrt(count - 1) * config.get("patch_size", 16) if name == IMAGE else count
            said["config"][tower] = {**config, key: size}
    if IMAGE in rows:  # images are prepared in the base's size
        said["preprocess"] = {k: v for k, v in said["preprocess"].items() if k not in ("size", *OWN_KEYS)}
    return {key: value for key, value in said.items() if value or key == "name"}
