"""Content digests: what a checkpoint holds, whatever file, container or order it is stored in."""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from clipmerge.checkpoint.cache import cache_dir
from clipmerge.checkpoint.output import whole_file
from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.errors import OutputError
from clipmerge.types import Progress

T = TypeVar("T")

PIECE = 1 << 18
"""Elements read and hashed at a time."""


class Digests:
    """Content digests of several checkpoints: remembered ones at once, the others from a pass that reads the tensors
    anyway.

    Args:
        checkpoints: those whose digests are wanted.
    """

    # A hash takes bytes in one order, and the pass takes tensors in the order that suits its threads. So each tensor
    # is hashed on its own, in row-major order, by the one thread that reads it, and the content digest is the hash of
    # these in the order of the names: the same whatever file, shard, thread or order the bytes came from.

    def __init__(self, checkpoints: Iterable[Checkpoint]) -> None:
        self._caches = {checkpoint: _cache_path(checkpoint) for checkpoint in checkpoints}
        self._known = {c: digest for c, path in self._caches.items() if (digest := _remembered(path))}
        self._known |= {c: _adapter_digest(c, c.factors) for c in self._caches if c.factors is not None}
        self._tensors: dict[Checkpoint, dict[str, str]] = {
            c: {} for c in self._caches if c not in self._known
        }

    @property
    def complete(self) -> bool:
        """Whether every digest is known, and no pass need take one."""
        return not self._tensors

    def wants(self, checkpoint: Checkpoint, name: str) -> bool:
        """Whether the digest of this tensor has still to be taken."""
        return checkpoint in self._tensors and name not in self._tensors[checkpoint]

    def add(self, checkpoint: Checkpoint, name: str, digest: str) -> None:
        """Take note of the BLAKE3 of a tensor's row-major bytes."""
        self._tensors[checkpoint][name] = digest

    def add_array(self, checkpoint: Checkpoint, name: str, stored: npt.NDArray[np.generic]) -> None:
        """Digest a tensor that was read whole, if its digest is wanted."""
        if self.wants(checkpoint, name):
            self.add(checkpoint, name, blake3(stored.reshape(-1).view(np.uint8).data).hexdigest())

    def blocks(self, checkpoint: Checkpoint, name: str, reader: Reader) -> Iterator[npt.NDArray[np.generic]]:
        """Read a tensor in pieces, and digest it on the way if its digest is wanted."""
        hasher = blake3() if self.wants(checkpoint, name) else None
        for _, stored in reader.blocks(checkpoint.tensors[name], PIECE):
            if hasher is not None:
                hasher.update(stored.view(np.uint8).data)
            yield stored
        if hasher is not None:
            self.add(checkpoint, name, hasher.hexdigest())

    def finish(self, on_progress: Progress | None = None) -> dict[Checkpoint, str]:
        """Read and digest the tensors that no pass has read, remember the new digests, and return all of them."""
        for checkpoint, taken in self._tensors.items():

            def take(name: str, reader: Reader, checkpoint: Checkpoint = checkpoint) -> None:
                deque(self.blocks(checkpoint, name, reader), maxlen=0)

            missing = [name for name in checkpoint.tensors if name not in taken]
            for_each_tensor(checkpoint, missing, take, f"hashing {checkpoint.name}", on_progress)
            content = blake3()
            for name, tensor in sorted(checkpoint.tensors.items()):
                content.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0{taken[name]}\n".encode())
            self._known[checkpoint] = content.hexdigest()
            if (path := self._caches[checkpoint]) is not None:
                with (
                    suppress(OutputError),
                    whole_file(path, parents=True) as sibling,
                ):  # else it is taken again
                    sibling.write_text(self._known[checkpoint])
        self._tensors = {}
        return {checkpoint: self._known[checkpoint] for checkpoint in self._caches}


def _adapter_digest(adapter: Checkpoint, factors: Checkpoint) -> str:
    """Digest an adapter's factors as they lie in the file, and what scales them; not the products, which round."""
    how = json.dumps(adapter.extra["lora"], sort_keys=True)
    return blake3(f"{content_digest(factors)}\n{how}".encode()).hexdigest()


def content_digest(checkpoint: Checkpoint, on_progress: Progress | None = None) -> str:
    """Digest names, dtypes, shapes and bytes in sorted name order: BLAKE3, 64 hex digits.

    Remembered under the cache folder by the files' device, inode, size and modification time.
    """
    return Digests([checkpoint]).finish(on_progress)[checkpoint]


def for_each_tensor(
    checkpoint: Checkpoint,
    names: Iterable[str],
    function: Callable[[str, Reader], T],
    what: str,
    on_progress: Progress | None,
) -> dict[str, T]:
    """Call `function` with each name and a reader, largest tensors first, in threads. Returns name → result."""
    sizes = {name: checkpoint.tensors[name].nbytes for name in names}
    order = sorted(sizes, key=lambda name: -sizes[name])
    results, done = {}, 0
    with Reader([checkpoint]) as reader, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for name, result in zip(order, pool.map(lambda name: function(name, reader), order), strict=True):
            results[name] = result
            done += sizes[name]
            if on_progress:
                on_progress(what, done, sum(sizes.values()))
        reader.unchanged()
    return results


def _cache_path(checkpoint: Checkpoint) -> Path | None:
    """Where this checkpoint's digest is remembered; None for tensors in memory."""
    extents = (extent for tensor in checkpoint.tensors.values() for extent in tensor.extents)
    if not checkpoint.files() or not all(isinstance(extent.source, Path) for extent in extents):
        return None
    stamps = sorted(checkpoint.stamps_now().values())
    names = sorted((name, tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items())
    chosen = checkpoint.extra.get("set", "")  # one file may hold two sets of the same names
    key = blake3((repr((stamps, names)) + chosen).encode(errors="replace")).hexdigest()[:32]
    return cache_dir() / "digests" / key


def _remembered(path: Path | None) -> str | None:
    with suppress(OSError, ValueError):
        text = path.read_text() if path else ""
        if len(text) == 64 and int(text, 16) >= 0:
            return text
    return None
