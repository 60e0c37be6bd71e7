"""`Weights`: a lazy expression over checkpoints, the one value type of the library, and how it is loaded and saved.

Nothing is read until it is saved, loaded into a model or asked for its tensors. What an expression is stands in
`expression.py`, how it is computed in `plan.py` and `run.py`.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from weakref import WeakValueDictionary

import numpy as np

from clipmerge.checkpoint.open import open_checkpoint
from clipmerge.checkpoint.output import new_files, write_at
from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import Checkpoint, Extent, Tensor, identifiers
from clipmerge.dtypes import BY_TORCH_NAME, torch_dtype
from clipmerge.errors import CheckpointError, MismatchError, ModelError, RecipeError
from clipmerge.text import and_more
from clipmerge.types import Bytes, Progress
from clipmerge.weights import expression
from clipmerge.weights.check import SHOWN, check, missing_names
from clipmerge.weights.coefficient import Coefficient, Scalar
from clipmerge.weights.digest import Digests
from clipmerge.weights.expression import Expression, as_vector
from clipmerge.weights.methods import METHODS, function_of
from clipmerge.weights.names import PARTS, absent_parts, tower_of
from clipmerge.weights.notation import notation
from clipmerge.weights.output_files import check_save, output_files
from clipmerge.weights.plan import Step, float_dtype, make_plan
from clipmerge.weights.provenance import file_metadata
from clipmerge.weights.record import COMPUTATION, RECALIBRATED, is_statistic, read_record, write_record
from clipmerge.weights.run import execute, into_arrays

if TYPE_CHECKING:
    import torch

__all__ = ["Source", "Weights", "from_state_dict", "interpolate", "load", "load_all", "mean", "open_all"]


class Weights(Expression):
    """A sum of coefficients times checkpoints, not yet computed; made by `load` and arithmetic."""

    __slots__ = ()

    def __repr__(self) -> str:
        return notation(self)

    def completed_from(self, base: "Weights") -> "Weights":
        """Take the whole towers and heads that these weights lack from `base`: an encoder becomes a model.

        Weights that lack nothing are returned as they are. `check.left_alone` says what was taken of the result.

        Raises:
            MismatchError: what is missing is not a whole tower or head, or the shapes differ.
        """
        missing = set(base.names).difference(self.names)
        if missing and absent_parts(missing, missing.union(self.names)) is None:
            check(interpolate(base, self, 0.5))  # lists all that differs
        return base + (self - base) if missing else self

    def save(
        self,
        path: str | Path,
        *,
        force: bool = False,
        dtype: str | None = None,
        allow_nonfinite: bool = False,
        shard_size: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        statistics: "Mapping[str, torch.Tensor] | None" = None,
        digests: bool = True,
        fsync: bool = False,
        threads: int | None = None,
        device: "str | torch.device | None" = None,
        on_progress: Progress | None = None,
    ) -> Path:
        """Write the weights as `.safetensors`, whole or not at all. Returns the path that was written.

        Args:
            path: the file; with `shard_size` the index `<path>.index.json` stands beside the shards.
            force: replace a file that exists; without it one that holds the very bytes is left as it is.
            dtype: "F32", "F16", "BF16" …; None keeps the base's, tensor by tensor.
            allow_nonfinite: let NaN and infinity through.
            shard_size: the largest number of bytes of one file.
            metadata: further keys of the file's record; "model" says which model it is, whatever the inputs say.
            statistics: running statistics of BatchNorm that are written in place of the merged ones, as `recalibrate`
                makes them; recorded by name, so that `verify` knows.
            digests: whether to record the parents' content digests, by which `verify` finds them.
            fsync: return only when the file is on the disk.
            threads: worker threads; None takes the cores this process may use, at most four.
            device: where methods such as `tsv` decompose matrices; None takes a GPU where there is one. Another device
                may round a number's last bit the other way.
            on_progress: called as (what, done, total).

        Raises:
            RecipeError: the total is neither 0 nor 1.
            MismatchError: the checkpoints do not fit together.
            NonFiniteError: an input holds NaN or infinity, or the output's dtype overflows.
            OutputError: another file is there, it is an input, or cannot be written.
        """
        dtype = float_dtype(dtype)
        named = "model" in (metadata or {})
        asked: dict[str, Any] = {"force": force, "dtype": dtype, "shard_size": shard_size}
        target = check_save(self, Path(path), **asked, model_named=named, again=True)
        replaced = _as_stored(statistics or {}, target.plan.steps)
        if replaced:
            about = (metadata or {}).get(RECALIBRATED, {})
            metadata = {**(metadata or {}), RECALIBRATED: {**about, "tensors": sorted(replaced)}}
        record = partial(file_metadata, self, dtype=dtype, extra=metadata)
        # Digests that are not known are taken from the bytes as they stream by, so the header that holds them is
        # written last. All digests are equally long: with any text in their place it has its final size.
        wanted = Digests(self.sources if digests else ())
        known = wanted.finish() if wanted.complete else dict.fromkeys(self.sources, "0" * 64)
        files = output_files(target, record(digests=known if digests else None))
        targets = [(file.path, file.size) for file in files]
        options: dict[str, Any] = {"force": force, "fsync": fsync, "superseded": target.superseded}
        with Reader(target.plan.checkpoints) as reader, new_files(targets, **options) as descriptors:
            placed = list(zip(files, descriptors, strict=True))
            sinks = [
                (name, partial(write_at, descriptor, file.path), offset)
                for file, descriptor in placed
                for name, offset in file.offsets.items()
            ]
            options = {"threads": threads, "device": device, "on_progress": on_progress}
            options |= {"allow_nonfinite": allow_nonfinite}
            execute(target.plan, sinks, reader, digests=wanted, **options)
            if not wanted.complete:
                files = output_files(target, record(digests=wanted.finish(on_progress)))
            for file, (_, descriptor) in zip(files, placed, strict=True):
                for name in replaced.keys() & file.offsets.keys():
                    write_at(descriptor, file.path, file.offsets[name], replaced[name])
                write_at(descriptor, file.path, 0, file.head)
        return files[-1].path

    def state_dict(
        self,
        dtype: str | None = None,
        *,
        device: "str | torch.device | None" = None,
        on_progress: Progress | None = None,
    ) -> "dict[str, torch.Tensor]":
        """Compute the tensors by open_clip's names, in the CPU's memory, by the same pass as `save`.

        Args:
            device: as for `save`.
        """
        import torch

        plan = make_plan(self, dtype=dtype)
        tensors = {name: torch.empty(s.shape, dtype=torch_dtype(s.dtype)) for name, s in plan.steps.items()}
        into_arrays(plan, lambda name: _bytes(tensors[name]), device=device, on_progress=on_progress)
        return tensors

    def load_into(self, module: "torch.nn.Module", *, strict: bool = True) -> "torch.nn.Module":
        """Write into the module's parameters and buffers in place, in their dtype and on their device.

        Methods such as `tsv` decompose their matrices on that device, if it is a GPU.

        Raises:
            ModelError: names or shapes differ; all of them are listed. `strict=False` allows names that the
                module lacks (a head, say) and parameters that stay as they are.
            NonFiniteError, CheckpointError: an input holds NaN, or ends early; found while writing, so the module
                is then partly written: load into it again before it is used.
        """
        import torch

        if self.kind() != 1:
            raise RecipeError(
                f"{self!r} is a task vector (total 0), not a model",
                hint="add it to its base: base + 0.4*vector",
            )
        self.check_fit(module, strict=strict)
        plan, targets = make_plan(self), module.state_dict(keep_vars=True)
        staged: dict[str, torch.Tensor] = {}

        def destination(name: str) -> Bytes:
            want, target = torch_dtype(plan.steps[name].dtype), targets.get(name)
            if (
                target is not None
                and (target.device.type, target.dtype) == ("cpu", want)
                and target.is_contiguous()
            ):
                return _bytes(target)
            staged[name] = torch.empty(plan.steps[name].shape, dtype=want)
            return _bytes(staged[name])

        into_arrays(plan, destination, device=next((p.device for p in targets.values()), None))
        with torch.no_grad():
            for name in staged.keys() & targets.keys():
                targets[name].copy_(staged[name])
        return module

    def check_fit(self, module: "torch.nn.Module", *, strict: bool = True, whole: bool = True) -> None:
        """Refuse a module that `load_into` could not fill, from headers alone; it may be on the meta device.

        Args:
            whole: without it the weights may lack whole towers, and have a trained head that the module lacks.

        Raises:
            ModelError: names or shapes differ; all of them are listed.
        """
        tensors = {name: self.tensor(name) for name in self.names}
        targets = module.state_dict(keep_vars=True)
        problems = []
        if not whole:
            tensors = {name: tensor for name, tensor in tensors.items() if tower_of(name) != "head"}
            gone = targets.keys() - tensors.keys()
            if tensors and gone and absent_parts(gone, targets.keys() | tensors.keys()):
                targets = {name: target for name, target in targets.items() if name not in gone}
        if strict:
            missing, extra = sorted(targets.keys() - tensors.keys()), sorted(tensors.keys() - targets.keys())
            problems += [f"the weights lack {name!r}" for name in missing]
            problems += [f"the model has no {name}" for name in missing_names(extra, missing)]
        for name in sorted(tensors.keys() & targets.keys()):
            here, there = tensors[name].shape, tuple(targets[name].shape)
            if here != there:
                problems.append(f"{name!r} is {list(here)} in the weights and {list(there)} in the model")
        if problems:
            raise ModelError(
                "the weights do not fit the model:\n  " + and_more(problems, SHOWN, "\n  "),
                hint=self.hint_of_misfit(),
            )

    def hint_of_misfit(self) -> str:
        """Say why these weights fit no model of open_clip's, where reading them said it."""
        for checkpoint in self.checkpoints:
            if names := checkpoint.extra.get("without_place"):
                return (
                    f"{checkpoint.path or checkpoint.name} keeps its own names, as open_clip has no place for "
                    f"{and_more([repr(name[:80]) for name in names])}: it can be merged, not scored or finetuned"
                )
        return "is it the right --model? `clipmerge inspect FILE` shows what the file holds"


