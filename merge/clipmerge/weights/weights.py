"""`Weights`: a lazy linear expression over checkpoints, the one value type of the library.

Nothing is read until it is saved, loaded into a model or asked for its tensors. Whatever is written with
`+ - *` collapses at once to one coefficient for each checkpoint, so that the longest expression is still
one streaming weighted sum that reads every input once.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakValueDictionary

from clipmerge.checkpoint.tensors import Checkpoint, Extent, Tensor, identifiers
from clipmerge.errors import CheckpointError, MismatchError, RecipeError
from clipmerge.types import Progress
from clipmerge.weights.coefficient import Coefficient, Scalar, number_text
from clipmerge.weights.record import model_record, read_record

if TYPE_CHECKING:
    import torch

    from clipmerge.weights.methods import Applied

    Leaf: TypeAlias = Checkpoint | Applied

_TOLERANCE = Fraction(1, 10**6)
"""How far a total may be from 0 or 1: softmaxed coefficients sum to 1 only up to their own rounding."""


class Weights:
    """Σ coefficient · checkpoint.

    Attributes:
        terms: leaf (a checkpoint, or a nonlinear method's result) → coefficient, in the order written.
        base: the leaf that names dtypes, step counters and whatever a pattern leaves alone; None for a mean,
            where every input counts the same.
    """

    __slots__ = ("base", "terms")

    def __init__(self, terms: "Mapping[Leaf, Coefficient]", base: "Leaf | None") -> None:
        self.terms = {leaf: c for leaf, c in terms.items() if c}
        self.base = base if base is None or base in self.terms else next(iter(self.terms), None)

    # -- algebra -----------------------------------------------------------------------------------------

    def __add__(self, other: "Weights") -> "Weights":
        if not isinstance(other, Weights):
            return NotImplemented
        terms = dict(self.terms)
        for leaf, coefficient in other.terms.items():
            terms[leaf] = terms[leaf] + coefficient if leaf in terms else coefficient
        return Weights(terms, self.base if self.terms else other.base)

    def __mul__(self, factor: "Scalar | Mapping[str, float] | Coefficient") -> "Weights":
        if isinstance(factor, Weights):
            raise RecipeError("weights times weights means nothing", hint="multiply by a number or a mapping")
        by = Coefficient.of(factor)
        return Weights({leaf: c * by for leaf, c in self.terms.items()}, self.base)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Scalar) -> "Weights":
        by = Coefficient.of(divisor).constant
        if not by:
            raise RecipeError("weights cannot be divided by zero")
        return self * (1 / by)

    def __neg__(self) -> "Weights":
        return self * -1

    def __sub__(self, other: "Weights") -> "Weights":
        if not isinstance(other, Weights):
            return NotImplemented
        return self + -other

    def __repr__(self) -> str:
        from clipmerge.weights.notation import notation

        return notation(self)

    # -- what it is --------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Every checkpoint it reads, each once, in the order written."""
        found: dict[Checkpoint, None] = {}
        for leaf in self.terms:
            if isinstance(leaf, Checkpoint):
                found[leaf] = None
            else:
                found.update((c, None) for operand in leaf.operands for c in operand.checkpoints)
        return tuple(found)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensor names, sorted (those of the first checkpoint: all must have the same)."""
        return tuple(sorted(self.checkpoints[0].tensors)) if self.terms else ()

    @property
    def total(self) -> Fraction:
        """The sum of the coefficients, each times its leaf's own total: 1 is a model, 0 a task vector.

        Raises:
            RecipeError: per-name coefficients make the total differ between tensors.
        """
        summed = sum((c * Coefficient.of(leaf_total(leaf)) for leaf, c in self.terms.items()), _ZERO)
        if summed.constant is not None:
            return summed.constant
        values = {summed.at(name) for name in self.names}
        if max(values) - min(values) <= _TOLERANCE:
            return max(values)
        odd = next(n for n in self.names if summed.at(n) != summed.at(self.names[0]))
        raise RecipeError(
            f"the total is {number_text(summed.at(self.names[0]))} for {self.names[0]!r} "
            f"but {number_text(summed.at(odd))} for {odd!r}",
            hint="scale differences: base + {pattern: number}*(a - base)",
        )

    def kind(self) -> int:
        """1 for a model, 0 for a task vector.

        Raises:
            RecipeError: the total is neither.
        """
        total = self.total
        for kind in (1, 0):
            if abs(total - kind) <= _TOLERANCE:
                if not self.terms:
                    break
                return kind
        if not self.terms:
            raise RecipeError("every coefficient is zero: there is nothing to compute")
        count = len(self.terms)
        hint = "did you mean mean([...])?" if total == count else "did you mean base + scale*(a - base)?"
        shown = number_text(total) if total.denominator < 1000 else f"{float(total):.6g}"
        raise RecipeError(f"total is {shown}: neither a model (1) nor a task vector (0)", hint=hint)

    @property
    def record(self) -> dict[str, Any]:
        """What clipmerge wrote into the base's (or first checkpoint's) file: provenance, model; {} otherwise."""
        first = self.base if isinstance(self.base, Checkpoint) else next(iter(self.checkpoints), None)
        return read_record(first.metadata) if first else {}

    @property
    def model(self) -> dict[str, Any] | None:
        """The model record that the checkpoints carry: {"name", "config", "preprocess"}; None where none does.

        Raises:
            MismatchError: two checkpoints were made for different models.
        """
        found = [(checkpoint, model_record(checkpoint)) for checkpoint in self.checkpoints]
        known = [(checkpoint, model) for checkpoint, model in found if model is not None]
        for checkpoint, model in known[1:]:
            if model.get("config") != known[0][1].get("config"):
                raise MismatchError(
                    f"{known[0][0].path or known[0][0].name} was made for {known[0][1].get('name')}, "
                    f"{checkpoint.path or checkpoint.name} for {model.get('name')}",
                    hint="checkpoints of different models cannot be merged, even where the shapes agree",
                )
        # A configuration beside foreign weights (a Hub folder's) speaks only where no file of ours does.
        known = known or [(c, c.extra["model"]) for c in self.checkpoints if "model" in c.extra]
        # The base's own; among equals not the first listed, so that the order of a soup decides nothing.
        own = [model for checkpoint, model in known if checkpoint is self.base]
        return min(own or [m for _, m in known], key=lambda m: json.dumps(m, sort_keys=True), default=None)

    # -- what it becomes ---------------------------------------------------------------------------------

    def save(
        self,
        path: str | Path,
        *,
        force: bool = False,
        dtype: str | None = None,
        allow_nonfinite: bool = False,
        shard_size: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        digests: bool = True,
        fsync: bool = False,
        threads: int | None = None,
        on_progress: Progress | None = None,
    ) -> Path:
        """Write it as `.safetensors`, whole or not at all; the path that was written.

        Args:
            path: the file; with `shard_size` the index `<path>.index.json` stands beside the shards.
            force: replace a file that exists.
            dtype: "F32", "F16", "BF16" …; None keeps the base's, tensor by tensor.
            allow_nonfinite: let NaN and infinity through.
            shard_size: the largest number of bytes of one file.
            metadata: further keys of the file's record.
            digests: whether to record the parents' content digests, by which `verify` finds them.
            fsync: return only when the file is on the disk.
            threads: worker threads; None takes the cores this process may use, at most four.
            on_progress: called as (what, done, total).

        Raises:
            RecipeError: the total is neither 0 nor 1.
            MismatchError: the checkpoints do not fit together.
            NonFiniteError: an input holds NaN or infinity, or the output's dtype overflows.
            OutputError: the file exists, is an input, or cannot be written.
        """
        from clipmerge.weights.run import save

        return save(
            self, Path(path), force=force, dtype=dtype, allow_nonfinite=allow_nonfinite, shard_size=shard_size,
            metadata=metadata, digests=digests, fsync=fsync, threads=threads, on_progress=on_progress,
        )  # fmt: skip

    def state_dict(
        self, dtype: str | None = None, *, on_progress: Progress | None = None
    ) -> "dict[str, torch.Tensor]":
        """Computed tensors by open_clip's names, on the CPU, by the same pass as `save`."""
        from clipmerge.weights.into_torch import state_dict

        return state_dict(self, dtype, on_progress=on_progress)

    def load_into(self, module: "torch.nn.Module", *, strict: bool = True) -> "torch.nn.Module":
        """Write into the module's parameters and buffers in place, in their dtype and on their device.

        Raises:
            ModelError: names or shapes differ; all of them are listed. `strict=False` allows names that the
                module lacks (a head, say) and parameters that stay as they are.
            NonFiniteError, CheckpointError: an input holds NaN, or ends early; found while writing, so the module
                is then partly written: load into it again before it is used.
        """
        from clipmerge.weights.into_torch import load_into

        return load_into(self, module, strict=strict)

    def check_fit(self, module: "torch.nn.Module") -> None:
        """Whether `load_into` would do, from headers alone; the module may be on the meta device.

        Raises:
            ModelError: names or shapes differ; all of them are listed.
        """
        from clipmerge.weights.into_torch import check_fit

        check_fit(self, module.state_dict(keep_vars=True))


