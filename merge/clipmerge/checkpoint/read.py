"""Read tensors: `Reader` into buffers that are used again, `mapped` as pages of the file.

Merging, hashing and converting take a `Reader`: its memory does not grow with the files, and a file that is shortened
meanwhile is an error with a name. Copying a checkpoint into a model takes `mapped`: it needs each tensor whole and
once, and copies it from where it is. Mapped pages count as resident memory, and a file shortened meanwhile would end
the process: nothing that goes through many files maps them.
"""

import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from clipmerge.checkpoint.tensors import Checkpoint, LowRank, Stamp, Tensor, stamp
from clipmerge.dtypes import storage_dtype, to_float64
from clipmerge.errors import CheckpointError
from clipmerge.types import Bytes, Floats

HELD = 64 << 20
"""Bytes of factors that are kept while tensors are computed from them, block by block."""


class Reader:
    """Open files by path, shared between threads; closed at the end.

    Args:
        checkpoints: whose files must still be as they were when their headers were read.
    """

    def __init__(self, checkpoints: Iterable[Checkpoint] = ()) -> None:
        self._expected: dict[Path, set[Stamp]] = {}
        for checkpoint in checkpoints:
            for path, expected in checkpoint.stamps.items():
                self._expected.setdefault(path, set()).add(expected)
        self._open: dict[Path, tuple[int, Stamp]] = {}
        self._lock = Lock()
        self._held: dict[LowRank, tuple[Floats, Floats]] = {}

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
            elif isinstance(extent.source, LowRank):
                self._multiply(extent.source, extent.offset + start, piece)
            else:
                piece[:] = extent.source[extent.offset + start : extent.offset + start + count]
            done += count
            start = 0
            if done == out.size:
                return

    def dense(self, tensor: Tensor) -> npt.NDArray[Any]:
        """Read the whole tensor in row-major order, strides resolved; BF16 and F8 as raw bits."""
        out = np.empty(sum(extent.nbytes for extent in tensor.extents), np.uint8)
        self.into(tensor, 0, out)
        return np.array(tensor.view(out), order="C", copy=tensor.strides is not None)

    def blocks(self, tensor: Tensor, size: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Read a tensor in pieces, in row-major order, strides resolved.

        Yields:
            The first element's number, and at most `size` elements as stored, in memory that the next piece uses again.
        """
        if tensor.strides is not None:
            flat = self.dense(tensor).reshape(-1)
            yield from ((low, flat[low : low + size]) for low in range(0, flat.size, size))
            return
        buffer = np.empty(min(size, tensor.numel), storage_dtype(tensor.dtype))
        for low in range(0, tensor.numel, size):
            block = buffer[: tensor.numel - low]
            self.into(tensor, low * buffer.itemsize, block.view(np.uint8))
            yield low, block

    def factors(self, product: LowRank) -> tuple[Floats, Floats]:
        """Read scale·B and A in float64."""
        held = self._held.get(product)
        if held is None:
            b, a = (
                to_float64(self.dense(t).reshape(-1), t.dtype).reshape(t.shape)
                for t in (product.b, product.a)
            )
            held = b * product.scale, a
            with self._lock:
                if sum(x.nbytes + y.nbytes for x, y in (*self._held.values(), held)) > HELD:
                    self._held.clear()
                self._held[product] = held
        return held

    def _multiply(self, product: LowRank, start: int, out: Bytes) -> None:
        """Fill `out` with bytes of the product, from byte `start` on."""
        b, a = self.factors(product)
        width, low, high = a.shape[1], start // 4, (start + out.size) // 4
        top = low // width
        rows = b[top : -(-high // width)]
        # In float64, so that neither the order of the sum nor where a block ends shows in the float32.
        block = np.matmul(rows, a).astype(np.float32).reshape(-1)
        out[:] = block[low - top * width : high - top * width].view(np.uint8)

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
        opened = self._open.get(path)
        if opened is None:
            with self._lock:
                opened = self._open.get(path)
                if opened is None:
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    opened = (descriptor, stamp(os.fstat(descriptor)))
                    if self._expected.get(path, {opened[1]}) != {opened[1]}:
                        os.close(descriptor)  # no other thread may read it
                        raise CheckpointError(
                            f"{path} changed after it was opened", hint="load it again when it is complete"
                        )
                    self._open[path] = opened
        return opened[0]


def mapped(tensor: Tensor, maps: dict[Path, Bytes]) -> npt.NDArray[Any]:
    """Return a tensor as pages of its file, read-only; copied only where it has several extents.

    A file that is shorter than a header promises is refused here, not met as SIGBUS in the middle of a merge.

    Args:
        maps: the files that are mapped already; they stay so for as long as this lives.
    """
    if any(isinstance(extent.source, LowRank) for extent in tensor.extents):
        with Reader() as reader:
            return reader.dense(tensor)
    parts = [np.empty(0, np.uint8)]
    for extent in tensor.extents:
        path = extent.source
        if isinstance(path, Path) and path not in maps:
            try:
                is_empty = path.stat().st_size == 0  # which no system maps
                maps[path] = np.empty(0, np.uint8) if is_empty else np.asarray(np.memmap(path, np.uint8, "r"))
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        whole = maps[path] if isinstance(path, Path) else np.asarray(path)
        if extent.offset + extent.nbytes > whole.size:
            raise CheckpointError(
                f"{path} ends at byte {whole.size}, its header promises {extent.offset + extent.nbytes}",
                hint="the file is truncated or was changed while it was read; copy it again",
            )
        parts.append(whole[extent.offset : extent.offset + extent.nbytes])
    return tensor.view(parts[1] if len(parts) == 2 else np.concatenate(parts))
