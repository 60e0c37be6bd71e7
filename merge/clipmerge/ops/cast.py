"""Element types: stored bits ↔ numbers, exact one way and rounded once the other way.

numpy knows no bf16 or fp8 and converts fp16 one element at a time. Here every narrow float is widened by
moving its bits into a float32's place (a shift and an exact multiplication) and narrowed by rounding a float32's
bits to nearest even, mended where a float64 had been rounded before. Where the program has imported torch already,
torch converts fp16 and bf16, four times faster; the bits are the same.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from sys import float_info
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U32 = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Rounded:
    """What float32 numbers were rounded from, once.

    Args:
        exactly: indices → those numbers in float64.
        where: the indices of all that may have been rounded; None for any.
    """

    exactly: "Callable[[Any], F64]"
    where: npt.NDArray[np.intp] | None = None


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
_BY_TORCH: Mapping[str, str] = {"F16": "float16", "BF16": "bfloat16"}
"""What torch converts fast, by its own name."""
LARGEST: Mapping[str, float] = {
    "F64": float_info.max,
    "F32": 3.4028234663852886e38,
    **{dtype: kind.largest for dtype, kind in _NARROW.items()},
}
"""The largest finite number of each float dtype."""
FINEST = 4096
"""Into how many parts the smallest number of a narrow dtype may be cut for `narrow` to take it as float32."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """What one thread converts in: arrays as long as a block, and torch if it may be used."""

    single: F32
    magnitude: F32
    work: F32
    flags: npt.NDArray[np.bool_]
    torch: Any = None

    @property
    def nbytes(self) -> int:
        return self.single.nbytes + self.magnitude.nbytes + self.work.nbytes + self.flags.nbytes


def scratch_for(count: int, torch: Any = None) -> Scratch:
    """Working arrays for blocks of at most `count` elements.

    Args:
        torch: the module, where it is imported already and its threads stay out of this one's way.
    """
    single, magnitude, work = (np.empty(count, np.float32) for _ in range(3))
    return Scratch(single, magnitude, work, np.empty((2, count), np.bool_), torch)


def widen(raw: npt.NDArray[Any], dtype: str, scratch: Scratch) -> npt.NDArray[Any]:
    """The stored elements as float32 or float64, exactly.

    Args:
        raw: (n,) elements as stored: BF16, F16 and F8 as unsigned integers of their width.
        dtype: safetensors' name of a float dtype.
        scratch: for at least n elements; the answer may live in its `single`.
    """
    kind = _NARROW.get(dtype)
    if kind is None:
        return raw
    raw = raw.view(kind.bits)
    out = scratch.single[: raw.size]
    if dtype == "BF16" and not scratch.torch:
        np.left_shift(raw, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")
        return out
    if dtype != "BF16" and _has_specials(raw, dtype):
        with np.errstate(invalid="ignore"):  # signalling NaNs
            specials = _table(dtype)[raw] if raw.itemsize == 1 else raw.view(np.float16).astype(np.float32)
            np.copyto(out, specials)
        return out
    scale = widen_finite(raw, dtype, out, scratch.torch)
    return out if scale == 1 else np.multiply(out, np.float32(scale), out=out)


def widen_finite(raw: npt.NDArray[Any], dtype: str, out: F32, torch: Any = None) -> float:
    """Finite narrow floats as float32, up to a power of two: what to multiply `out` by."""
    if torch and dtype in _BY_TORCH:
        torch.from_numpy(out).copy_(_tensor(raw, dtype, torch))
        return 1.0
    kind = _NARROW[dtype]
    bits = out.view(np.int32)
    # Sign-extend, move exponent and mantissa into place, drop the copies of the sign in between.
    np.copyto(bits, raw.view(f"i{raw.itemsize}"), casting="unsafe")
    np.left_shift(bits, kind.shift, out=bits)
    mask = 0x80000000 | ((1 << (8 * raw.itemsize - 1)) - 1) << kind.shift
    np.bitwise_and(bits, np.int32(mask - (1 << 32)), out=bits)
    return float(kind.scale)


def _tensor(raw: npt.NDArray[Any], dtype: str, torch: Any) -> Any:
    """The same memory as a torch tensor."""
    return torch.from_numpy(raw.view(np.int16)).view(getattr(torch, _BY_TORCH[dtype]))


def finite(raw: npt.NDArray[Any], dtype: str) -> bool:
    """Whether every stored element is a finite number."""
    if dtype in _NARROW:
        return not _has_specials(raw, dtype)
    return raw.size == 0 or bool(np.isfinite(raw.max()) and np.isfinite(raw.min()))  # NaN wins both


def narrow(
    numbers: F32 | F64,
    dtype: str,
    out: npt.NDArray[Any],
    scratch: Scratch,
    rounded: Rounded | None = None,
) -> bool:
    """Write `numbers` into `out` as `dtype`, each rounded once to nearest, ties to even.

    Call it under `np.errstate(all="ignore")`: overflow is reported by the answer.

    Args:
        numbers: (n,) of float64; or of float32 outside the scratch: `rounded`, or whole multiples of the dtype's
            smallest number / `FINEST` (means of at most so many numbers of that dtype are).
        out: (n,) of the dtype's storage type.
        scratch: for at least n elements.

    Returns:
        Whether every number written is finite: False for NaN, infinity and overflow (written as such).
    """
    kind = _NARROW.get(dtype)
    if kind is None:
        np.copyto(out, numbers, casting="same_kind")
        return finite(out, dtype)
    out = out.view(kind.bits)
    torch = scratch.torch if dtype in _BY_TORCH else None
    single, scaled, work = (a[: numbers.size] for a in (scratch.single, scratch.magnitude, scratch.work))
    if numbers.dtype == np.float64:
        rounded = Rounded(numbers.__getitem__)
        np.copyto(single, numbers, casting="same_kind")
        numbers = single
    if not torch or (rounded and rounded.where is None):
        np.multiply(numbers, 1 / kind.scale, out=scaled)
    wrong = _rounded_twice(numbers, rounded, kind, scratch) if rounded else None
    if torch:
        _tensor(out, dtype, torch).copy_(torch.from_numpy(numbers))
        fits = finite(out, dtype)
    else:
        fits = _round_bits(scaled.view(np.uint32), kind, out, single.view(np.uint32), work.view(np.uint32))
    if not fits:
        return _narrow_specials(
            rounded.exactly(slice(None)) if rounded else numbers.astype(np.float64), kind, out
        )
    if rounded:
        out[wrong] = _narrow_exactly(rounded.exactly(wrong), kind)
    return True


def _rounded_twice(
    numbers: npt.NDArray[Any], rounded: Rounded, kind: _Narrow, scratch: Scratch
) -> npt.NDArray[np.intp]:
    """Where float32 rounded a number to exactly between two narrow ones, so that rounding again may go wrong."""
    below, half = np.uint32((1 << kind.shift) - 1), np.uint32(1 << (kind.shift - 1))
    if rounded.where is None:  # then `narrow` has scaled the numbers already
        scaled, work = scratch.magnitude[: numbers.size], scratch.work[: numbers.size]
        middle, differs = scratch.flags[:, : numbers.size]
        np.bitwise_and(scaled.view(np.uint32), below, out=work.view(np.uint32))
        np.equal(work.view(np.uint32), half, out=middle)
        if np.count_nonzero(middle) > middle.size // 64:  # too many to look at one by one
            np.multiply(scaled, kind.scale, out=work)
            np.not_equal(work, rounded.exactly(slice(None)), out=differs)
            return np.flatnonzero(np.logical_and(middle, differs, out=middle))
        between = np.flatnonzero(middle)
    else:
        some = numbers[rounded.where] * (1 / kind.scale)
        between = rounded.where[some.view(np.uint32) & below == half]
    # Some are there by right: the mean of two halves often is.
    again = numbers[between] * (1 / kind.scale) * np.float64(kind.scale)
    wrong: npt.NDArray[np.bool_] = again != rounded.exactly(between)
    return between[wrong]


def _round_bits(bits: U32, kind: _Narrow, out: npt.NDArray[Any], magnitude: U32, work: U32) -> bool:
    """Round scaled float32s to the narrow type's bits, ties to even; whether all of them fit."""
    np.bitwise_and(bits, np.uint32(0x7FFFFFFF), out=magnitude)
    np.right_shift(magnitude, np.uint32(kind.shift), out=work)
    np.bitwise_and(work, np.uint32(1), out=work)
    np.add(magnitude, work, out=magnitude)
    np.add(magnitude, np.uint32((1 << (kind.shift - 1)) - 1), out=magnitude)
    np.right_shift(magnitude, np.uint32(kind.shift), out=magnitude)
    if magnitude.size and magnitude.max() >= kind.infinity:
        return False
    np.right_shift(bits, np.uint32(32 - 8 * out.itemsize), out=work)
    np.bitwise_and(work, np.uint32(1 << (8 * out.itemsize - 1)), out=work)  # the sign, in its place
    np.bitwise_or(magnitude, work, out=magnitude)
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
    edge = kind.largest + last_step / 2  # halfway to the next number, if there were one
    size = np.abs(numbers)
    even = kind.infinity % 2 == 1  # the largest number's last bit is 0: halfway goes back to it
    nan, big = np.isnan(numbers), (size > edge) if even else (size >= edge)
    out[:] = _narrow_exactly(np.where(nan | big, 0.0, np.clip(numbers, -kind.largest, kind.largest)), kind)
    sign = np.signbit(numbers).astype(out.dtype) << out.dtype.type(8 * out.itemsize - 1)
    out[big] = out.dtype.type(kind.infinity) | sign[big]
    out[nan] = out.dtype.type(kind.nan)
    return not bool(nan.any() or big.any())


def to_float64(raw: npt.NDArray[Any], dtype: str) -> F64:
    """Stored elements of any dtype as float64, in a new array of the same shape."""
    flat = raw.reshape(-1)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        wide = widen(flat, dtype, scratch_for(flat.size))
        return wide.astype(np.float64).reshape(raw.shape)


def float32_limit(dtype: str) -> float:
    """Up to where float32 holds every multiple of the narrow dtype's smallest number: 1 for fp16."""
    kind = _NARROW[dtype]
    return float(2.0 ** (24 + 1 - kind.bias - kind.mantissa))


def float32_share(raw: npt.NDArray[Any], dtype: str) -> float:
    """How much of `float32_limit` the largest number takes.

    While the shares of several inputs add up to at most 1, so does float32 add them, and no order rounds anything.
    """
    kind = _NARROW[dtype]
    code = _largest_code(raw, kind)
    if code >= kind.infinity:
        return float("inf")
    largest = np.array([code << kind.shift], np.uint32).view(np.float32)[0] * kind.scale
    return float(largest) / float32_limit(dtype)


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