_ZERO = Coefficient({})


def leaf_total(leaf: "Leaf") -> Fraction:
    """1 for a point, 0 for a vector."""
    if isinstance(leaf, Checkpoint):
        return Fraction(int(read_record(leaf.metadata).get("total", 1)))
    return Fraction(leaf.total)


_opened: WeakValueDictionary[tuple[object, ...], Checkpoint] = WeakValueDictionary()


def load(path: str | Path, name: str | None = None) -> Weights:
    """The weights in a file or folder, lazily: only headers are read.

    Args:
        path: `.safetensors` (or an index, or a folder), `.pt`, `.bin`, `.pth`, `hf-hub:org/name`, `model:tag`.
        name: how notation calls it; by default the file's stem as an identifier.

    Raises:
        CheckpointError: missing, truncated, or not a checkpoint.
        UnsafeFileError: reading the file would need code to run.
    """
    from clipmerge.checkpoint.open import open_checkpoint

    checkpoint = open_checkpoint(path)
    stamps = checkpoint.stamps_now()
    checkpoint = replace(checkpoint, name=name or checkpoint.name, stamps=stamps)
    if stamps:
        checkpoint = _opened.setdefault((checkpoint.name, *stamps.values()), checkpoint)
    return Weights({checkpoint: Coefficient.of(1)}, checkpoint)


