"""Does a file hold what its record says? Its parents are found by content and the merge is computed again."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeAlias

import numpy as np

from clipmerge.checkpoint.index import METADATA
from clipmerge.checkpoint.open import SUFFIXES, open_checkpoint
from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import Checkpoint, Tensor
from clipmerge.dtypes import ITEMSIZE, storage_dtype, to_float64
from clipmerge.errors import CheckpointError, ClipmergeError
from clipmerge.types import Bytes, Progress
from clipmerge.weights.blocks import Sink
from clipmerge.weights.digest import content_digest
from clipmerge.weights.expression import Applied, Leaf
from clipmerge.weights.parse import parse
from clipmerge.weights.plan import Plan, float_dtype, make_plan
from clipmerge.weights.positions import resize_positions, resized
from clipmerge.weights.provenance import HEAD_OF, Parent, is_original, parents_of
from clipmerge.weights.record import read_record, recalibrated
from clipmerge.weights.run import execute
from clipmerge.weights.statistics_files import statistics_record
from clipmerge.weights.weights import Weights, as_checkpoint, load, load_leaf

Rebuild: TypeAlias = Callable[[Mapping[str, Any], Weights], Weights]
ROUNDING = 1e-4
"""How far a head that was built again may be from the stored one, relative to the largest number there."""
SUMS, DECOMPOSED = 1e-9, 1e-6
"""How far what sums and decompositions in float64 give may be from one library to another, of the largest number.

A polar factor is known to about the second in the weakest direction that it is computed in (`ops.decompose`).
"""
_EPS = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
"""The step from one number to the next, relative to the number."""
_BY_NORMS = ("lines", "equalise")
"""Methods of entries that go by norms, which are sums that libraries round otherwise."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify` concluded.

    Attributes:
        status: "verified"; "differs" (`tensor` is the first that does); "missing" (parents were not found);
            "unrecorded" (the file does not say how it was made).
        reason: one sentence.
        parents: name → the file that is this parent.
        missing: the parents for which there is no file.
        rounded: elements that differ by a rounding, where a method of linear algebra computed them.
    """

    status: Literal["verified", "differs", "missing", "unrecorded"]
    reason: str
    notation: str | None = None
    tensor: str | None = None
    parents: Mapping[str, Path] = field(default_factory=dict)
    missing: tuple[Parent, ...] = ()
    rounded: int = 0

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, all fields."""
        return {**asdict(self), "parents": {name: str(path) for name, path in self.parents.items()}}


def verify(
    checkpoint: str | Path | Weights,
    parents: str | Path | Sequence[str | Path] = (),
    *,
    rebuild: Rebuild | None = None,
    device: str | None = None,
    on_progress: Progress | None = None,
) -> Verdict:
    """Recompute a merged file from its parents and compare every tensor, bit for bit.

    What decompositions, dot products and norms are in (TSV-M, SLERP, LiNeS …) may differ by one rounding, as another
    machine's linear algebra sums in another order; such elements are counted and said.

    Args:
        checkpoint: the file to verify, or what `load` gave for it.
        parents: a file, a folder to search through, or several, besides the file's own folder. Names do not
            matter: parents are known by their content digests.
        rebuild: makes a zero-shot head again that was built for the merge, from its recipe and its base. Where that
            is not the same to the bit (on another processor), the head is compared to within rounding.
        device: as for `Weights.save`.

    Raises:
        CheckpointError: the file cannot be read, or its record makes no sense.
    """
    merged = as_checkpoint(checkpoint)
    record = read_record(merged.metadata)
    notation = record.get("notation")
    if not isinstance(notation, str):
        return Verdict("unrecorded", "the file does not say how it was made: clipmerge did not write it")
    recorded = parents_of(record)
    if not recorded or any(parent.digest is None for parent in recorded):
        return Verdict("unrecorded", "the file was written without its parents' digests", notation)
    if is_original(record):  # from memory: there is nothing to compute again, but the content has a digest
        if record.get("dtype", "base") != "base":
            return Verdict("unrecorded", "the file was written from memory, in another dtype", notation)
        if content_digest(merged, on_progress) != recorded[0].digest:
            return Verdict("differs", "the content is not what was written", notation)
        return Verdict(
            "verified",
            "the content is unchanged since it was written; it has no parents to recompute it from",
            notation,
        )
    places = [parents] if isinstance(parents, str | Path) else parents
    files = _find(merged, recorded, places, on_progress)
    built = _built(recorded, files, rebuild)
    missing = tuple(parent for parent in recorded if parent.name not in {*files, *built})
    if missing:
        reason = f"{len(missing)} of {len(recorded)} parents are missing"
        return Verdict("missing", reason, notation, None, files, missing)
    inexact = {
        name
        for parent in recorded
        if parent.name in built and content_digest(as_checkpoint(built[parent.name])) != parent.digest
        for name in built[parent.name].names
    }
    plan, taken = _plan(merged, record, notation, files, built), recalibrated(record)
    tensor, reason, rounded = _first_difference(merged, plan, inexact, taken, device, on_progress)
    if tensor:
        return Verdict("differs", reason, notation, tensor, files)
    reason = "every tensor is what the record says, bit for bit"
    if rounded:
        total = sum(step.numel for step in plan.steps.values())
        reason += f", but for {rounded:,} of {total:,} elements, which differ by a rounding in linear algebra"
    if taken:
        reason += f", but for {len(taken)} running statistics of BatchNorm, which were taken on images"
    if inexact:
        reason += f" ({', '.join(sorted(inexact))} to within rounding: the head was built again)"
    return Verdict("verified", reason, notation, None, files, rounded=rounded)


