"""Shards: a JSON index that says which file of the folder holds which tensor."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from clipmerge.checkpoint.safetensors import read_json
from clipmerge.checkpoint.tensors import Tensor
from clipmerge.errors import CheckpointError

MAX_INDEX = 100_000_000
SUFFIX = ".index.json"
METADATA = ".metadata"
"""What `torch.distributed.checkpoint` calls its index."""
_HINT = "index and shards do not belong together; fetch the folder again"
_FILE_NAME = re.compile(r"(?!\.{1,2}\Z)[^/\\:\x00-\x1f]+")

ReadFile = Callable[[Path], tuple[Mapping[str, str], Mapping[str, Tensor]]]


def read_index(path: Path, read_file: ReadFile) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the metadata and the tensors of all shards together.

    Raises:
        CheckpointError: the index is malformed, names a file outside its folder, or disagrees with its shards.
    """
    places = weight_map(path)
    metadata: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    shards = sorted(set(places.values()))
    for shard in shards:
        if not (path.parent / shard).is_file():
            raise CheckpointError(
                f"{path} names {shard!r}, which is not there", hint="fetch the missing shard"
            )
    for shard in shards:
        shard_metadata, shard_tensors = read_file(path.parent / shard)
        metadata |= shard_metadata
        for name, tensor in shard_tensors.items():
            if places.get(name) != shard:
                raise CheckpointError(f"{path} does not list tensor {name!r} of {shard!r}", hint=_HINT)
            tensors[name] = tensor
    for name in sorted(places.keys() - tensors.keys())[:1]:
        what = f"lists tensor {name!r} in {places[name]!r}, where it is not"
        raise CheckpointError(f"{path} {what}", hint=_HINT)
    return metadata, tensors


def weight_map(path: Path) -> dict[str, str]:
    """Read which file beside the index holds which tensor: tensor name → file name.

    Raises:
        CheckpointError: it cannot be read, is no index, or names a file outside its folder.
    """
    document = read_json(path, MAX_INDEX)
    places = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(
            f"{path} is JSON, but not an index of shards: it has no weight_map",
            hint="give the file with the weights, or the folder that holds it",
        )
    for name, shard in places.items():
        if not is_plain_name(shard):
            raise CheckpointError(
                f"{path} places tensor {name!r} in {shard!r}, which is not a file of its folder",
                hint="an index may only name files beside it; this one was not written by a tool you want to trust",
            )
    return places


def is_plain_name(name: object) -> bool:
    """Return whether a file's text names a file beside it, and can name no other."""
    return isinstance(name, str) and bool(_FILE_NAME.fullmatch(name))