def __getattr__(name: str) -> Callable[..., Weights]:
    """The function of each method of the table: `slerp(a, b, 0.3)`, `model_stock([base, a, b])`."""
    if name in METHODS:
        return function_of(METHODS[name], open_all)  # type: ignore[return-value] # Weights in, Weights out
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_opened: WeakValueDictionary[tuple[object, ...], Checkpoint] = WeakValueDictionary()


def load(
    path: str | Path,
    name: str | None = None,
    *,
    base: "str | Path | Weights | None" = None,
    vector: bool = False,
) -> Weights:
    """Open the weights in a file or folder, lazily: only headers are read.

    Args:
        path: `.safetensors` (or an index, or a folder), `.pt`, `.bin`, `.pth`, `hf-hub:org/name`, `model:tag`.
        name: how notation calls it; by default the file's stem as an identifier.
        base: the model that completes it: an adapter changes that one, and whole towers that a file lacks are taken
            from it. Of an adapter by default what its configuration names, where that is a local path.
        vector: it is a task vector, a difference, though the file does not say so.

    Raises:
        CheckpointError: missing, truncated, or not a checkpoint.
        UnsafeFileError: reading the file would need code to run.
        RecipeError: an adapter, and nothing says what its base is.
    """
    return placed(load_leaf(path, name), base, vector=vector)