def _built(
    recorded: Sequence[Parent], files: Mapping[str, Path], rebuild: Rebuild | None
) -> dict[str, Weights]:
    """Build heads again that were built for the merge. Returns name → head, for those whose base was found."""
    bases = {parent.digest: files[parent.name] for parent in recorded if parent.name in files}
    built: dict[str, Weights] = {}
    for parent in recorded:
        recipe = parent.made.get(HEAD_OF)
        if (
            rebuild
            and parent.name not in files
            and isinstance(recipe, Mapping)
            and recipe.get("base") in bases
        ):
            built[parent.name] = rebuild(recipe, load(bases[recipe["base"]]))
    return built


def _find(
    checkpoint: Checkpoint,
    recorded: Sequence[Parent],
    places: Sequence[str | Path],
    on_progress: Progress | None,
) -> dict[str, Path]:
    """Find the first file with each parent's digest, those with a recorded name first. Returns name → file."""
    candidates: dict[Path, None] = {}
    for place in map(Path, places):
        if not place.exists():
            raise CheckpointError(f"{place} does not exist", hint="--parents takes files and folders")
        inside = [Path(root) / name for root, _, names in os.walk(place) for name in names]
        candidates.update(dict.fromkeys(sorted(inside) if place.is_dir() else [place]))
    if checkpoint.path is not None:
        folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
        candidates.update(dict.fromkeys(sorted(p for p in folder.iterdir() if p.is_file())))
    names = {(parent.file or "").partition("#")[0] for parent in recorded}
    choices = {"", *("#" + p.file.rpartition("#")[2] for p in recorded if p.file and "#" in p.file)}
    shapes = {(name, tensor.shape) for name, tensor in checkpoint.tensors.items()}
    files: dict[str, Path] = {}
    for file in sorted(candidates, key=lambda file: file.name not in names):
        if len(files) == len(recorded):  # every parent is found: nothing more is read
            break
        place = file.parent if file.name == METADATA else file
        is_checkpoint = place != file or file.name.endswith(SUFFIXES)
        for path in (Path(f"{place}{choice}") for choice in sorted(choices) if is_checkpoint):
            with suppress(ClipmergeError, OSError):
                other = open_checkpoint(path)
                if read_record(checkpoint.metadata).get("resize_positions"):
                    other = resized(other, checkpoint)
                # A parent may lack a tower that another has, or have one that a task vector leaves out.
                theirs = {(name, tensor.shape) for name, tensor in other.tensors.items()}
                if theirs <= shapes or shapes <= theirs or statistics_record(other) is not None:
                    digest = content_digest(other, on_progress)
                    files = {**{p.name: path for p in recorded if p.digest == digest}, **files}
    return files


def _plan(
    checkpoint: Checkpoint,
    record: Mapping[str, Any],
    notation: str,
    files: Mapping[str, Path],
    built: Mapping[str, Weights],
) -> Plan:
    dtype = record.get("dtype", "base")
    try:
        leaves = {name: load_leaf(file, name) for name, file in files.items()}
        if record.get("resize_positions"):
            like = Weights.of(checkpoint)
            leaves = {name: resize_positions(leaf, like) for name, leaf in leaves.items()}
        weights = parse(notation, {**leaves, **built})
        return make_plan(weights, dtype=None if dtype == "base" else float_dtype(str(dtype)))
    except ClipmergeError as error:
        raise CheckpointError(
            f"{checkpoint.path}: its record cannot be computed again: {error.message}", hint=error.hint
        ) from error


