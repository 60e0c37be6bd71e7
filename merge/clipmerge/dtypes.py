"""Element types: one table of their names, and stored bits ↔ numbers, exact one way and rounded once the other way."""

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from clipmerge.types import Floats

Singles = npt.NDArray[np.float32]


class DType(NamedTuple):
    """An element type: the numpy dtype that holds its bits, torch's name, and its largest number if it is a float."""

    storage: np.dtype[Any]
    torch: str
    largest: float | None = None


TABLE: Mapping[str, DType] = {
    "F64": DType(np.dtype("<f8"), "float64", 1.7976931348623157e308),
    "F32": DType(np.dtype("<f4"), "float32", 3.4028234663852886e38),
    "F16": DType(np.dtype("<f2"), "float16", 65504.0),
    "BF16": DType(np.dtype("<u2"), "bfloat16", 3.3895313892515355e38),
    "F8_E5M2": DType(np.dtype("u1"), "float8_e5m2", 57344.0),
    "F8_E4M3": DType(np.dtype("u1"), "float8_e4m3fn", 448.0),
    "C64": DType(np.dtype("<c8"), "complex64"),
    "I64": DType(np.dtype("<i8"), "int64"),
    "I32": DType(np.dtype("<i4"), "int32"),
    "I16": DType(np.dtype("<i2"), "int16"),
    "I8": DType(np.dtype("i1"), "int8"),
    "U64": DType(np.dtype("<u8"), "uint64"),
    "U32": DType(np.dtype("<u4"), "uint32"),
    "U16": DType(np.dtype("<u2"), "uint16"),
    "U8": DType(np.dtype("u1"), "uint8"),
    "BOOL": DType(np.dtype("?"), "bool"),
}
"""Every dtype that is read and written, by safetensors' name. numpy lacks BF16 and F8: their bits come as unsigned."""

ITEMSIZE: Mapping[str, int] = {name: dtype.storage.itemsize for name, dtype in TABLE.items()}
FLOATS = frozenset(name for name, dtype in TABLE.items() if dtype.largest is not None)
BY_TORCH_NAME: Mapping[str, str] = {dtype.torch: name for name, dtype in TABLE.items()}
"""`float32` → `F32`."""
_NAN_CODE = {"F16": 0x7C00, "BF16": 0x7F80, "F8_E5M2": 0x7C, "F8_E4M3": 0x7F}
"""Codes of finite numbers are smaller, but for their sign."""


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """Return the numpy dtype of the same width; BF16 and F8 come as the unsigned integers that hold their bits."""
    return TABLE[dtype].storage


def torch_dtype(dtype: str) -> Any:
    """Return torch's dtype. Imports torch."""
    import torch

    return getattr(torch, TABLE[dtype].torch)


class Scratch:
    """What one thread converts in: arrays for blocks of at most `count` elements, 16 bytes an element.

    Args:
        torch: the module, where the program has imported it already: it converts F16 four times faster.
    """

    def __init__(self, count: int, torch: Any = None) -> None:
        self.single, self.work = np.empty(count, np.float32), np.empty(count, np.uint32)
        self.wide, self.torch = np.empty(count, np.float64), torch


def finite(raw: npt.NDArray[Any], dtype: str) -> bool:
    """Return whether every stored element is a finite number."""
    if dtype in _NAN_CODE:
        return largest_code(raw) < _NAN_CODE[dtype]
    with np.errstate(all="ignore"):
        if np.isfinite(raw.sum()):  # what is not finite stays so in a sum, and one pass is faster than two
            return True
    return bool(np.isfinite(raw.max()) and np.isfinite(raw.min()))  # or the sum alone is too large


def largest_code(raw: npt.NDArray[Any]) -> int:
    """Return the bits of the largest magnitude among narrow floats: as integers they sort like the numbers."""
    if raw.size == 0:
        return 0
    negative = int(raw.view(f"u{raw.itemsize}").max()) & ((1 << (8 * raw.itemsize - 1)) - 1)
    return max(int(raw.view(f"i{raw.itemsize}").max()), negative)


def widen(raw: npt.NDArray[Any], dtype: str, scratch: Scratch) -> npt.NDArray[Any]:
    """Return stored floats as float32 or float64, exactly.

    Args:
        raw: (n,) elements as stored.
        scratch: for at least n elements; the answer may live in its `single`.
    """
    if dtype not in _NAN_CODE:
        return raw
    out = scratch.single[: raw.size]
    if dtype == "F16" and scratch.torch:
        scratch.torch.from_numpy(out).copy_(scratch.torch.from_numpy(raw.view(np.float16)))
    elif dtype == "F16" and finite(raw, dtype):
        spread_halves(raw, out)
        np.multiply(out, SPREAD, out=out)
    elif raw.itemsize == 1:
        np.take(_values(dtype), raw, out=out, mode="clip")
    else:
        np.copyto(out, raw.view(_numpy_dtype(dtype)), casting="unsafe")
    return out


SPREAD = np.float32(2.0**112)


def spread_halves(raw: npt.NDArray[Any], out: Singles) -> None:
    """Widen finite F16 to float32, up to the factor `SPREAD`: five times faster than numpy.

    Exponent and mantissa move to where a float32 has them. Its exponents count from -127, those of F16 from -15: what
    comes out is 2**112 times too small, which a sum may put right once at its end.
    """
    bits = out.view(np.int32)
    np.copyto(bits, raw.view(np.int16), casting="unsafe")  # fills the upper half with copies of the sign
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(0x8FFFE000 - (1 << 32)), out=bits)  # of which one stays


