"""Content digests: what a checkpoint holds, whatever file, container or order it is stored in."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import local

import numpy as np
from blake3 import blake3

from clipmerge.checkpoint.cache import cache_dir
from clipmerge.checkpoint.output import whole_file
from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import Bytes, Checkpoint, Tensor, names_digest
from clipmerge.errors import OutputError

PIECE = 1 << 20
"""Bytes read and hashed at a time."""


def content_digest(checkpoint: Checkpoint, on_progress: Callable[[str, int, int], None] | None = None) -> str:
    """BLAKE3 over names, dtypes, shapes and bytes in sorted name order; 64 hex digits.

    Remembered under the cache folder by the files' device, inode, size and modification time.
    """
    known = _known_path(checkpoint)
    if known is not None:
        with suppress(OSError, ValueError):
            text = known.read_text()
            if len(text) == 64 and int(text, 16) >= 0:
                return text
    digest = combine(checkpoint.tensors, tensor_digests(checkpoint, on_progress))
    if known is not None:
        _remember(known, digest)
    return digest


def combine(tensors: Mapping[str, Tensor], digests: Mapping[str, str]) -> str:
    """The content digest from each tensor's own."""
    whole = blake3()
    for name in sorted(tensors):
        tensor = tensors[name]
        whole.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0{digests[name]}\n".encode())
    return whole.hexdigest()


def tensor_digests(
    checkpoint: Checkpoint, on_progress: Callable[[str, int, int], None] | None = None
) -> dict[str, str]:
    """BLAKE3 of each tensor's row-major bytes, by name."""
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    mine = local()
    with Reader([checkpoint]) as reader, ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:

        def one(tensor: Tensor) -> str:
            if not hasattr(mine, "buffer"):
                mine.buffer = np.empty(PIECE, np.uint8)
            return _tensor_digest(tensor, reader, mine.buffer)

        largest_first = sorted(checkpoint.tensors, key=lambda name: -checkpoint.tensors[name].nbytes)
        found = {}
        done = 0
        hashed = pool.map(one, (checkpoint.tensors[name] for name in largest_first))
        for name, digest in zip(largest_first, hashed, strict=True):
            found[name] = digest
            done += checkpoint.tensors[name].nbytes
            if on_progress:
                on_progress(f"hashing {checkpoint.name}", done, total)
        reader.unchanged()
    return found


def _tensor_digest(tensor: Tensor, reader: Reader, buffer: Bytes) -> str:
    digest = blake3()
    if tensor.strides is not None:
        digest.update(reader.dense(tensor).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()
    for start in range(0, tensor.nbytes, PIECE):
        piece = buffer[: min(PIECE, tensor.nbytes - start)]
        reader.into(tensor, start, piece)
        digest.update(piece.data)
    return digest.hexdigest()


def _known_path(checkpoint: Checkpoint) -> Path | None:
    """Where this checkpoint's digest is remembered; None for tensors in memory."""
    files = checkpoint.files()
    if not files or any(
        not isinstance(e.source, Path) for t in checkpoint.tensors.values() for e in t.extents
    ):
        return None
    stamp = "\n".join(" ".join(map(str, now)) for now in checkpoint.stamps_now().values())
    key = blake3(f"{stamp}\n{names_digest(checkpoint.tensors)}".encode()).hexdigest()[:32]
    return cache_dir() / "digests" / key


def _remember(path: Path, digest: str) -> None:
    """A cache that cannot be written is no reason to stop."""
    with suppress(OutputError), whole_file(path, parents=True) as sibling:
        sibling.write_text(digest)
