"""Everything a run is, on disk, so that a run killed at any step goes on to the same bytes.

The sampler and the augmentations are functions of (seed, epoch, item), so the step number is their whole state; the
rest is weights, optimiser, moving average, gradient scaler and the global random generators.
"""

import random
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clipmerge.checkpoint.output import whole_file
from clipmerge.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = [
    "StoppedBySignalError",
    "generators",
    "interruptions",
    "load_state",
    "restore_generators",
    "save_state",
]


class StoppedBySignalError(TrainingError):
    """A signal asked the run to stop; nothing is wrong with it."""


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write the state beside the last one, then take its place: there is a whole state at any time.

    Raises:
        OutputError: it cannot be written; the last one is still there.
    """
    with whole_file(path, fsync=True) as sibling, sibling.open("wb") as file:
        torch.save(dict(state), file)


def load_state(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a run with these settings.

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
        shown = ", ".join(f"{key} was {before.get(key)!r}, is {settings.get(key)!r}" for key in changed)
        raise TrainingError(
            f"{path} belongs to a run with other settings: {shown}",
            hint="use the settings it was started with, or start again with --force",
        )
    return state


def generators() -> dict[str, Any]:
    """The state of every global random generator of this process, as plain numbers and tensors."""
    version, numbers, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = legacy
    return {
        "python": (version, numbers, gauss),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_generators(state: Mapping[str, Any]) -> None:
    """Put every global random generator back to where `generators` found it."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def interruptions() -> "Iterator[Callable[[], str | None]]":
    """Within, SIGTERM and Ctrl-C are remembered instead of ending the process at once.

    What is yielded says which came, or None. A second Ctrl-C acts as always. Threads other than the main one may
    not handle signals: there nothing is remembered.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    came: list[str] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(signal.Signals(number).name)
        signal.signal(number, before[signal.Signals(number)] or signal.SIG_DFL)

    for number in before:
        signal.signal(number, remember)
    try:
        yield lambda: came[0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
