"""The training loop: one, for every method, on one device or many."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from clipmerge.distributed import any_rank, average_gradients, world
from clipmerge.errors import TrainingError
from clipmerge.finetuning.batches import Batch, Sampler
from clipmerge.finetuning.loader import Loader
from clipmerge.finetuning.log import Log
from clipmerge.finetuning.objective import Objective
from clipmerge.finetuning.optimiser import (
    CLAMP,
    MovingAverage,
    clip_gradients,
    learning_rate,
    set_learning_rate,
)
from clipmerge.finetuning.resume import StoppedBySignalError, interruptions
from clipmerge.finetuning.towers import is_outside, unsynced
from clipmerge.types import Progress

__all__ = ["train"]


def train(
    objective: Objective,
    module: nn.Module,
    trained: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    sampler: Sampler,
    loader: Loader,
    log: Log,
    *,
    start: int,
    steps: int,
    lr: float,
    warmup: int,
    clip_grad: float | None = None,
    clamp: bool = False,
    average: MovingAverage | None = None,
    scaler: torch.amp.GradScaler | None = None,
    synced: bool = False,
    sharded: bool = False,
    log_every: int = 10,
    due: Callable[[int], bool] = lambda step: False,
    after: Callable[[int], None] = lambda step: None,
    save: Callable[[int], Path | None] = lambda step: None,
    save_at: Callable[[int], bool] = lambda step: False,
    on_progress: "Progress | None" = None,
) -> None:
    """Steps `start` … `steps` - 1.

    Args:
        module, trained: the wrapped towers, and every parameter that the optimiser has.
        synced: the module averages its gradients itself (DDP); `sharded`: FSDP does.
        after: called where `due` says so with the number of steps done: held-out scores, trajectory.
        save: writes the state after so many steps; called where `save_at` says so and when a signal came.

    Raises:
        TrainingError: the loss is not finite.
        StoppedBySignalError: a signal asked to stop; the state is saved.
    """
    outside = [p for name, p in trained.items() if not (synced or sharded) or is_outside(name)]
    watch = Watch(loader.split.names, log, every=log_every, steps=steps, images=sampler.batch * sampler.micro)
    source = loader(sampler.batches(start, steps))
    with interruptions() as interrupted:
        for step in range(start, steps):
            rate = learning_rate(step, peak=lr, warmup=warmup, steps=steps)
            set_learning_rate(optimiser, rate)
            micro = list(_backward(objective, module, source, sampler.micro, scaler))
            average_gradients(outside)
            if scaler is not None:
                scaler.unscale_(optimiser)
            if clip_grad is not None:
                clip_gradients(trained.values(), clip_grad)
            if scaler is None:
                optimiser.step()
            else:
                scaler.step(optimiser)
                scaler.update()
            optimiser.zero_grad(set_to_none=True)
            if clamp:
                _clamp(trained)
            if average is not None:
                average.update()
            watch.saw(step, rate, micro, loader.waited)
            if on_progress is not None:
                on_progress("steps", step + 1, steps)
            if due(step + 1):
                watch.check(loader.waited)  # nothing that is not finite is scored or kept
                after(step + 1)
            stop = any_rank(interrupted() is not None) if _may_ask(step, log_every) else False
            if stop or save_at(step + 1):
                watch.check()
                saved = save(step + 1)
                if stop and step + 1 < steps:
                    raise StoppedBySignalError(
                        f"stopped by {interrupted() or 'another rank'} after step {step + 1} of {steps}; "
                        + (
                            f"everything is saved in {saved}" if saved else "nothing was saved: saving is off"
                        ),
                        hint="the same command with --resume goes on from there" if saved else None,
                    )
    watch.check()


def _may_ask(step: int, every: int) -> bool:
    """One process looks at each step; several agree now and then, since asking costs a round trip."""
    return world() == 1 or step % every == every - 1


def _backward(
    objective: Objective,
    module: nn.Module,
    source: Iterator[tuple[Batch, Tensor]],
    count: int,
    scaler: torch.amp.GradScaler | None,
) -> Iterator[tuple[Batch, Tensor]]:
    """One step's micro-batches; their gradients are averaged, and ranks meet at the last one only."""
    for i, (batch, pixels) in enumerate(islice(source, count)):
        with unsynced(module) if i < count - 1 else nullcontext():
            loss = objective.backward(
                batch, pixels, lambda x: (scaler.scale(x) if scaler is not None else x) / count
            )
        yield batch, loss


def _clamp(trained: Mapping[str, nn.Parameter]) -> None:
    if "logit_scale" in trained:
        with torch.no_grad():
            trained["logit_scale"].clamp_(0, CLAMP)


@dataclass
class Watch:
    """Losses stay on the device until a line is due: reading each would make the GPU wait for the host."""

    names: Sequence[str]
    log: Log
    every: int
    steps: int
    images: int
    began: float = field(default_factory=perf_counter)
    waited: float = 0.0
    seen: list[tuple[int, float, list[Batch], Tensor]] = field(default_factory=list)

    def saw(self, step: int, lr: float, micro: Sequence[tuple[Batch, Tensor]], waited: float) -> None:
        """Remember a step; every so often write a line."""
        self.seen.append((step, lr, [b for b, _ in micro], torch.stack([loss for _, loss in micro]).mean()))
        if len(self.seen) >= self.every:
            self.check(waited)

    def check(self, waited: float | None = None) -> None:
        """Look at the losses since the last look.

        Raises:
            TrainingError: one is not finite; the first is named with its items.
        """
        if not self.seen:
            return
        losses = torch.stack([loss for *_, loss in self.seen]).tolist()
        for (step, lr, batches, _), loss in zip(self.seen, losses, strict=True):
            if loss != loss or abs(loss) == float("inf"):
                raise self._not_finite(step, lr, batches, loss)
        step, lr, _, _ = self.seen[-1]
        seconds = perf_counter() - self.began
        line: dict[str, Any] = {"loss": sum(losses) / len(losses), "lr": lr, "steps": self.steps}
        line["images_per_second"] = len(self.seen) * self.images / seconds
        line["seconds_left"] = (self.steps - step - 1) * seconds / len(self.seen)
        if waited is not None:
            line["waiting"] = (waited - self.waited) / seconds
            self.waited = waited
        self.log("step", step + 1, **line)
        self.seen.clear()
        self.began = perf_counter()

    def _not_finite(self, step: int, lr: float, batches: Sequence[Batch], loss: float) -> TrainingError:
        items = [self.names[i] for batch in batches for i in batch.items]
        shown = ", ".join(items[:8]) + (f" and {len(items) - 8} more" if len(items) > 8 else "")
        self.log("stopped", step + 1, loss=str(loss), lr=lr, items=items)
        return TrainingError(
            f"the loss is {loss} at step {step + 1} with learning rate {lr:.3g}, on {shown}",
            hint="look at these images; else lower --lr, use --clip-grad 1, or --precision fp32",
        )
