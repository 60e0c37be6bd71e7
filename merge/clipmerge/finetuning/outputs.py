"""The files of a run: the checkpoint, and what stands beside it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipmerge.errors import OutputError, TrainingError

if TYPE_CHECKING:
    from torch import Tensor

    from clipmerge.model import ModelSpec

__all__ = ["Outputs"]


@dataclass(frozen=True)
class Outputs:
    """Paths beside `out`, and how a checkpoint is written to one of them.

    Attributes:
        training: the hyperparameters, recorded in every checkpoint.
        writer: False on ranks other than the first, which write nothing.
    """

    out: Path
    spec: "ModelSpec"
    training: Mapping[str, Any]
    metadata: Mapping[str, Any]
    writer: bool = True

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
            OutputError: the checkpoint exists, or is in no folder. TrainingError: an unfinished run is there.
        """
        if self.out.suffix != ".safetensors":
            raise OutputError(
                f"{self.out} does not end in .safetensors", hint="checkpoints are written as safetensors"
            )
        if self.out.exists() and not force:
            raise OutputError(f"{self.out} exists", hint="choose another name, or replace it with --force")
        if self.state.exists() and not (force or resume):
            raise TrainingError(
                f"{self.state} is the state of an unfinished run",
                hint="--resume goes on from it, --force starts over",
            )
        self.out.parent.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, tensors: "Mapping[str, Tensor]", **found: Any) -> None:
        """Write the tensors with the model's and the training's record; `found` adds step and scores to it."""
        if not self.writer:
            return
        from clipmerge.weights.record import FORMAT, write_record
        from clipmerge.weights.weights import from_state_dict

        record = {"format": FORMAT, "total": 1, "model": self.spec.to_metadata()}
        path.parent.mkdir(exist_ok=True)
        weights = from_state_dict(tensors, "trained", write_record(record))
        extra = {**self.metadata, "training": {**self.training, **found}}
        weights.save(path, metadata=extra, force=True)
