"""One checkpoint from one layout to another: names and views change, bytes do not."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from clipmerge.checkpoint.huggingface import to_huggingface
from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import Bytes, Checkpoint, Tensor
from clipmerge.checkpoint.write import check_target, header, new_files, write_at
from clipmerge.errors import CheckpointError

LAYOUTS = ("open_clip", "huggingface")
BLOCK = 1 << 20

Progress = Callable[[str, int, int], None]


def convert(
    checkpoint: Checkpoint, path: Path, to: str, *, force: bool = False, on_progress: Progress | None = None
) -> Path:
    """Write the checkpoint as one safetensors file under the names of `to`; the path that was written.

    Raises:
        MismatchError: a tensor has no place in the other layout.
        OutputError: the output exists, is the input, or cannot be written.
    """
    if to not in LAYOUTS:
        raise CheckpointError(
            f"there is no layout {to!r} to convert to", hint=f"one of: {', '.join(LAYOUTS)}"
        )
    tensors = to_huggingface(checkpoint.tensors) if to == "huggingface" else checkpoint.tensors
    real = check_target(path, force=force, inputs=checkpoint.files())
    head, offsets, size = header(tensors, {"format": "pt", **checkpoint.metadata})
    with Reader() as reader, new_files([(real, size)], force=force) as (descriptor,):
        write_at(descriptor, head, 0, real)
        done = len(head)
        for offset, piece in _pieces(tensors, offsets, reader):
            write_at(descriptor, piece.data, offset, real)
            done += piece.size
            if on_progress:
                on_progress("converting", done, size)
        reader.unchanged()
    return real


def _pieces(
    tensors: Mapping[str, Tensor], offsets: Mapping[str, int], reader: Reader
) -> Iterator[tuple[int, Bytes]]:
    """All bytes with their places in the file, in pieces of one buffer that is used again."""
    buffer = np.empty(BLOCK, np.uint8)
    for name, offset in offsets.items():
        tensor = tensors[name]
        if tensor.strides is not None:
            yield offset, reader.dense(tensor).reshape(-1).view(np.uint8)
            continue
        for start in range(0, tensor.nbytes, BLOCK):
            piece = buffer[: min(BLOCK, tensor.nbytes - start)]
            reader.into(tensor, start, piece)
            yield offset + start, piece
