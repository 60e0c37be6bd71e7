"""One file, or several with an index, as Hugging Face lays them out."""

import json
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from clipmerge.checkpoint.index import weight_map
from clipmerge.checkpoint.safetensors import header
from clipmerge.checkpoint.tensors import Tensor
from clipmerge.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to write: its first bytes, where each tensor goes, and its size (the index has no tensors)."""

    head: bytes
    offsets: Mapping[str, int]
    size: int


def split_into_shards(
    tensors: Mapping[str, Tensor], shard_size: int | None, metadata: Mapping[str, str]
) -> list[Shard]:
    """The files to write: one, or shards of at most `shard_size` bytes of tensors followed by their index.

    Tensors go to shards in name order; one that is larger than `shard_size` has a shard to itself.
    """
    groups = _groups(tensors, shard_size)
    if len(groups) == 1:
        return [_shard(tensors, metadata)]
    shards = [_shard(group, metadata) for group in groups]
    total = sum(tensor.nbytes for tensor in tensors.values())
    names = {name: number for number, group in enumerate(groups, 1) for name in group}
    index = {"metadata": {**metadata, "total_size": total}, "weight_map": names}
    text = json.dumps(index, indent=2, sort_keys=True).encode()
    return [*shards, Shard(text, {}, len(text))]


def shard_paths(path: Path, shards: list[Shard]) -> list[tuple[Path, int]]:
    """The path and size of each file; the index comes last: it appears only when all that it names is there."""
    if len(shards) == 1:
        return [(path, shards[0].size)]
    count = len(shards) - 1
    stem = path.name.removesuffix(".safetensors")
    names = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    index = json.loads(shards[-1].head)
    index["weight_map"] = {name: names[number - 1] for name, number in index["weight_map"].items()}
    text = json.dumps(index, indent=2, sort_keys=True).encode()
    shards[-1] = Shard(text, {}, len(text))
    sized = [(path.with_name(name), shard.size) for name, shard in zip(names, shards, strict=False)]
    return [*sized, (path.with_name(f"{stem}.safetensors.index.json"), len(text))]


def superseded(path: Path, targets: Collection[Path]) -> list[Path]:
    """What stands under the same name in another shape and would be taken for the output: one file, or an index and
    its shards. The index comes first."""
    stem = path.name.removesuffix(".safetensors")
    index = path.with_name(f"{stem}.safetensors.index.json")
    ours = re.compile(re.escape(stem) + r"-\d{5}-of-\d{5}\.safetensors")
    shards: list[str] = []
    with suppress(CheckpointError):  # there is none, or a file of another kind by that name
        shards = sorted(name for name in set(weight_map(index).values()) if ours.fullmatch(name))
    files = (index, path, *(path.with_name(name) for name in shards))
    return [file for file in files if file not in targets and _is_file(file)]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long
        return False


def _groups(tensors: Mapping[str, Tensor], shard_size: int | None) -> list[dict[str, Tensor]]:
    groups: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name in sorted(tensors):
        size = tensors[name].nbytes
        if shard_size is not None and groups[-1] and filled + size > shard_size:
            groups.append({})
            filled = 0
        groups[-1][name] = tensors[name]
        filled += size
    return groups


def _shard(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Shard:
    head, offsets, size = header(tensors, metadata)
    return Shard(head, offsets, size)
