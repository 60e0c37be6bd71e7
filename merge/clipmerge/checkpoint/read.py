"""Bytes of tensors into buffers that are used again: `pread`, never a mapping.

Mapped inputs would count as resident memory and a file truncated meanwhile would end the process with
SIGBUS; a short `pread` is an error we can name.
"""

import errno
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from clipmerge.checkpoint.tensors import Checkpoint, Stamp, Tensor, stamp
from clipmerge.dtypes import storage_dtype
from clipmerge.errors import CheckpointError
from clipmerge.types import Bytes


class Reader:
    """Open files by path, shared between threads; closed at the end.

    Args:
        checkpoints: whose files must still be as they were when their headers were read.
    """

    def __init__(self, checkpoints: Iterable[Checkpoint] = ()) -> None:
        self._expected: dict[Path, set[Stamp]] = {}
        for checkpoint in checkpoints:
            for path, found in checkpoint.stamps.items():
                self._expected.setdefault(path, set()).add(found)
        self._open: dict[Path, tuple[int, Stamp]] = {}
        self._lock = Lock()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor, _stamp in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def into(self, tensor: Tensor, start: int, out: Bytes) -> None:
        """Fill `out` with the tensor's stored bytes from byte `start` on (row-major tensors only).

        Raises:
            CheckpointError: the file cannot be read or ends too early.
        """
        done = 0
        for extent in tensor.extents:
            if start >= extent.nbytes:
                start -= extent.nbytes
                continue
            count = min(extent.nbytes - start, out.size - done)
            piece = out[done : done + count]
            if isinstance(extent.source, Path):
                self._read(extent.source, extent.offset + start, piece)
            else:
                piece[:] = extent.source[extent.offset + start : extent.offset + start + count]
            done += count
            start = 0
            if done == out.size:
                return

    def head(self, tensor: Tensor, count: int) -> bytes:
        """The first elements in row-major order, strides resolved: at most `count` bytes of them."""
        if tensor.strides is None:
            out = np.empty(min(count, tensor.nbytes), np.uint8)
            self.into(tensor, 0, out)
            return out.tobytes()
        size = storage_dtype(tensor.dtype).itemsize
        element = np.empty(size, np.uint8)
        found = []
        for index in islice(np.ndindex(tensor.shape), count // size):
            at = sum(i * step for i, step in zip(index, tensor.strides, strict=True))
            self.into(tensor, at * size, element)
            found.append(element.tobytes())
        return b"".join(found)

    def dense(self, tensor: Tensor) -> npt.NDArray[Any]:
        """The whole tensor in row-major order, strides resolved; BF16 and F8 as raw bits."""
        dtype = storage_dtype(tensor.dtype)
        out = np.empty(sum(extent.nbytes for extent in tensor.extents), np.uint8)
        self.into(tensor, 0, out)
        flat = out.view(dtype)
        if tensor.strides is None:
            return flat.reshape(tensor.shape)
        apart = tuple(step * dtype.itemsize for step in tensor.strides)
        return np.array(np.lib.stride_tricks.as_strided(flat, tensor.shape, apart), order="C", copy=True)

    def blocks(self, tensor: Tensor, size: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Read a tensor of any layout in order: (first element, at most `size` stored elements).

        They are valid until the next block is read.
        """
        dtype = storage_dtype(tensor.dtype)
        dense = None if tensor.strides is None else self.dense(tensor).reshape(-1)
        buffer = np.empty(min(size, tensor.numel) if dense is None else 0, dtype)
        for low in range(0, tensor.numel, size):
            count = min(size, tensor.numel - low)
            if dense is None:
                self.into(tensor, low * dtype.itemsize, buffer[:count].view(np.uint8))
            yield low, buffer[:count] if dense is None else dense[low : low + count]

    def unchanged(self) -> None:
        """Refuse files that were written to while they were read.

        Raises:
            CheckpointError: size or modification time differ from when the file was opened.
        """
        for path, (descriptor, before) in self._open.items():
            if stamp(os.fstat(descriptor)) != before:
                raise CheckpointError(
                    f"{path} changed while it was read", hint="run again when it is complete"
                )

    def _read(self, path: Path, offset: int, out: Bytes) -> None:
        view = out.data
        while view:
            try:
                count = os.preadv(self._descriptor(path), [view], offset)
            except OSError as error:
                full = error.errno in (errno.EMFILE, errno.ENFILE)
                hint = "let it open more files: ulimit -n 4096" if full else None
                raise CheckpointError(f"{path} cannot be read: {error.strerror}", hint=hint) from error
            if count == 0:
                raise CheckpointError(
                    f"{path} ends at byte {offset}, before the end that its header promises",
                    hint="the file is truncated or was changed while it was read; copy it again",
                )
            view = view[count:]
            offset += count

    def _descriptor(self, path: Path) -> int:
        found = self._open.get(path)
        if found is None:
            with self._lock:
                found = self._open.get(path)
                if found is None:
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    found = (descriptor, stamp(os.fstat(descriptor)))
                    if self._expected.get(path, {found[1]}) != {found[1]}:
                        os.close(descriptor)  # no other thread may read it
                        raise CheckpointError(
                            f"{path} changed after it was opened", hint="load it again when it is complete"
                        )
                    self._open[path] = found
        return found[0]
