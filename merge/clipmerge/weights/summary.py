"""What a checkpoint holds, tower by tower and block by block."""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import ITEMSIZE, Checkpoint, Tensor, iter_blocks, storage_dtype
from clipmerge.ops.cast import finite, scratch_for, widen
from clipmerge.types import Progress
from clipmerge.weights.digest import content_digest
from clipmerge.weights.names import TOWERS, block_of, tower_of
from clipmerge.weights.record import read_record

PIECE = 1 << 18
"""Elements looked at together."""


@dataclass(frozen=True, slots=True)
class Part:
    """The tensors of one tower outside its blocks, or of one of its blocks.

    Attributes:
        block: the block's number, None for what lies outside blocks.
        nonfinite: NaN and infinite elements, None where only headers were read.
    """

    tower: str
    block: int | None
    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    nonfinite: int | None


@dataclass(frozen=True, slots=True)
class Summary:
    """See `summarise`."""

    name: str
    path: str | None
    layout: str
    parts: tuple[Part, ...]
    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    nonfinite: Mapping[str, int] | None
    digest: str | None
    kind: str
    record: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, all fields."""
        return asdict(self)


def summarise(
    checkpoint: Checkpoint, *, headers: bool = False, on_progress: Progress | None = None
) -> Summary:
    """Counts, sizes, dtypes, the record, and (from the tensors) non-finite elements and the content digest.

    Args:
        headers: read no tensor: `nonfinite` and `digest` are None.
    """
    bad = None if headers else nonfinite(checkpoint, on_progress)
    record = read_record(checkpoint.metadata)
    tensors = checkpoint.tensors
    return Summary(
        name=checkpoint.name,
        path=str(checkpoint.path) if checkpoint.path else None,
        layout=checkpoint.layout,
        parts=tuple(_part(key, names, tensors, bad) for key, names in grouped(tensors).items()),
        tensors=len(tensors),
        parameters=sum(t.numel for t in tensors.values()),
        nbytes=sum(t.nbytes for t in tensors.values()),
        dtypes=_counts(t.dtype for t in tensors.values()),
        nonfinite=bad,
        digest=None if headers else content_digest(checkpoint, on_progress),
        kind="a model" if record.get("total", 1) else "a task vector",
        record=record,
    )


def grouped(names: Iterable[str]) -> dict[tuple[str, int | None], list[str]]:
    """Tensor names by (tower, block), towers in their usual order, what lies outside blocks first."""
    found: dict[tuple[str, int | None], list[str]] = {}
    for name in sorted(names):
        found.setdefault((tower_of(name), block_of(name)), []).append(name)
    order = sorted(found, key=lambda key: (TOWERS.index(key[0]), -1 if key[1] is None else key[1]))
    return {key: found[key] for key in order}


def nonfinite(checkpoint: Checkpoint, on_progress: Progress | None = None) -> dict[str, int]:
    """Tensor name → how many of its elements are NaN or infinite; only tensors that have some."""
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    found, done = {}, 0
    with Reader((checkpoint,)) as reader, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        counts = pool.map(lambda tensor: _nonfinite(tensor, reader), checkpoint.tensors.values())
        for (name, tensor), count in zip(checkpoint.tensors.items(), counts, strict=True):
            if count:
                found[name] = count
            done += tensor.nbytes
            if on_progress:
                on_progress(f"reading {checkpoint.name}", done, total)
        reader.unchanged()
    return found


def _nonfinite(tensor: Tensor, reader: Reader) -> int:
    if not tensor.is_float or tensor.numel == 0:
        return 0
    if tensor.strides is not None:
        return _count(reader.dense(tensor).reshape(-1), tensor.dtype)
    size = ITEMSIZE[tensor.dtype]
    buffer = np.empty(min(PIECE, tensor.numel) * size, np.uint8)
    count = 0
    for start, stop in iter_blocks(tensor.numel, PIECE):
        raw = buffer[: (stop - start) * size]
        reader.into(tensor, start * size, raw)
        count += _count(raw.view(storage_dtype(tensor.dtype)), tensor.dtype)
    return count


def _count(raw: np.ndarray[Any, Any], dtype: str) -> int:
    if finite(raw, dtype):
        return 0
    return int(np.count_nonzero(~np.isfinite(widen(raw, dtype, scratch_for(raw.size)))))


def _part(
    key: tuple[str, int | None],
    names: list[str],
    tensors: Mapping[str, Tensor],
    bad: Mapping[str, int] | None,
) -> Part:
    mine = [tensors[name] for name in names]
    return Part(
        *key,
        tensors=len(mine),
        parameters=sum(t.numel for t in mine),
        nbytes=sum(t.nbytes for t in mine),
        dtypes=_counts(t.dtype for t in mine),
        nonfinite=None if bad is None else sum(bad.get(name, 0) for name in names),
    )


def _counts(words: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for word in words:
        found[word] = found.get(word, 0) + 1
    return dict(sorted(found.items()))