def load_all(
    paths: Sequence[str | Path], *, base: "str | Path | Weights | None" = None, vectors: bool = False
) -> list[Weights]:
    """`load` each path, with distinct names whatever the files are called, in the order given.

    Names do not depend on that order: `a/model.safetensors` and `b/model.safetensors` are `model` and `model_2`.
    """
    base = None if base is None else as_weights(base)
    return [placed(leaf, base, vector=vectors) for leaf in load_leaves(paths)]


def load_leaves(paths: Sequence[str | Path]) -> list[Weights]:
    """`load_leaf` each path, with distinct names."""
    checkpoints = [leaf.checkpoints[0] for leaf in load_each([(path, None) for path in paths])]
    order = sorted(range(len(paths)), key=lambda i: os.fspath(paths[i]))
    names = dict(zip(order, identifiers([checkpoints[i].name for i in order]), strict=True))
    return [_named(c, names[i]) for i, c in enumerate(checkpoints)]


def load_each(files: "Sequence[tuple[str | Path, str | None]]") -> list[Weights]:
    """`load_leaf` each (path, name).

    Raises:
        CheckpointError: some cannot be read; all of them are listed.
    """
    opened, failures = [], []
    for path, name in files:
        try:
            opened.append(load_leaf(path, name))
        except CheckpointError as error:
            failures.append(error)
    if len(failures) > 1:
        reasons = "\n  ".join(failure.message for failure in failures)
        raise CheckpointError(
            f"{len(failures)} of {len(files)} checkpoints cannot be used:\n  {reasons}", hint=failures[0].hint
        )
    if failures:
        raise failures[0]
    return opened


