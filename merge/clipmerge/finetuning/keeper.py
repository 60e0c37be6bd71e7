"""What is kept of a run while it goes: held-out scores, the best checkpoint, the trajectory, the state."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipmerge.distributed import all_gather_object, rank
from clipmerge.finetuning.log import Log
from clipmerge.finetuning.optimiser import MovingAverage
from clipmerge.finetuning.outputs import Outputs
from clipmerge.finetuning.resume import generators, load_state, restore_generators, save_state
from clipmerge.finetuning.shards import load_whole, local, whole

__all__ = ["Keeper"]

Score = Callable[[], Mapping[str, float]]


@dataclass
class Keeper:
    """Called with the number of steps done.

    Attributes:
        score: held-out scores of the model as it is; None where there is no held-out split.
        by: "top1" (higher is better) or "loss" (lower is): what makes a checkpoint the best.
        trajectory: steps whose checkpoints are kept.
        settings: what a state must agree on to be resumed.
    """

    outputs: Outputs
    model: nn.Module
    optimiser: torch.optim.Optimizer
    log: Log
    steps: int
    settings: Mapping[str, Any]
    average: MovingAverage | None = None
    scaler: torch.amp.GradScaler | None = None
    score: Score | None = None
    score_every: int = 0
    by: str = "top1"
    save_every: int = 0
    trajectory: frozenset[int] = frozenset()
    sharded: bool = False
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    def due(self, step: int) -> bool:
        """Whether something is to be scored or kept after so many steps."""
        return self._score_due(step) or step in self.trajectory

    def _score_due(self, step: int) -> bool:
        whole = step == self.steps or (self.score_every > 0 and step % self.score_every == 0)
        return self.score is not None and whole

    def after(self, step: int) -> None:
        """Score, keep the best, keep the trajectory; where each is due."""
        due = self._score_due(step)
        with self._averaged():
            if due and self.score is not None:
                self._scored(step, dict(self.score()))
            if step in self.trajectory and step != self.steps:
                self._write(self.outputs.beside(f"step{step:06d}"), step, self.last if due else {})

    def _scored(self, step: int, found: dict[str, float]) -> None:
        self.last = found
        self.log("score", step, **found)
        better = not self.best or (
            found[self.by] < self.best[self.by] if self.by == "loss" else found[self.by] > self.best[self.by]
        )
        if better:
            self.best = {**found, "step": step}
            self._write(self.outputs.beside("best"), step, found)

    def finish(self, select: str) -> Path:
        """Write the last checkpoint, put the selected one in its place, and drop the state of a finished run."""
        out = self.outputs.out
        best = self.outputs.beside("best")
        with self._averaged():
            if self.score is None or self.best.get("step") == self.steps:
                self._write(out, self.steps, self.last)
                if self.outputs.writer:
                    best.unlink(missing_ok=True)
            elif select == "best":
                self._write(self.outputs.beside("last"), self.steps, self.last)
                if self.outputs.writer:
                    best.replace(out)
            else:
                self._write(out, self.steps, self.last)
        if self.outputs.writer:
            self.outputs.state.unlink(missing_ok=True)
            with suppress(OSError):  # something is kept in it, or it never was
                best.parent.rmdir()
        return out

    def _averaged(self) -> AbstractContextManager[None]:
        return self.average.swapped_in() if self.average is not None else nullcontext()

    def _write(self, path: Path, step: int, scores: Mapping[str, float]) -> None:
        self.outputs.write(path, self._tensors(), step=step, **({"scores": dict(scores)} if scores else {}))
        self.log("written", step, file=path.name)

    def _tensors(self) -> dict[str, Tensor]:
        return whole(self.model)[0] if self.sharded else dict(self.model.state_dict())

    def save_due(self, step: int) -> bool:
        """Whether the state is due after so many steps."""
        return bool(self.save_every) and step % self.save_every == 0 and step < self.steps

    def save(self, step: int) -> Path | None:
        """Write the state after so many steps; None where states are not kept."""
        if self.save_every == 0:
            return None
        random = all_gather_object(generators())
        values = [local(value) for value in self.average.values] if self.average is not None else []
        average = all_gather_object(values) if self.sharded else [values]
        model, optimiser = (
            whole(self.model, self.optimiser)
            if self.sharded
            else (dict(self.model.state_dict()), self.optimiser.state_dict())
        )
        if self.outputs.writer:
            state = {
                "settings": dict(self.settings),
                "step": step,
                "model": model,
                "optimiser": optimiser,
                "average": average,
                "scaler": self.scaler.state_dict() if self.scaler is not None else {},
                "random": random,
                "best": self.best,
                "last": self.last,
            }
            save_state(self.outputs.state, state)
            self.log("saved", step, file=self.outputs.state.name)
        return self.outputs.state

    def resume(self) -> int:
        """Put everything back to where the state was written; the number of steps done.

        Raises:
            TrainingError: there is no state, or it is another run's.
        """
        state = load_state(self.outputs.state, self.settings)
        if self.sharded:
            load_whole(self.model, self.optimiser, state["model"], state["optimiser"])
        else:
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
        if self.average is not None:
            average = state["average"][rank() if self.sharded else 0]
            for value, kept in zip(self.average.values, average, strict=True):
                local(value).copy_(kept)
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        restore_generators(state["random"][rank()])
        self.best, self.last = state["best"], state["last"]
        return int(state["step"])
