"""What a run leaves on disk: the checkpoint, held-out scores, the best and the trajectory, the saved state."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipmerge.checkpoint.output import make_folder
from clipmerge.distributed import broadcast_object, is_first
from clipmerge.errors import OutputError, TrainingError
from clipmerge.finetuning.log import Log
from clipmerge.finetuning.settings import Settings
from clipmerge.finetuning.state import TrainingState, read_state, write_state
from clipmerge.model import ModelSpec
from clipmerge.weights.record import FORMAT, write_record
from clipmerge.weights.weights import from_state_dict

__all__ = ["Checkpoints", "Files"]


@dataclass(frozen=True)
class Files:
    """The names of a run's files, all beside the checkpoint `out`."""

    out: Path

    def beside(self, what: str) -> Path:
        """ft.safetensors, "best" → ft.run/ft.best.safetensors: `*.safetensors` means the results of runs alone."""
        return self.out.with_name(f"{self.out.stem}.run") / f"{self.out.stem}.{what}{self.out.suffix}"

    @property
    def state(self) -> Path:
        return self.out.with_name(f"{self.out.stem}.state")

    @property
    def log(self) -> Path:
        return self.out.with_name(f"{self.out.stem}.log.jsonl")

    def check(self, *, force: bool, resume: bool) -> None:
        """Refuse what would be overwritten.

        Raises:
            OutputError: the checkpoint exists, has another format, or its folder cannot be written to.
            TrainingError: an unfinished run is there.
        """
        if self.out.suffix != ".safetensors":
            hint = "checkpoints are written as safetensors"
            raise OutputError(f"{self.out} does not end in .safetensors", hint=hint)
        if self.out.exists() and not force:
            raise OutputError(f"{self.out} exists", hint="choose another name, or replace it with --force")
        if self.state.exists() and not (force or resume):
            hint = "--resume goes on from it, --force starts over"
            raise TrainingError(f"{self.state} is the state of an unfinished run", hint=hint)
        make_folder(self.out.parent)


@dataclass
class Checkpoints:
    """Score and keep what training has made after so many steps. All ranks call it, rank 0 writes.

    Attributes:
        steps: of the whole run.
        identity: what a state must agree on to be resumed.
        training: the hyperparameters, recorded in every checkpoint; `metadata` is the caller's own.
        prompts: what the checkpoint will be prompted with, as `weights.record.prompts_of` reads it.
        score: returns held-out scores of the model as it is; None where there is no held-out split.
        best: the best held-out scores so far and their step; `last` those of the last scored step.
    """

    files: Files
    state: TrainingState
    log: Log
    settings: Settings
    steps: int
    steps_per_epoch: int
    identity: Mapping[str, Any]
    training: Mapping[str, Any]
    metadata: Mapping[str, Any]
    prompts: Sequence[Mapping[str, Any]]
    spec: ModelSpec
    score: Callable[[], Mapping[str, float]] | None
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    def due(self, step: int) -> bool:
        """Return whether something is to be scored or kept after so many steps."""
        return self._score_due(step) or self._on_trajectory(step)

    def _score_due(self, step: int) -> bool:
        every = self.steps_per_epoch if self.settings.score_every is None else self.settings.score_every
        return self.score is not None and (step == self.steps or (every > 0 and step % every == 0))

    def _on_trajectory(self, step: int) -> bool:
        count = self.settings.trajectory
        return step in (round(self.steps * i / count) for i in range(1, count + 1))

    def save_due(self, step: int) -> bool:
        """Return whether the state is to be saved after so many steps."""
        every = self._save_every()
        return every > 0 and step % every == 0 and step < self.steps

    def _save_every(self) -> int:
        every = self.settings.save_every
        return max(self.steps_per_epoch, 100) if every is None else every

    def after(self, step: int) -> None:
        """Score, keep the best, keep the trajectory; where each is due."""
        scores: dict[str, float] = {}
        with self._average():
            if self.score is not None and self._score_due(step):
                scores = broadcast_object(dict(self.score()))  # or ranks might not agree on which is the best
                self._remember(step, scores)
            if self._on_trajectory(step) and step != self.steps:
                self.write(self.files.beside(f"step{step:06d}"), step, scores)

    def _remember(self, step: int, scores: dict[str, float]) -> None:
        self.last = scores
        self.log("score", step, **scores)
        by = self.settings.select_by or ("loss" if self.settings.shots is not None else "top1")
        sign = -1 if by == "loss" else 1
        if not self.best or sign * scores[by] > sign * self.best[by]:
            self.best = {**scores, "step": step}
            self.write(self.files.beside("best"), step, scores)

    def finish(self) -> Path:
        """Write the last checkpoint, put the selected one in its place, and drop the state of a finished run."""
        select = self.settings.select or ("last" if self.settings.shots is None else "best")
        best, last = self.files.beside("best"), self.files.out
        last_is_best = self.score is None or self.best.get("step") == self.steps
        if select == "best" and not last_is_best:
            last = self.files.beside("last")
        with self._average():
            self.write(last, self.steps, self.last)
        if is_first():
            if last_is_best:
                best.unlink(missing_ok=True)
            elif select == "best":
                best.replace(self.files.out)
            self.files.state.unlink(missing_ok=True)
            with suppress(OSError):  # something is kept in it, or it never was
                best.parent.rmdir()
        return self.files.out

    def _average(self) -> Any:
        return nullcontext() if self.state.average is None else self.state.average.swapped_in()

    def write(self, path: Path, step: int, scores: Mapping[str, float] | None = None) -> None:
        """Write a checkpoint with the model's and the training's record."""
        tensors = self.state.model_tensors()
        if is_first():
            path.parent.mkdir(exist_ok=True)
            about = {"model": self.spec.to_metadata(), "prompts": [dict(entry) for entry in self.prompts]}
            record = write_record({"format": FORMAT, "total": 1, **about})
            training = {**self.training, "step": step} | ({"scores": dict(scores)} if scores else {})
            weights = from_state_dict(tensors, "trained", record)
            weights.save(path, metadata={**self.metadata, "training": training}, force=True)
        self.log("written", step, file=path.name)

    def save(self, step: int) -> Path | None:
        """Save the state after so many steps; None where states are not saved."""
        if self._save_every() == 0:
            return None
        state = self.state.to_dict()
        if is_first():
            run = {"settings": dict(self.identity), "step": step, "best": self.best, "last": self.last}
            write_state(self.files.state, {**run, **state})
            self.log("saved", step, file=self.files.state.name)
        return self.files.state

    def resume(self) -> int:
        """Put everything back to where the state was saved. Returns the number of steps done.

        Raises:
            TrainingError: there is no state, or it is another run's.
        """
        state = read_state(self.files.state, self.identity)
        self.state.restore(state)
        self.best, self.last = state["best"], state["last"]
        return int(state["step"])
