"""Everything that a run is while it goes, so that one that was killed goes on to the same bytes.

The sampler and the augmentations are functions of (seed, epoch, item), so the step number is their whole state; the
rest is weights, optimiser, moving average, gradient scaler and torch's generators.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from clipmerge.checkpoint.output import whole_file
from clipmerge.distributed import gather_object, rank
from clipmerge.errors import TrainingError
from clipmerge.finetuning.optimiser import MovingAverage, adamw
from clipmerge.finetuning.settings import Settings
from clipmerge.finetuning.towers import (
    Towers,
    full_state_dict,
    load_full_state_dict,
    local_shard,
    trained_parameters,
)

__all__ = ["Generators", "TrainingState", "generators", "read_state", "restore_generators", "write_state"]

Generators: TypeAlias = tuple[Tensor, Tensor | None]


def generators(device: torch.device) -> Generators:
    """Return the states of torch's generators that this process draws from: the CPU's, and its own GPU's."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def restore_generators(state: Generators) -> None:
    """Put the generators back to where `generators` found them; on a machine without a GPU only the CPU's."""
    torch.set_rng_state(state[0])
    if state[1] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[1])


@dataclass
class TrainingState:
    """What training changes.

    Attributes:
        trained: the parameters that the optimiser has, by name.
        sharded: whether FSDP has cut the model: states then hold whole tensors, so that any process can read them.
    """

    model: nn.Module
    trained: Mapping[str, nn.Parameter]
    optimiser: torch.optim.Optimizer
    device: torch.device
    average: MovingAverage | None = None
    scaler: torch.amp.GradScaler | None = None
    sharded: bool = False

    @classmethod
    def begin(cls, towers: Towers, settings: Settings) -> "TrainingState":
        """Return the state before the first step."""
        trained, device = trained_parameters(towers.model), towers.mean.device
        optimiser = adamw(trained, lr=settings.lr, wd=settings.wd, decay=settings.decay)
        average = None if settings.ema is None else MovingAverage(trained.values(), settings.ema)
        scaler = torch.amp.GradScaler(device.type) if towers.precision == "fp16" else None
        return cls(towers.model, trained, optimiser, device, average, scaler, settings.fsdp)

    def model_tensors(self) -> dict[str, Tensor]:
        """Return the model's tensors; of a sharded one on rank 0 only. All ranks call it."""
        return full_state_dict(self.model)[0] if self.sharded else dict(self.model.state_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return everything; whole on rank 0. All ranks call it."""
        if self.sharded:
            model, optimiser = full_state_dict(self.model, self.optimiser)
        else:
            model, optimiser = dict(self.model.state_dict()), self.optimiser.state_dict()
        # A CUDA tensor that travels pickled would make a context on its own GPU in the process that reads it.
        average = [local_shard(value).cpu() for value in self.average.values] if self.average else []
        return {
            "model": model,
            "optimiser": optimiser,
            "average": gather_object(average) if self.sharded else [average],
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "random": gather_object(generators(self.device)),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put everything back to where `to_dict` found it."""
        if self.sharded:
            load_full_state_dict(self.model, self.optimiser, state["model"], state["optimiser"])
        else:
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
        if self.average is not None:
            saved = state["average"][rank() if self.sharded else 0]
            for value, before in zip(self.average.values, saved, strict=True):
                local_shard(value).copy_(before)
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        restore_generators(state["random"][rank()])


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write the state in place of the last one: there is a whole one at any time, also after a loss of power.

    Raises:
        OutputError: it cannot be written; the last one is still there.
    """
    with whole_file(path, fsync=True) as sibling:
        torch.save(dict(state), sibling)


def read_state(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a run with these settings.

    Raises:
        TrainingError: there is none, it cannot be read, or it belongs to a run with other settings.
    """
    if not path.exists():
        raise TrainingError(f"there is nothing to resume: {path} does not exist", hint="leave out --resume")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        before = dict(state["settings"])
    except Exception as error:
        raise TrainingError(
            f"{path} is no training state: {error}", hint="remove it and start again with --force"
        ) from error
    changed = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
    if changed:
        differences = ", ".join(f"{key} was {before.get(key)!r}, is {settings.get(key)!r}" for key in changed)
        raise TrainingError(
            f"{path} belongs to a run with other settings: {differences}",
            hint="use the settings it was started with, or start again with --force",
        )
    return state