def load_leaf(path: str | Path, name: str | None = None) -> Weights:
    """Open what the file itself holds, completed by nothing."""
    checkpoint = open_checkpoint(path)
    extra = {
        **checkpoint.extra,
        **({"sparse": True} if read_record(checkpoint.metadata).get("sparse") else {}),
    }
    checkpoint = replace(checkpoint, stamps=checkpoint.stamps_now(), extra=extra)
    return _named(checkpoint, name or checkpoint.name)


def placed(leaf: Weights, base: "str | Path | Weights | None", *, vector: bool = False) -> Weights:
    """Return what the name of a file stands for: a whole model where a base is given, or the task vector that it is.

    Raises:
        RecipeError: it is an adapter, and neither its base is given nor does its configuration name a local one.
    """
    if vector:
        return as_vector(leaf)
    (adapter,) = leaf.checkpoints
    if adapter.factors is not None:
        named = adapter.extra["base"]
        base = named if base is None and named and Path(named).exists() else base
        if base is None:
            called = f"hf-hub:{named}" if named else "MODEL"
            raise RecipeError(
                f"{adapter.path} is a LoRA adapter: say which model it was trained from",
                hint=f"--base {called}, or in Python load(path, base={called!r})",
            )
        return as_weights(base) + leaf
    return leaf.completed_from(as_weights(base)) if base is not None and leaf.kind() == 1 else leaf


def _named(checkpoint: Checkpoint, name: str) -> Weights:
    """The checkpoint under this name; one file that is opened twice under one name is one checkpoint."""
    if checkpoint.name != name:
        checkpoint = replace(checkpoint, name=name)
    if checkpoint.stamps:
        key = (name, checkpoint.extra.get("set"), *checkpoint.stamps.values())
        checkpoint = _opened.setdefault(key, checkpoint)
    return Weights.of(checkpoint)


def from_state_dict(
    tensors: "Mapping[str, torch.Tensor]", name: str = "model", metadata: Mapping[str, str] | None = None
) -> Weights:
    """Make weights of tensors in memory, which share the bytes where they are contiguous and on the CPU.

    Raises:
        MismatchError: a dtype that safetensors cannot store, or a sparse tensor.
    """
    leaves = {}
    for key in sorted(tensors):
        tensor = tensors[key]
        dtype = BY_TORCH_NAME.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None or str(tensor.layout) != "torch.strided":
            raise MismatchError(
                f"tensor {key!r} is {tensor.dtype}, {tensor.layout}: it cannot be stored",
                hint="convert it to a dense tensor of a plain dtype first",
            )
        raw = _bytes(tensor.cpu().contiguous())
        leaves[key] = Tensor(dtype, tuple(tensor.shape), (Extent(raw, 0, raw.size),))
    return Weights.of(Checkpoint(name, leaves, dict(metadata or {})))


