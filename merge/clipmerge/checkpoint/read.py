"""Bytes of tensors into buffers that are used again: `pread`, never a mapping.

Mapped inputs would count as resident memory and a file truncated meanwhile would end the process with
SIGBUS; a short `pread` is an error we can name.
"""

import os
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from clipmerge.checkpoint.tensors import Bytes, Mapped, Tensor, storage_dtype
from clipmerge.errors import CheckpointError


class Reader:
    """Open files by path, shared between threads; closed, and checked for changes, at the end."""

    def __init__(self) -> None:
        self._open: dict[Path, tuple[int, os.stat_result]] = {}
        self._lock = Lock()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor, _stat in self._open.values():
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

    def dense(self, tensor: Tensor) -> npt.NDArray[Any]:
        """The whole tensor in row-major order, strides resolved; BF16 and F8 as raw bits."""
        if tensor.strides is not None:
            with Mapped() as mapped:
                return np.array(mapped.array(tensor), order="C", copy=True)
        out = np.empty(tensor.nbytes, np.uint8)
        self.into(tensor, 0, out)
        return out.view(storage_dtype(tensor.dtype)).reshape(tensor.shape)

    def unchanged(self) -> None:
        """Refuse files that were written to while they were read.

        Raises:
            CheckpointError: size or modification time differ from when the file was opened.
        """
        for path, (descriptor, before) in self._open.items():
            now = os.fstat(descriptor)
            if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise CheckpointError(
                    f"{path} changed while it was read", hint="run again when it is complete"
                )

    def _read(self, path: Path, offset: int, out: Bytes) -> None:
        view = out.data
        while view:
            try:
                count = os.preadv(self._descriptor(path), [view], offset)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
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
                    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                    found = self._open[path] = (descriptor, os.fstat(descriptor))
        return found[0]
