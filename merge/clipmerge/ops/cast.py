"""Element types: stored bits ↔ numbers, exact one way and rounded once the other way.

numpy knows no bf16 or fp8 and converts fp16 one element at a time. Here every narrow float is widened by
moving its bits into a float32's place (a shift and an exact multiplication) and narrowed from float64 by
adding and subtracting a power of two, which rounds to nearest even at the bit that the narrow type keeps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Narrow:
    """A binary float of at most 16 bits: `mantissa` stored bits, exponents biased by `bias`."""

    bits: str
    mantissa: int
    bias: int
    largest: float
    nan: int
    infinity: int  # the NaN where the type has none

    @property
    def shift(self) -> int:
        return 23 - self.mantissa

    @property
    def scale(self) -> np.float32:
        """What a float32 with the same exponent bits must be multiplied by."""
        return np.float32(2.0 ** (127 - self.bias))


_NARROW: Mapping[str, _Narrow] = {
    "F16": _Narrow("<u2", 10, 15, 65504.0, 0x7E00, 0x7C00),
    "BF16": _Narrow("<u2", 7, 127, 3.3895313892515355e38, 0x7FC0, 0x7F80),
    "F8_E5M2": _Narrow("u1", 2, 15, 57344.0, 0x7E, 0x7C),
    "F8_E4M3": _Narrow("u1", 3, 7, 448.0, 0x7F, 0x7F),
}
LARGEST: Mapping[str, float] = {
    "F64": float(np.finfo(np.float64).max),
    "F32": float(np.finfo(np.float32).max),
    **{dtype: kind.largest for dtype, kind in _NARROW.items()},
}
"""The largest finite number of each float dtype."""


def widen(raw: npt.NDArray[Any], dtype: str, scratch: F32) -> npt.NDArray[Any]:
    """The stored elements as float32 or float64, exactly.

    Args:
        raw: (n,) elements as stored: BF16, F16 and F8 as unsigned integers of their width.
        dtype: safetensors' name of a float dtype.
        scratch: at least n float32; the answer may live in it.
    """
    kind = _NARROW.get(dtype)
    if kind is None:
        return raw
    raw = raw.view(kind.bits)
    out = scratch[: raw.size]
    bits = out.view(np.int32)
    if dtype == "BF16":
        np.left_shift(raw, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")
        return out
    # Sign-extend, move exponent and mantissa into place, drop the copies of the sign in between.
    np.copyto(bits, raw.view(f"i{raw.itemsize}"), casting="unsafe")
    np.left_shift(bits, kind.shift, out=bits)
    mask = 0x80000000 | ((1 << (8 * raw.itemsize - 1)) - 1) << kind.shift
    np.bitwise_and(bits, np.int32(mask - (1 << 32)), out=bits)
    if _has_specials(raw, dtype):
        specials = _table(dtype)[raw] if raw.itemsize == 1 else raw.view(np.float16).astype(np.float32)
        np.copyto(out, specials)
        return out
    return np.multiply(out, kind.scale, out=out)


def finite(raw: npt.NDArray[Any], dtype: str) -> bool:
    """Whether every stored element is a finite number."""
    if dtype in _NARROW:
        return not _has_specials(raw, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.add.reduce(raw, axis=None)) or np.isfinite(raw).all())


def narrow(numbers: F64, dtype: str, out: npt.NDArray[Any], scratch: F64) -> bool:
    """Write `numbers` into `out` as `dtype`, each rounded once to nearest, ties to even.

    Args:
        numbers: (n,) float64; used as working space afterwards.
        out: (n,) of the dtype's storage type.
        scratch: at least n float64.

    Returns:
        Whether every number written is finite: False for NaN, infinity and overflow (written as such).
    """
    kind = _NARROW.get(dtype)
    if kind is None:
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(out, numbers, casting="same_kind")
        return finite(out, dtype)
    out = out.view(kind.bits)
    if numbers.size and not (numbers.max() <= kind.largest and numbers.min() >= -kind.largest):
        return _narrow_specials(numbers, dtype, out)
    step = scratch[: numbers.size]
    sign = np.signbit(numbers)  # now: the rounding below turns -0 into 0
    np.bitwise_and(numbers.view(np.int64), np.int64(0x7FF0000000000000), out=step.view(np.int64))
    np.maximum(step, 2.0 ** (1 - kind.bias), out=step)  # below this exponent the spacing stays the same
    np.multiply(step, 1.5 * 2.0 ** (52 - kind.mantissa), out=step)
    np.add(numbers, step, out=numbers)
    np.subtract(numbers, step, out=numbers)
    singles = step.view(np.float32)[: numbers.size]
    np.divide(numbers, float(kind.scale), out=singles, casting="same_kind")
    bits = singles.view(np.uint32)
    np.right_shift(bits, np.uint32(kind.shift), out=bits)
    np.copyto(out, bits, casting="unsafe")
    width = 8 * out.itemsize - 1
    np.bitwise_and(out, out.dtype.type((1 << width) - 1), out=out)
    np.bitwise_or(out, sign.astype(out.dtype) << out.dtype.type(width), out=out)
    return True


def to_float64(raw: npt.NDArray[Any], dtype: str) -> F64:
    """Stored elements of any dtype as float64, in a new array of the same shape."""
    flat = raw.reshape(-1)
    wide = widen(flat, dtype, np.empty(flat.size, np.float32))
    return wide.astype(np.float64).reshape(raw.shape)


def _has_specials(raw: npt.NDArray[Any], dtype: str) -> bool:
    """NaN or infinity somewhere: the exponent field full (E4M3 spends only one pattern on NaN)."""
    if raw.size == 0:
        return False
    kind = _NARROW[dtype]
    raw = raw.view(kind.bits)
    magnitude = (1 << (8 * raw.itemsize - 1)) - 1
    signed = raw.view(f"i{raw.itemsize}")
    return int(signed.max()) >= kind.infinity or (int(raw.max()) & magnitude) >= kind.infinity


def _narrow_specials(numbers: F64, dtype: str, out: npt.NDArray[Any]) -> bool:
    """The slow path: some numbers are NaN, infinite, or beyond the largest that the type holds."""
    kind = _NARROW[dtype]
    last_step = 2.0 ** (np.floor(np.log2(kind.largest)) - kind.mantissa)
    size = np.abs(numbers)
    nan, big = np.isnan(numbers), size >= kind.largest + last_step / 2
    sign = np.signbit(numbers).astype(out.dtype) << out.dtype.type(8 * out.itemsize - 1)
    tame = np.where(nan | big, 0.0, np.clip(numbers, -kind.largest, kind.largest))
    narrow(tame, dtype, out, np.empty(numbers.size))
    out[big] = out.dtype.type(kind.infinity) | sign[big]
    out[nan] = out.dtype.type(kind.nan)
    return not bool(nan.any() or big.any())


def _table(dtype: str) -> F32:
    """All 256 values of an fp8 type."""
    kind = _NARROW[dtype]
    codes = np.arange(256, dtype=np.uint8)
    magnitude = (codes & 0x7F).astype(np.uint32) << np.uint32(kind.shift)
    values = magnitude.view(np.float32) * kind.scale
    special = (codes & 0x7F) >= kind.infinity
    values[special] = (
        np.where((codes[special] & 0x7F) == 0x7C, np.inf, np.nan) if dtype == "F8_E5M2" else np.nan
    )
    return np.where(codes & 0x80, -values, values).astype(np.float32)