def one_tower(checkpoint: Checkpoint, tower: Literal["image", "text"]) -> Checkpoint:
    """Keep the tensors of one tower, and of the record all but how the whole was computed.

    Raises:
        CheckpointError: it has no such tower.
    """
    wanted = "visual" if tower == "image" else "text"
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if tower_of(name) == wanted}
    if not tensors:
        raise CheckpointError(f"{checkpoint.path or checkpoint.name} has no {PARTS[wanted]}")
    record = {k: v for k, v in read_record(checkpoint.metadata).items() if k not in COMPUTATION}
    metadata = {**checkpoint.metadata, **(write_record(record) if record else {})}
    return replace(checkpoint, tensors=tensors, metadata=metadata)


def _bytes(tensor: "torch.Tensor") -> Bytes:
    import torch

    if tensor.numel() == 0:
        return np.empty(0, np.uint8)
    flat: Bytes = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return flat


Source: TypeAlias = Weights | str | Path
"""Weights, or the path of a checkpoint (or another name of one that `load` takes)."""


def open_all(sources: Sequence[Source]) -> list[Weights]:
    """Return weights as they are; open paths, with names that are distinct."""
    opened = iter(load_all([str(source) for source in sources if not isinstance(source, Weights)]))
    return [source if isinstance(source, Weights) else next(opened) for source in sources]


def mean(checkpoints: Iterable[Source]) -> Weights:
    """Average models: the uniform soup, every ingredient with the same coefficient, in whatever order.

    Source: Wortsman et al. 2022, arXiv 2203.05482.

    Raises:
        RecipeError: there is nothing to average.
    """
    return expression.mean(open_all(list(checkpoints)))


def interpolate(a: Source, b: Source, alpha: Scalar | Mapping[str, float] | Coefficient) -> Weights:
    """Interpolate two models, tensor by tensor: (1 - alpha)·a + alpha·b.

    Args:
        alpha: 0 is `a`, 1 is `b`; a mapping from name patterns gives each tensor its own, and a name that no
            pattern matches keeps `a`'s value.

    Source: Wortsman et al. 2022, arXiv 2109.01903 (WiSE-FT).
    """
    start, end = open_all([a, b])
    return expression.interpolate(start, end, alpha)


def _as_stored(statistics: "Mapping[str, torch.Tensor]", steps: Mapping[str, Step]) -> dict[str, Bytes]:
    """Return the bytes of running statistics as a file has them.

    Raises:
        MismatchError: one is no running statistic, or not one of the weights.
    """
    stored = {}
    for name, tensor in statistics.items():
        if not is_statistic(name) or name not in steps or tuple(tensor.shape) != steps[name].shape:
            raise MismatchError(
                f"{name!r} is no running statistic of these weights",
                hint="take them from clipmerge.recalibrate",
            )
        stored[name] = _bytes(tensor.cpu().to(torch_dtype(steps[name].dtype)).contiguous())
    return stored


def as_weights(checkpoint: "str | Path | Checkpoint | Weights") -> Weights:
    """Load a checkpoint that is named by its path; weights stay as they are."""
    if isinstance(checkpoint, Checkpoint):
        return Weights.of(checkpoint)
    return checkpoint if isinstance(checkpoint, Weights) else load(checkpoint)


def as_checkpoint(checkpoint: "str | Path | Checkpoint | Weights") -> Checkpoint:
    """Return the one checkpoint that a path or weights stand for.

    Raises:
        RecipeError: an expression that is more than one checkpoint.
    """
    weights = load_leaf(checkpoint) if isinstance(checkpoint, str | Path) else as_weights(checkpoint)
    leaf, coefficient = next(iter(weights.terms.items()), (None, None))
    if len(weights.terms) != 1 or not isinstance(leaf, Checkpoint) or coefficient != Coefficient.of(1):
        raise RecipeError(f"{weights!r} is not one checkpoint", hint="save it, and give the file")
    return leaf