def to_float64(raw: npt.NDArray[Any], dtype: str) -> Floats:
    """Return stored elements of any dtype as float64, in a new array of the same shape."""
    flat = raw.reshape(-1)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return widen(flat, dtype, Scratch(flat.size)).astype(np.float64).reshape(raw.shape)


def narrow(numbers: npt.NDArray[Any], dtype: str, out: npt.NDArray[Any], scratch: Scratch) -> bool:
    """Write `numbers` into `out` as `dtype`, each rounded once to nearest, ties to even.

    Call it under `np.errstate(all="ignore")`: overflow is reported by the answer.

    Args:
        numbers: (n,) of float64; or of float32 that are exact, or were rounded to odd.
        out: (n,) of the dtype's storage type.
        scratch: for at least n elements; its `single` may hold `numbers` if they are float32.

    Returns:
        Whether every number written is finite: False for NaN, infinity and overflow (written as such).
    """
    if dtype not in _NAN_CODE:
        np.copyto(out, numbers, casting="same_kind")
        return finite(out, dtype)
    single = numbers
    if numbers.dtype == np.float64:
        single = scratch.single[: numbers.size]
        round_to_odd(numbers, single, scratch.wide[: numbers.size])
    if dtype != "F16":
        np.copyto(out.view(_numpy_dtype(dtype)), single, casting="unsafe")
    elif scratch.torch:
        scratch.torch.from_numpy(out.view(np.float16)).copy_(scratch.torch.from_numpy(single))
    else:
        _narrow_to_half(single, out, scratch)
    if dtype == "BF16":
        # Below its smallest normal number float32 has too few digits left to tell on which side of a middle a number
        # was. These few are rounded as multiples of the smallest number of all.
        tiny = np.abs(single) < 2.0**-126
        if tiny.any():
            where = np.flatnonzero(tiny)
            codes = np.rint(np.abs(numbers[where], dtype=np.float64) * 2.0**133).astype(np.uint16)
            out[where] = codes | (np.signbit(numbers[where]).astype(np.uint16) << np.uint16(15))
    return finite(out, dtype)


def round_to_odd(numbers: Floats, out: Singles, work: Floats) -> None:
    """Round float64 to float32 so that rounding again, to a narrower type, gives what rounding once would.

    Source: Boldo and Melquiond 2008, "Emulation of a FMA and correctly rounded sums".
    """
    # Rounding to nearest twice goes wrong where the first time lands exactly in the middle between two narrow numbers:
    # the second time no longer knows on which side of it the number was. So here the digits that are cut off leave a 1
    # in the last digit that stays ("round to odd"): such a number is never taken for a middle. It needs two digits more
    # than the narrow type has, and float32 has them as long as it has all its digits, from 2**-126 on.
    cut = np.uint64((1 << 29) - 1)  # the digits of a float64 that a float32 lacks
    bits, original = work.view(np.uint64), numbers.view(np.uint64)
    np.bitwise_and(original, cut, out=bits)
    np.add(bits, cut, out=bits)  # carries into the last digit that stays if any digit below it is 1
    np.bitwise_or(bits, original, out=bits)
    np.bitwise_and(bits, ~cut, out=bits)
    np.copyto(out, work, casting="same_kind")


def _narrow_to_half(numbers: Singles, out: npt.NDArray[Any], scratch: Scratch) -> None:
    """Round float32 to F16 to nearest, ties to even: as numpy does, twice as fast."""
    bits, work = numbers.view(np.uint32), scratch.work[: numbers.size]
    sign = scratch.wide.view(np.uint32)[: numbers.size]
    np.bitwise_and(bits, np.uint32(0x7FFFFFFF), out=work)
    if work.size and work.max() >= 0x477FF000:  # 65520 and more: infinity, or NaN
        np.copyto(out.view(np.float16), numbers, casting="unsafe")
        return
    small = np.flatnonzero(work < 0x38800000)  # below 2**-14: F16 has fewer digits there
    np.right_shift(work, np.uint32(13), out=sign)
    np.bitwise_and(sign, np.uint32(1), out=sign)
    np.add(work, sign, out=work)
    # Half a step is added, a little less where the last digit is even; exponents count from -15, not from -127.
    np.add(work, np.uint32((1 << 32) + 0x0FFF - (112 << 23)), out=work)
    np.right_shift(work, np.uint32(13), out=work)
    np.right_shift(bits, np.uint32(16), out=sign)
    np.bitwise_and(sign, np.uint32(0x8000), out=sign)
    np.bitwise_or(work, sign, out=work)
    np.copyto(out.view(np.uint16), work, casting="unsafe")
    out.view(np.float16)[small] = numbers[small]


@cache
def _numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype that computes with a narrow float: numpy's own, or one of ml_dtypes, imported at need."""
    if dtype == "F16":
        return np.dtype(np.float16)
    import ml_dtypes

    narrow_dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, TABLE[dtype].torch))
    return narrow_dtype


@cache
def _values(dtype: str) -> Singles:
    """All 256 numbers of an F8 type: looking them up is ten times faster than ml_dtypes."""
    return np.arange(256, dtype=np.uint8).view(_numpy_dtype(dtype)).astype(np.float32)
