"""Sums of fp16 and fp8 in float32: twice as fast as in float64, and exact.

Why float32 rounds nothing here, with fp16's numbers (the fp8 types have fewer digits):

- Every finite fp16 is a whole multiple of its smallest number, 2**-24.
- Float32 has 24 bits of mantissa, so it holds every multiple of 2**-24 up to 1 (`float32_limit`).
- Multiples of 2**-24 add up to multiples of 2**-24. While the largest magnitudes of the terms add up to at most 1
  (each term's `float32_share`), no partial sum in any order leaves that range, and each addition is exact.

Where the magnitudes outgrow that, the rest goes into a second array, and after that all of it into float64, which is
exact up to 2**29. What the division rounds, `narrow` is told (`Rounded`) and decides in float64.

The arrays hold fp16's bits moved into a float32's place, which is the number times 2**-112: a power of two that is
multiplied back together with the divisor. Float32 subnormals are numbers here (`blocks.in_threads` sees to that).
"""

from math import frexp
from typing import Any

import numpy as np
import numpy.typing as npt

from clipmerge.ops.cast import F32, F64, FINEST, Rounded, Scratch, float32_limit, float32_share, widen_finite

SUMMED = ("F16", "F8_E4M3", "F8_E5M2")
"""Dtypes with so few digits that float32 adds many of them without rounding."""


class Fp16Sum:
    """One block's sum, in memory that the next block uses again.

    Args:
        numel: of the longest block.
        scratch: for as many elements.
    """

    def __init__(self, numel: int, scratch: Scratch) -> None:
        self._memory = [np.empty(numel, np.float32) for _ in range(3)]
        self._scratch = scratch
        self.begin(0, "")

    @property
    def nbytes(self) -> int:
        """Its own memory, without the scratch."""
        return sum(array.nbytes for array in self._memory)

    def begin(self, numel: int, dtype: str) -> None:
        """Forget the last block; `numel` elements of `dtype` follow."""
        self._dtype, self._parts, self._room, self._scale = dtype, list[F32](), -1.0, 1.0
        self._arrays = [array[:numel] for array in self._memory]
        self._spilled = False

    def add(self, raw: npt.NDArray[Any], total: F64, term: F64) -> bool:
        """Add stored numbers, all of them or, where float32 cannot hold them, none.

        Args:
            total: where the sum goes when it outgrows float32 (see `spill`).
            term: float64 to work in.
        """
        share = float32_share(raw, self._dtype)
        if share > 1:
            return False
        if share <= self._room:
            other = self._scratch.single[: raw.size]
            widen_finite(raw, self._dtype, other, self._scratch.torch)
            np.add(self._parts[-1], other, out=self._parts[-1])
            self._room -= share
            return True
        if len(self._parts) == 2:
            self.spill(total, term)
        part = self._arrays[len(self._parts)]
        self._scale = widen_finite(raw, self._dtype, part, self._scratch.torch)
        self._parts.append(part)
        self._room = 1.0 - share
        return True

    def over(self, divisor: float) -> tuple[F32, Rounded | None] | None:
        """The sum / divisor as `narrow` takes it for the same dtype; None where that wants float64."""
        power = frexp(divisor)[0] == 0.5 and divisor <= FINEST
        if self._spilled or not self._parts or not (power or (len(self._parts) == 1 and divisor < 2**24)):
            return None
        scale, first, out = self._scale, self._parts[0], self._arrays[2]
        if power and len(self._parts) == 1:
            return np.multiply(first, np.float32(scale / divisor), out=out), None
        if power:
            second = self._parts[1]
            np.add(first, second, out=out)
            limit = np.float32(float32_limit(self._dtype) / scale)
            large = np.flatnonzero(np.abs(out, out=self._scratch.single[: out.size]) > limit)
            np.multiply(out, np.float32(scale / divisor), out=out)
            return out, Rounded(
                lambda some: (first[some].astype(np.float64) + second[some]) * (scale / divisor), large
            )
        np.multiply(first, np.float32(scale), out=first)
        np.divide(first, np.float32(divisor), out=out)
        return out, Rounded(lambda some: first[some] / np.float64(divisor))

    def spill(self, total: F64, term: F64) -> None:
        """Move the sum to float64: into `total`, or onto what was moved there before."""
        for part in self._parts:
            if self._scale != 1:
                np.multiply(part, np.float32(self._scale), out=part)
            np.copyto(term if self._spilled else total, part)
            if self._spilled:
                np.add(total, term, out=total)
            self._spilled = True
        self._parts, self._room = [], -1.0
