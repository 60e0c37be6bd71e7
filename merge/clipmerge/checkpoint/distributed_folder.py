"""Folders that `torch.distributed.checkpoint` wrote: `.metadata`, which says where each shard lies, and `*.distcp`.

torch's own reader unpickles `.metadata`, which runs whatever the file asks for, and needs memory for the whole model.
Here it is read by the inert unpickler, and shards become extents: nothing runs, and nothing of a tensor is read (of
one that is cut along another axis than its first, all of it is).
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from clipmerge.checkpoint.index import METADATA, is_plain_name
from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.state_dict import MAX_TENSORS, WRAPPERS
from clipmerge.checkpoint.tensors import Extent, Tensor
from clipmerge.checkpoint.torch_file import explained, read_pickle, read_saved_tensor
from clipmerge.checkpoint.unpickler import Malformed, Stub
from clipmerge.checkpoint.views import concatenate
from clipmerge.dtypes import storage_dtype

_OPTIMISER = (".exp_avg", ".exp_avg_sq", ".max_exp_avg_sq", ".momentum_buffer")


def read_distributed(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Read the tensors of a distributed checkpoint by name; those of an optimiser are left out.

    Returns:
        As `read_torch`: by the key under which training scripts keep a model, "" where there is none.

    Raises:
        UnsafeFileError: `.metadata`, or a shard, calls something that is not on the list.
        CheckpointError: it is damaged, names a file outside its folder, or holds no model's tensors.
    """
    with explained(folder):
        root = _state(read_pickle(folder / METADATA))
        described, stored = (root.get(key) for key in ("state_dict_metadata", "storage_data"))
        if not isinstance(described, dict) or not isinstance(stored, dict) or len(stored) > MAX_TENSORS:
            raise Malformed("its .metadata does not say where its tensors lie")
        counts = {str(name): _counts(_state(value).get("size")) for name, value in described.items()}
        sizes = {name: size for name, size in counts.items() if size is not None}
        states = tuple(
            {name.partition(".state.")[0] + ".state." for name in sizes if name.endswith(_OPTIMISER)}
        )
        wanted = {name for name in sizes if not name.startswith(states)}
        shards: dict[str, list[tuple[tuple[int, ...], Tensor]]] = {name: [] for name in sorted(wanted)}
        for name, offsets, tensor in _shards(folder, stored, wanted):
            shards[name].append((offsets, tensor))
        if not shards:
            raise Malformed("it holds an optimiser's state, or nothing, but not weights")
        groups: dict[str, dict[str, Tensor]] = {}
        for name, parts in shards.items():
            first, _, rest = name.partition(".")
            key, own = (first, rest) if rest and first in WRAPPERS else ("", name)
            groups.setdefault(key, {})[own] = _assembled(name, sizes[name], parts)
        return dict(sorted(groups.items(), key=lambda group: group[0] == ""))


def _shards(
    folder: Path, stored: Mapping[Any, Any], wanted: set[str]
) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    for index, info in stored.items():
        key, place = _state(index), _state(info)
        name, file = key.get("fqn"), place.get("relative_path")
        begin, length = place.get("offset"), place.get("length")
        if name not in wanted:
            continue
        if not is_plain_name(file) or not (folder / str(file)).is_file():
            raise Malformed(
                f"it keeps {str(name)[:120]!r} in {str(file)[:120]!r}, which is not a file of its folder"
            )
        if place.get("transform_descriptors"):
            raise Malformed(f"its shards are compressed ({str(place['transform_descriptors'])[:80]})")
        if type(begin) is not int or type(length) is not int or min(begin, length) < 0:
            raise Malformed("its .metadata has a place that is not a count of bytes")
        offsets = _counts(key.get("offset")) or ()
        yield str(name), offsets, read_saved_tensor(folder / str(file), str(name), begin, length)


def _assembled(name: str, size: tuple[int, ...], parts: Sequence[tuple[tuple[int, ...], Tensor]]) -> Tensor:
    """Put the shards of a tensor together."""
    parts = sorted(parts, key=lambda part: part[0])
    if len(parts) == 1 and parts[0][1].shape == size:
        return parts[0][1]
    offsets = [at or (0,) * len(size) for at, _ in parts]
    tensors = [tensor for _, tensor in parts]
    fits = all(
        len(at) == len(tensor.shape) == len(size) and tensor.dtype == tensors[0].dtype
        and all(a + n <= whole for a, n, whole in zip(at, tensor.shape, size, strict=True))
        for at, tensor in zip(offsets, tensors, strict=True)
    )  # fmt: skip
    if (
        not parts
        or not fits
        or sum(t.numel for t in tensors) != prod(size)
        or len(set(offsets)) != len(offsets)
    ):
        raise Malformed(f"the shards of tensor {name[:120]!r} do not make up its shape {size}")
    rows = np.cumsum([0, *(tensor.shape[0] for tensor in tensors)]).tolist()
    if all(
        t.shape[1:] == size[1:] and at[0] == row for t, at, row in zip(tensors, offsets, rows, strict=False)
    ):
        return concatenate(tensors)
    whole = np.zeros(size, storage_dtype(tensors[0].dtype))
    with Reader() as reader:
        for at, tensor in zip(offsets, tensors, strict=True):
            whole[tuple(slice(a, a + n) for a, n in zip(at, tensor.shape, strict=True))] = reader.dense(
                tensor
            )
    data = whole.reshape(-1).view(np.uint8)
    return Tensor(tensors[0].dtype, size, (Extent(data, 0, data.size),))


def _state(value: Any) -> Mapping[Any, Any]:
    """The fields of an instance; none where it is something else."""
    return value.state if isinstance(value, Stub) and isinstance(value.state, dict) else {}


def _counts(value: Any) -> tuple[int, ...] | None:
    is_counts = isinstance(value, tuple) and all(type(n) is int and n >= 0 for n in value)
    return value if is_counts else None
