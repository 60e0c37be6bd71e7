"""Weights ↔ torch: a state dict, a module's own memory. The only file of this room that imports torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from clipmerge.checkpoint.tensors import Extent, Tensor
from clipmerge.dtypes import BY_TORCH_NAME, torch_dtype
from clipmerge.errors import MismatchError, ModelError, RecipeError
from clipmerge.text import and_more
from clipmerge.types import Bytes, Progress
from clipmerge.weights.check import SHOWN, missing_names
from clipmerge.weights.expression import Expression
from clipmerge.weights.plan import make_plan
from clipmerge.weights.run import into_arrays

if TYPE_CHECKING:
    import torch


def state_dict(
    weights: Expression, dtype: str | None = None, *, on_progress: Progress | None = None
) -> "dict[str, torch.Tensor]":
    """See `Weights.state_dict`."""
    import torch

    plan = make_plan(weights, dtype=dtype)
    tensors = {name: torch.empty(s.shape, dtype=torch_dtype(s.dtype)) for name, s in plan.steps.items()}
    into_arrays(plan, lambda name: _bytes(tensors[name]), on_progress=on_progress)
    return tensors


def load_into(weights: Expression, module: "torch.nn.Module", *, strict: bool = True) -> "torch.nn.Module":
    """See `Weights.load_into`."""
    import torch

    if weights.kind() != 1:
        raise RecipeError(
            f"{weights!r} is a task vector (total 0), not a model",
            hint="add it to its base: base + 0.4*vector",
        )
    targets = module.state_dict(keep_vars=True)
    check_fit(weights, targets, strict)
    plan = make_plan(weights)
    staged: dict[str, torch.Tensor] = {}

    def destination(name: str) -> Bytes:
        want = torch_dtype(plan.steps[name].dtype)
        target = targets.get(name)
        if (
            target is not None
            and (target.device.type, target.dtype) == ("cpu", want)
            and target.is_contiguous()
        ):
            return _bytes(target)
        staged[name] = torch.empty(plan.steps[name].shape, dtype=want)
        return _bytes(staged[name])

    into_arrays(plan, destination)
    with torch.no_grad():
        for name, tensor in staged.items():
            if name in targets:
                targets[name].copy_(tensor)
    return module


def stored(name: str, tensor: "torch.Tensor") -> Tensor:
    """Describe a tensor in memory as one of a checkpoint; it shares the bytes where it is contiguous and on the CPU.

    Raises:
        MismatchError: a dtype that safetensors cannot store, or a sparse tensor.
    """
    import torch

    dtype = BY_TORCH_NAME.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or tensor.layout != torch.strided:
        raise MismatchError(
            f"tensor {name!r} is {tensor.dtype}, {tensor.layout}: it cannot be stored",
            hint="convert it to a dense tensor of a plain dtype first",
        )
    raw = _bytes(tensor.detach().cpu().contiguous())
    return Tensor(dtype, tuple(tensor.shape), (Extent(raw, 0, raw.size),))


def _bytes(tensor: "torch.Tensor") -> Bytes:
    import torch

    if tensor.numel() == 0:
        return np.empty(0, np.uint8)
    flat: Bytes = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return flat


def check_fit(weights: Expression, targets: "Mapping[str, torch.Tensor]", strict: bool = True) -> None:
    """See `Weights.check_fit`."""
    tensors = weights.checkpoints[0].tensors
    problems = []
    if strict:
        missing, extra = sorted(targets.keys() - tensors.keys()), sorted(tensors.keys() - targets.keys())
        problems += [f"the weights lack {name!r}" for name in missing]
        problems += [f"the model has no {name}" for name in missing_names(extra, missing)]
    for name in sorted(tensors.keys() & targets.keys()):
        here, there = tensors[name].shape, tuple(targets[name].shape)
        if here != there:
            problems.append(f"{name!r} is {list(here)} in the weights and {list(there)} in the model")
    if problems:
        raise ModelError(
            "the weights do not fit the model:\n  " + and_more(problems, SHOWN, "\n  "),
            hint="is it the right --model? `clipmerge inspect FILE` shows what the file holds",
        )
