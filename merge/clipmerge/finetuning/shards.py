"""State dicts of a model that FSDP2 has sharded: gathered whole for files, cut again when read."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["load_whole", "local", "whole"]


def whole(
    model: nn.Module, optimiser: torch.optim.Optimizer | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Whole tensors on the CPU of rank 0 (elsewhere nothing), of the model and of the optimiser."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors = get_model_state_dict(model, options=options)
    state = {} if optimiser is None else get_optimizer_state_dict(model, optimiser, options=options)
    return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}, dict(state)


def load_whole(
    model: nn.Module, optimiser: torch.optim.Optimizer, tensors: dict[str, Any], state: dict[str, Any]
) -> None:
    """Each rank takes its shards of whole tensors that every rank has read."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, tensors, options=options)
    set_optimizer_state_dict(model, optimiser, state, options=options)


def local(value: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a whole one as it is."""
    to_local = getattr(value, "to_local", None)
    found: Tensor = value if to_local is None else to_local()
    return found
