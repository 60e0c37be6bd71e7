"""Towers over many devices: DDP, FSDP2 and torch.compile, and whole state dicts of a sharded model."""

from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipmerge.distributed import world
from clipmerge.finetuning.towers import Towers, is_outside

__all__ = ["full_state_dict", "load_full_state_dict", "local_shard", "unsynced", "wrap"]


def wrap(towers: Towers, *, sharded: bool, synced: bool, compiled: bool) -> nn.Module:
    """Return the towers as this world needs them.

    Args:
        sharded: FSDP2, for models that do not fit.
        synced: DDP, which averages gradients while the backward pass runs; False leaves that to the caller.
        compiled: torch.compile, of the image tower and of the text tower's blocks.
    """
    if sharded:
        _shard(towers)  # which refuses parameters that are laid out channels last
    elif towers.format is torch.channels_last:
        towers.model.get_submodule("visual").to(memory_format=torch.channels_last)
    if compiled:
        # Not the text tower as a whole: the context is cut around its blocks, to a length that changes.
        for name in ("visual", "transformer", "text.transformer"):
            with suppress(AttributeError):
                towers.model.get_submodule(name).compile()
    inside = [p for name, p in towers.model.named_parameters() if not is_outside(name)]
    if not synced or not any(p.requires_grad for p in inside):
        return towers
    from torch.nn.parallel import DistributedDataParallel

    # A parameter that the forward pass does not use would be waited for; `average_gradients` sees to those.
    names = [f"model.{name}" for name, _ in towers.model.named_parameters() if is_outside(name)]
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in towers.modules()):
        names += [name for name, _ in towers.named_buffers()]  # masks and means: the same everywhere, always
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(towers, names)  # type: ignore[no-untyped-call]
    device = inside[0].device
    return DistributedDataParallel(
        towers,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def _shard(towers: Towers) -> None:
    """Apply FSDP2: each transformer block is a unit, the rest another; what the loss uses stays whole.

    The mesh follows the towers' device; torch's default would follow the machine's accelerator.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    whole = {p for name, p in towers.model.named_parameters() if is_outside(name)}
    mesh = init_device_mesh(towers.mean.device.type, (world(),))
    bf16 = (
        mesh.device_type == "cuda" and towers.precision == "bf16"
    )  # half of what is gathered; fp32 reductions
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for module in towers.model.modules():
        if type(module).__name__ in ("ResidualAttentionBlock", "Block"):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(towers, mesh=mesh, mp_policy=policy, ignored_params=whole, reshard_after_forward=False)


def unsynced(module: nn.Module) -> AbstractContextManager[object]:
    """Return a context in which DDP adds gradients up on each rank and does not average them yet."""
    no_sync = getattr(module, "no_sync", None)
    return cast("AbstractContextManager[object]", no_sync()) if no_sync else nullcontext()


def full_state_dict(
    model: nn.Module, optimiser: torch.optim.Optimizer | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return whole tensors of a sharded model and its optimiser, on the CPU of rank 0 (elsewhere nothing)."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors = get_model_state_dict(model, options=options)
    state = {} if optimiser is None else get_optimizer_state_dict(model, optimiser, options=options)
    return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}, dict(state)


def load_full_state_dict(
    model: nn.Module, optimiser: torch.optim.Optimizer, tensors: dict[str, Any], state: dict[str, Any]
) -> None:
    """Give each rank its shards of whole tensors that every rank has read."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, tensors, options=options)
    set_optimizer_state_dict(model, optimiser, state, options=options)


def local_shard(value: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor; a whole one as it is."""
    to_local = getattr(value, "to_local", None)
    return cast("Tensor", value if to_local is None else to_local())
