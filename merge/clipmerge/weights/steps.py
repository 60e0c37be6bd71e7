"""What a merge computes: one step for each output tensor. Made by `plan`, computed by `run`."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from clipmerge.checkpoint.tensors import Checkpoint, Tensor
from clipmerge.dtypes import ITEMSIZE
from clipmerge.weights.expression import Leaf

Kind = Literal["sum", "agree", "largest", "computed"]


@dataclass(frozen=True, slots=True)
class Step:
    """One output tensor.

    Attributes:
        kind: "sum" is Σ factor·input / divisor; "agree" copies integers that must be equal everywhere;
            "largest" is a mean's step counters; "computed" needs whole tensors (a nonlinear method).
        terms: (factor, stored tensor), in an order that depends on the contents alone.
        sources: the checkpoint of each term; every checkpoint that a "computed" step reads.
        leaves: of a "computed" step: (coefficient, leaf).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: Kind
    terms: tuple[tuple[float, Tensor], ...]
    divisor: float
    sources: tuple[Checkpoint, ...]
    leaves: tuple[tuple[float, Leaf], ...] = ()

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Plan:
    """Every output tensor by name, what is read for them, and the size of the work in bytes."""

    steps: Mapping[str, Step]
    checkpoints: tuple[Checkpoint, ...]
    read_bytes: int
    written_bytes: int

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The outputs' names, dtypes and shapes; their bytes are nowhere yet."""
        return {name: Tensor(step.dtype, step.shape, ()) for name, step in self.steps.items()}
