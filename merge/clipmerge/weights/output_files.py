"""Where a merge goes: one file, or several with an index, as Hugging Face lays them out."""

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from clipmerge.checkpoint.index import weight_map
from clipmerge.checkpoint.output import check_target
from clipmerge.checkpoint.safetensors import header, read_header
from clipmerge.checkpoint.tensors import Tensor
from clipmerge.errors import CheckpointError
from clipmerge.weights.expression import Expression
from clipmerge.weights.notation import notation
from clipmerge.weights.plan import Plan, Step, make_plan
from clipmerge.weights.record import read_record


@dataclass(frozen=True, slots=True)
class Target:
    """Where `check_save` has found that a merge can be written.

    Attributes:
        plan: what is computed.
        shards: (file, names of its tensors), in name order.
        index: the file that names the shards, None where there is one file only.
        superseded: what stands under the same name in another shape and will be removed.
    """

    plan: Plan
    shards: Sequence[tuple[Path, Collection[str]]]
    index: Path | None
    superseded: Sequence[Path]


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file to write: its first bytes, where each tensor goes, and its size (the index has no tensors)."""

    path: Path
    head: bytes
    offsets: Mapping[str, int]
    size: int


def check_save(
    weights: Expression,
    path: Path,
    *,
    force: bool = False,
    dtype: str | None = None,
    shard_size: int | None = None,
    model_named: bool = False,
    again: bool = False,
) -> Target:
    """Refuse what `Weights.save` would refuse before it reads a tensor. Returns where it will write.

    Tensors go to shards in name order; one that is larger than `shard_size` has a shard to itself.

    Args:
        model_named: whether the caller says which model it is; without that, the checkpoints must agree on theirs.
        again: let one file that exists through where it says that it is of this very expression; `new_files` compares
            the bytes.
    """
    inputs = [file for checkpoint in weights.sources for file in checkpoint.files()]
    real = check_target(path, force=True, inputs=inputs)
    again = again and not force and shard_size is None and _is_of(real, weights, dtype)
    check_target(path, force=force or again, inputs=inputs)
    plan = make_plan(weights, dtype=dtype)
    if not model_named:
        weights.model  # noqa: B018 - raises where two models are mixed
    groups = _groups(plan.steps, shard_size)
    stem = real.name.removesuffix(".safetensors")
    index = real.with_name(f"{stem}.safetensors.index.json") if len(groups) > 1 else None
    names = [f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    files = [real.with_name(name) for name in names] if index else [real]
    superseded = _superseded(real, stem, [*files, index])
    for file in (*files, *([index] if index else ()), *superseded):
        check_target(file, force=force or (again and file == real), inputs=inputs)
    return Target(plan, list(zip(files, groups, strict=True)), index, superseded)


def _is_of(path: Path, weights: Expression, dtype: str | None) -> bool:
    """Return whether a file there says that it was written of this expression, in this dtype."""
    try:
        record = read_record(read_header(path)[0])
    except CheckpointError:  # there is none, or a file of another kind
        return False
    return (record.get("notation"), record.get("dtype")) == (notation(weights), dtype or "base")


def output_files(target: Target, metadata: Mapping[str, str]) -> list[OutputFile]:
    """Lay the files out. The index comes last: it appears only when all that it names is there."""
    tensors = {name: Tensor(step.dtype, step.shape, ()) for name, step in target.plan.steps.items()}
    files = [
        OutputFile(path, *header({name: tensors[name] for name in names}, metadata))
        for path, names in target.shards
    ]
    if target.index:
        shards = {name: path.name for path, names in target.shards for name in names}
        total = target.plan.written_bytes
        index = {"metadata": {**metadata, "total_size": total}, "weight_map": shards}
        text = json.dumps(index, indent=2, sort_keys=True).encode()
        files.append(OutputFile(target.index, text, {}, len(text)))
    return files


def _superseded(path: Path, stem: str, files: Collection[Path | None]) -> list[Path]:
    """What stands under the same name in another shape and would be taken for the output: one file, or an index and
    its shards. The index comes first."""
    index = path.with_name(f"{stem}.safetensors.index.json")
    shard = re.compile(re.escape(stem) + r"-\d{5}-of-\d{5}\.safetensors")
    old: list[str] = []
    with suppress(CheckpointError):  # there is none, or a file of another kind by that name
        old = sorted(name for name in set(weight_map(index).values()) if shard.fullmatch(name))
    # os.path.isfile, unlike Path.is_file, answers for names that are too long too.
    return [f for f in (index, path, *map(path.with_name, old)) if f not in files and os.path.isfile(f)]  # noqa: PTH113


def _groups(steps: Mapping[str, Step], shard_size: int | None) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name in sorted(steps):
        if shard_size is not None and groups[-1] and filled + steps[name].nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += steps[name].nbytes
    return groups
