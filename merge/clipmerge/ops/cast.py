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
U32 = npt.NDArray[np.uint32]


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
    if dtype == "BF16":
        np.left_shift(raw, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")
        return out
    if _has_specials(raw, dtype):
        with np.errstate(invalid="ignore"):  # signalling NaNs
            specials = _table(dtype)[raw] if raw.itemsize == 1 else raw.view(np.float16).astype(np.float32)
            np.copyto(out, specials)
        return out
    return np.multiply(in_place(raw, dtype, out), kind.scale, out=out)


def in_place(raw: npt.NDArray[Any], dtype: str, out: F32) -> F32:
    """Finite fp16 or fp8 as float32 up to the power of two `scale_of(dtype)`: bits moved to where they belong."""
    kind = _NARROW[dtype]
    bits = out.view(np.int32)
    # Sign-extend, move exponent and mantissa into place, drop the copies of the sign in between.
    np.copyto(bits, raw.view(f"i{raw.itemsize}"), casting="unsafe")
    np.left_shift(bits, kind.shift, out=bits)
    mask = 0x80000000 | ((1 << (8 * raw.itemsize - 1)) - 1) << kind.shift
    np.bitwise_and(bits, np.int32(mask - (1 << 32)), out=bits)
    return out


def scale_of(dtype: str) -> float:
    """What `in_place` leaves to multiply by."""
    return float(_NARROW[dtype].scale)


def finite(raw: npt.NDArray[Any], dtype: str) -> bool:
    """Whether every stored element is a finite number."""
    if dtype in _NARROW:
        return not _has_specials(raw, dtype)
    return raw.size == 0 or bool(np.isfinite(raw.max()) and np.isfinite(raw.min()))  # NaN wins both


def narrow(numbers: F64, dtype: str, out: npt.NDArray[Any], spare: tuple[F32, F32, F32]) -> bool:
    """Write `numbers` into `out` as `dtype`, each rounded once to nearest, ties to even.

    Call it under `np.errstate(all="ignore")`: overflow is reported by the answer.

    Args:
        numbers: (n,) float64.
        out: (n,) of the dtype's storage type.
        spare: three working arrays of at least n elements.

    Returns:
        Whether every number written is finite: False for NaN, infinity and overflow (written as such).
    """
    kind = _NARROW.get(dtype)
    if kind is None:
        np.copyto(out, numbers, casting="same_kind")
        return finite(out, dtype)
    single, magnitude, work = (array[: numbers.size] for array in spare)
    np.copyto(single, numbers, casting="same_kind")
    out = out.view(kind.bits)
    np.multiply(single, 1 / kind.scale, out=single)
    wrong = _rounded_twice(single, numbers, kind, work)
    fits = _round_bits(single.view(np.uint32), kind, out, magnitude.view(np.uint32), work.view(np.uint32))
    if not fits:
        return _narrow_specials(numbers, kind, out)
    if wrong.any():
        out[wrong] = _narrow_exactly(numbers[wrong], kind)
    return True


def _rounded_twice(scaled: F32, numbers: F64, kind: _Narrow, work: F32) -> npt.NDArray[np.bool_]:
    """Where float32 rounded a number to exactly between two narrow ones, so that rounding again may go wrong."""
    np.bitwise_and(scaled.view(np.uint32), np.uint32((1 << kind.shift) - 1), out=work.view(np.uint32))
    between = np.equal(work.view(np.uint32), np.uint32(1 << (kind.shift - 1)))
    if between.any():  # some are there by right: the mean of two halves often is
        np.multiply(scaled, kind.scale, out=work)
        between &= work != numbers
    return between


def _round_bits(bits: U32, kind: _Narrow, out: npt.NDArray[Any], magnitude: U32, work: U32) -> bool:
    """Round scaled float32s to the narrow type's bits, ties to even; whether all of them fit. `bits` is used up."""
    half = np.uint32(1 << (kind.shift - 1))
    np.bitwise_and(bits, np.uint32(0x7FFFFFFF), out=magnitude)
    np.right_shift(bits, np.uint32(32 - 8 * out.itemsize), out=bits)
    np.bitwise_and(bits, np.uint32(1 << (8 * out.itemsize - 1)), out=bits)  # the sign, in its place
    np.right_shift(magnitude, np.uint32(kind.shift), out=work)
    np.bitwise_and(work, np.uint32(1), out=work)
    np.add(magnitude, work, out=magnitude)
    np.add(magnitude, half - np.uint32(1), out=magnitude)
    np.right_shift(magnitude, np.uint32(kind.shift), out=magnitude)
    if magnitude.size and magnitude.max() >= kind.infinity:
        return False
    np.bitwise_or(magnitude, bits, out=magnitude)
    np.copyto(out, magnitude, casting="unsafe")
    return True


def _narrow_exactly(numbers: F64, kind: _Narrow) -> npt.NDArray[Any]:
    """The codes of finite numbers in range, rounded in float64: add and subtract a power of two that ends the
    mantissa where the narrow type's ends."""
    exponent = (numbers.view(np.int64) & np.int64(0x7FF0000000000000)).view(np.float64)
    step = np.maximum(exponent, 2.0 ** (1 - kind.bias)) * (1.5 * 2.0 ** (52 - kind.mantissa))
    rounded = ((numbers + step) - step) / float(kind.scale)  # exact in float32: a shift away from the code
    codes = np.abs(rounded).astype(np.float32).view(np.uint32) >> np.uint32(kind.shift)
    sign = np.signbit(numbers).astype(kind.bits) << np.dtype(kind.bits).type(
        np.dtype(kind.bits).itemsize * 8 - 1
    )
    return np.asarray(codes.astype(kind.bits) | sign)


def _narrow_specials(numbers: F64, kind: _Narrow, out: npt.NDArray[Any]) -> bool:
    """The slow path: some numbers are NaN, infinite, or beyond the largest that the type holds."""
    last_step = 2.0 ** (np.floor(np.log2(kind.largest)) - kind.mantissa)
    nan, big = np.isnan(numbers), np.abs(numbers) >= kind.largest + last_step / 2
    out[:] = _narrow_exactly(np.where(nan | big, 0.0, np.clip(numbers, -kind.largest, kind.largest)), kind)
    sign = np.signbit(numbers).astype(out.dtype) << out.dtype.type(8 * out.itemsize - 1)
    out[big] = out.dtype.type(kind.infinity) | sign[big]
    out[nan] = out.dtype.type(kind.nan)
    return not bool(nan.any() or big.any())


def spare_for(count: int) -> tuple[F32, F32, F32]:
    """Working arrays for `narrow`."""
    return np.empty(count, np.float32), np.empty(count, np.float32), np.empty(count, np.float32)


def to_float64(raw: npt.NDArray[Any], dtype: str) -> F64:
    """Stored elements of any dtype as float64, in a new array of the same shape."""
    flat = raw.reshape(-1)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        wide = widen(flat, dtype, np.empty(flat.size, np.float32))
        return wide.astype(np.float64).reshape(raw.shape)


def float32_share(raw: npt.NDArray[Any], dtype: str) -> float:
    """How much of the range in which float32 adds numbers of this dtype exactly its largest number takes.

    Every fp16 is a multiple of 2**-24, and float32 holds all multiples of it up to 1: while the shares of several
    inputs add up to at most 1, so does float32, and no order of adding rounds anything.
    """
    kind = _NARROW[dtype]
    code = _largest_code(raw, kind)
    if code >= kind.infinity:
        return float("inf")
    value = float(np.array([code << kind.shift], np.uint32).view(np.float32)[0] * kind.scale)
    return value / 2.0 ** (24 + 1 - kind.bias - kind.mantissa)


def _has_specials(raw: npt.NDArray[Any], dtype: str) -> bool:
    """NaN or infinity somewhere: the exponent field full (E4M3 spends only one pattern on NaN)."""
    return _largest_code(raw, _NARROW[dtype]) >= _NARROW[dtype].infinity


def _largest_code(raw: npt.NDArray[Any], kind: _Narrow) -> int:
    """The bits of the largest magnitude."""
    if raw.size == 0:
        return 0
    magnitude = (1 << (8 * raw.itemsize - 1)) - 1
    raw = raw.view(kind.bits)
    return max(int(raw.view(f"i{raw.itemsize}").max()), int(raw.max()) & magnitude)


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