def _first_difference(
    checkpoint: Checkpoint,
    plan: Plan,
    inexact: Collection[str],
    taken: Collection[str],
    device: str | None,
    on_progress: Progress | None,
) -> tuple[str | None, str, int]:
    """Return the first tensor that is not what the plan gives, and what is wrong with it; None where all are.

    The number counts elements that differ by a rounding only.

    Args:
        inexact: names that need to agree to within rounding only. taken: names that were not computed from parents.
    """
    for name in sorted(plan.steps.keys() ^ checkpoint.tensors.keys()):
        return name, f"{name!r} is {'not in the file' if name in plan.steps else 'in no parent'}", 0
    for name, step in plan.steps.items():
        tensor = checkpoint.tensors[name]
        if (tensor.dtype, tensor.shape) != (step.dtype, step.shape):
            have = f"{tensor.dtype} {list(tensor.shape)}"
            return name, f"{name!r} is {have}, not {step.dtype} {list(step.shape)}", 0
    counts = {name: _Count() for name in plan.steps}
    for name, step in plan.steps.items():
        if name in inexact:
            counts[name] = _Count(largest=ROUNDING, least=1.0)
        elif apart := max((_apart(leaf) for _, leaf in step.terms), default=0.0):
            counts[name] = _Count(_EPS.get(step.dtype, 0.0), apart)
    with Reader((checkpoint, *plan.checkpoints)) as reader:
        sinks = [(name, _comparer(checkpoint.tensors[name], reader, counts[name]), 0) for name in plan.steps]
        options: dict[str, Any] = {"device": device, "what": "verifying", "on_progress": on_progress}
        execute(plan, sinks, reader, allow_nonfinite=True, **options)
    for name, count in counts.items():
        if count.wrong and name not in taken:
            return name, f"{count.wrong:,} of the {plan.steps[name].numel:,} elements of {name!r} differ", 0
    return None, "", sum(counts[name].close for name in counts if name not in {*inexact, *taken})


@dataclass(slots=True)
class _Count:
    """How far a tensor's elements may be from the stored ones, and how many are.

    Attributes:
        each, largest: relative to the element, and to the largest one, which counts as `least` at least.
        close: elements that differ, but not by more. wrong: those that differ by more.
    """

    each: float = 0.0
    largest: float = 0.0
    least: float = 0.0
    close: int = 0
    wrong: int = 0


def _apart(leaf: Leaf) -> float:
    """Return how far a term may be elsewhere: 0 unless its last bits depend on a library's sums or decompositions."""
    if not isinstance(leaf, Applied):
        return 0.0
    if leaf.decomposes:
        return DECOMPOSED
    method, options = leaf.method, leaf.options
    summed = method.on != "entries" or method.name in _BY_NORMS or options.get("equalise")
    inside = max((_apart(term) for each in leaf.inputs for term in each.terms), default=0.0)
    return max(SUMS if summed else 0.0, inside)


def _comparer(tensor: Tensor, reader: Reader, count: _Count) -> Sink:
    """Takes what was computed, block by block, and counts the elements that are stored differently."""
    lock = Lock()

    def compare(offset: int, computed: Bytes) -> None:
        if tensor.strides is None:
            stored = np.empty_like(computed)
            reader.into(tensor, offset, stored)
        else:
            whole = reader.dense(tensor).reshape(-1).view(np.uint8)
            stored = whole[offset : offset + computed.size]
        if np.array_equal(computed, stored):
            return
        wide = (-1, ITEMSIZE[tensor.dtype])
        differs = (computed.reshape(wide) != stored.reshape(wide)).any(axis=1)
        close = np.zeros_like(differs)
        if count.largest:
            here, there = (
                to_float64(raw.view(storage_dtype(tensor.dtype)), tensor.dtype) for raw in (computed, stored)
            )
            size = np.abs(there)
            allowed = count.each * size + count.largest * size.max(initial=count.least)
            close = differs & (np.abs(here - there) <= allowed)
        with lock:
            count.close += int(close.sum())
            count.wrong += int((differs & ~close).sum())

    return compare
