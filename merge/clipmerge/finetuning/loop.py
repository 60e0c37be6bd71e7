"""The training loop: one, for every method, on one device or many."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from types import FrameType

import torch
from torch import Tensor

from clipmerge.distributed import AnyRank, average_gradients, world
from clipmerge.errors import TrainingError
from clipmerge.finetuning.batches import Batch, Sampler
from clipmerge.finetuning.checkpointing import Checkpoints
from clipmerge.finetuning.images import Loader
from clipmerge.finetuning.log import StepLog
from clipmerge.finetuning.objective import Objective
from clipmerge.finetuning.optimiser import LOG_SCALE_LIMIT, clip_gradients, learning_rate, set_learning_rate
from clipmerge.finetuning.settings import Settings
from clipmerge.finetuning.state import TrainingState
from clipmerge.finetuning.towers import is_outside, unsynced
from clipmerge.types import Progress

__all__ = ["StoppedBySignalError", "train_steps"]


PATIENCE = 10.0
"""Seconds within which one of several ranks must come to the end of a step after SIGTERM."""


class StoppedBySignalError(TrainingError):
    """A signal asked the run to stop; nothing is wrong with it.

    Attributes:
        exit_code: what a command that ends by it returns, 128 plus the signal's number.
    """

    exit_code = 128 + signal.SIGTERM


def train_steps(
    objective: Objective,
    state: TrainingState,
    sampler: Sampler,
    loader: Loader,
    checkpoints: Checkpoints,
    settings: Settings,
    first: int,
    on_progress: Progress | None = None,
) -> None:
    """Take steps `first` … `checkpoints.steps` - 1; where there is none to take, score what there is.

    Raises:
        TrainingError: the loss is not finite.
        StoppedBySignalError: a signal asked to stop; the state is saved.
    """
    steps, optimiser, scaler = checkpoints.steps, state.optimiser, state.scaler
    if steps == 0:
        checkpoints.after(0)
    warmup = min(500, steps // 10) if settings.warmup is None else settings.warmup
    wrapped = state.sharded or hasattr(objective.module, "no_sync")  # these average what is inside
    unaveraged = [p for name, p in state.trained.items() if not wrapped or is_outside(name)]
    every = 10 if state.device.type == "cuda" else 1
    losses = StepLog(checkpoints.log, loader.split.names, every, steps, sampler.batch * sampler.micro)
    source = loader(sampler.batches(first, steps))
    with interruptions() as interrupted, AnyRank() as any_rank:
        for step in range(first, steps):
            rate = learning_rate(step, peak=settings.lr, warmup=warmup, steps=steps)
            set_learning_rate(optimiser, rate)
            micro = _backward(objective, islice(source, sampler.micro), sampler.micro, scaler)
            average_gradients(unaveraged)
            if scaler is not None:
                scaler.unscale_(optimiser)
            if settings.clip_grad:
                clip_gradients(state.trained.values(), settings.clip_grad)
            if scaler is None:
                optimiser.step()
            else:
                scaler.step(optimiser)
                scaler.update()
            optimiser.zero_grad(set_to_none=True)
            if settings.logit_scale == "clamped" and "logit_scale" in state.trained:
                with torch.no_grad():
                    state.trained["logit_scale"].clamp_(0, LOG_SCALE_LIMIT)
            if state.average is not None:
                state.average.update()
            losses.add(step, rate, micro, loader.waited)
            if on_progress is not None:
                on_progress("steps", step + 1, steps)
            if checkpoints.due(step + 1):
                losses.check(loader.waited)  # nothing that is not finite is scored or kept
                checkpoints.after(step + 1)
            stop = any_rank(interrupted() is not None)
            if stop or checkpoints.save_due(step + 1):
                losses.check()
                saved = checkpoints.save(step + 1)
                if stop and step + 1 < steps:
                    what = f"everything is saved in {saved}" if saved else "nothing was saved: saving is off"
                    number = interrupted()
                    error = StoppedBySignalError(
                        f"stopped by {number or 'another rank'} after step {step + 1} of {steps}; {what}",
                        hint="the same command with --resume goes on from there" if saved else None,
                    )
                    error.exit_code = 128 + signal.Signals[number or "SIGTERM"]
                    raise error
    losses.check()


def _backward(
    objective: Objective,
    batches: Iterator[tuple[Batch, Tensor]],
    count: int,
    scaler: torch.amp.GradScaler | None,
) -> list[tuple[Batch, Tensor]]:
    """Add up the gradients of a step's micro-batches, averaged over them; ranks meet at the last one only."""
    losses = []
    for i, (batch, pixels) in enumerate(batches):
        with unsynced(objective.module) if i < count - 1 else nullcontext():
            loss = objective.backward(
                batch, pixels, lambda x: (x if scaler is None else scaler.scale(x)) / count
            )
        losses.append((batch, loss))
    return losses


@contextmanager
def interruptions() -> Iterator[Callable[[], str | None]]:
    """Remember SIGTERM and Ctrl-C, instead of ending the process at once.

    Yields a function that returns which came, or None. A second one acts as always, and so does the first one if nobody
    asks within seconds: torchrun sends SIGTERM to ranks that wait, perhaps for ever, for one that has died. Threads
    other than the main one may not handle signals: there nothing is remembered.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    came: list[str] = []
    timers: list[threading.Timer] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(signal.Signals(number).name)
        signal.signal(number, before[signal.Signals(number)] or signal.SIG_DFL)
        if world() > 1:
            timers.append(threading.Timer(PATIENCE, os.kill, (os.getpid(), number)))
            timers[-1].daemon = True
            timers[-1].start()

    def asked() -> str | None:
        for timer in timers:
            timer.cancel()
        return came[0] if came else None

    for number in before:
        signal.signal(number, remember)
    try:
        yield asked
    finally:
        asked()
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
