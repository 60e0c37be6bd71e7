"""Tensors made of other tensors' bytes: transpose, concatenate, cut. No byte is read, but of strided tensors."""

from collections.abc import Sequence
from math import prod

import numpy as np

from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import Extent, LowRank, Tensor
from clipmerge.dtypes import ITEMSIZE
from clipmerge.types import Bytes


def row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether these strides are those of a dense array in C order."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 0:
            return True
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def transpose(tensor: Tensor) -> Tensor:
    """Exchange the axes of a matrix."""
    rows, columns = tensor.shape
    product = tensor.extents[0].source if len(tensor.extents) == 1 else None
    if isinstance(product, LowRank) and tensor.strides is None:
        return LowRank(transpose(product.a), transpose(product.b), product.scale).tensor((columns, rows))
    tensor = tensor if len(tensor.extents) == 1 else _read(tensor)
    down, across = tensor.strides or (columns, 1)
    strides = None if row_major((columns, rows), (across, down)) else (across, down)
    return Tensor(tensor.dtype, (columns, rows), tensor.extents, strides)


def reshape(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Give the same numbers, in the same order, another shape of as many."""
    return Tensor(tensor.dtype, tuple(shape), _without_strides(tensor).extents)


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Put tensors of one dtype, and of one shape behind the first axis, one below the other."""
    extents = tuple(extent for part in parts for extent in _without_strides(part).extents)
    rows = sum(part.shape[0] for part in parts)
    return Tensor(parts[0].dtype, (rows, *parts[0].shape[1:]), extents)


def split(tensor: Tensor, count: int) -> list[Tensor]:
    """Cut the tensor into `count` equal parts along its first axis."""
    rows = tensor.shape[0] // count
    shape = (rows, *tensor.shape[1:])
    nbytes = prod(shape) * ITEMSIZE[tensor.dtype]
    extents = _without_strides(tensor).extents
    return [Tensor(tensor.dtype, shape, _between(extents, i * nbytes, nbytes)) for i in range(count)]


def _without_strides(tensor: Tensor) -> Tensor:
    """Return the same tensor without strides; one that has them is read into memory."""
    return tensor if tensor.strides is None else _read(tensor)


def _read(tensor: Tensor) -> Tensor:
    with Reader() as reader:
        array = reader.dense(tensor)
    data: Bytes = array.reshape(-1).view(np.uint8)
    return Tensor(tensor.dtype, tensor.shape, (Extent(data, 0, data.size),))


def _between(extents: Sequence[Extent], start: int, nbytes: int) -> tuple[Extent, ...]:
    pieces = []
    for extent in extents:
        begin, end = max(start, 0), min(start + nbytes, extent.nbytes)
        if begin < end:
            pieces.append(Extent(extent.source, extent.offset + begin, end - begin))
        start -= extent.nbytes
    return tuple(pieces)