def load_all(paths: Sequence[str | Path]) -> list[Weights]:
    """`load` for each path, with distinct names whatever the files are called, in the order given.

    Names do not depend on that order: `a/model.safetensors` and `b/model.safetensors` are `model` and `model_2`.
    """
    opened = load_each([(path, None) for path in paths])
    order = sorted(range(len(opened)), key=lambda i: os.fspath(paths[i]))
    words = identifiers([opened[i].checkpoints[0].name for i in order])
    named = dict(zip(order, words, strict=True))
    out = []
    for i, weights in enumerate(opened):
        checkpoint = weights.checkpoints[0]
        out.append(weights if named[i] == checkpoint.name else load(paths[i], named[i]))
    return out


def load_each(files: "Sequence[tuple[str | Path, str | None]]") -> list[Weights]:
    """`load` for each (path, name).

    Raises:
        CheckpointError: some cannot be read; all of them are listed.
    """
    opened, failures = [], []
    for path, name in files:
        try:
            opened.append(load(path, name))
        except CheckpointError as error:
            failures.append(error)
    if len(failures) > 1:
        listed = "\n  ".join(failure.message for failure in failures)
        raise CheckpointError(
            f"{len(failures)} of {len(files)} checkpoints cannot be used:\n  {listed}", hint=failures[0].hint
        )
    if failures:
        raise failures[0]
    return opened


def from_state_dict(
    tensors: "Mapping[str, torch.Tensor]", name: str = "model", metadata: Mapping[str, str] | None = None
) -> Weights:
    """Weights over tensors in memory (copied to the CPU where they are elsewhere); no file is involved."""
    from clipmerge.weights.into_torch import tensor_bytes

    leaves = {}
    for key in sorted(tensors):
        dtype, shape, raw = tensor_bytes(key, tensors[key])
        leaves[key] = Tensor(dtype, shape, (Extent(raw, 0, raw.size),))
    checkpoint = Checkpoint(name, leaves, dict(metadata or {}))
    return Weights({checkpoint: Coefficient.of(1)}, checkpoint)


def interpolate(a: Weights, b: Weights, alpha: Scalar | Mapping[str, float] | Coefficient) -> Weights:
    """(1 - alpha)·a + alpha·b, tensor by tensor.

    Args:
        alpha: 0 is `a`, 1 is `b`; a mapping from name patterns gives each tensor its own, and a name that no
            pattern matches keeps `a`'s value.

    Source: Wortsman et al. 2022, arXiv 2109.01903 (WiSE-FT).
    """
    return Weights((a + (b - a) * alpha).terms, a.base)


def mean(weights: Iterable[Weights]) -> Weights:
    """The uniform soup: every ingredient with the same coefficient, in whatever order.

    Source: Wortsman et al. 2022, arXiv 2203.05482.

    Raises:
        RecipeError: there is nothing to average.
    """
    items = list(weights)
    if not items:
        raise RecipeError("the mean of no checkpoints is undefined", hint="give at least one checkpoint")
    summed = items[0]
    for item in items[1:]:
        summed = summed + item
    averaged = summed / len(items)
    return Weights(averaged.terms, None if len(items) > 1 else averaged.base)
