"""Sums of fp16 in float32: twice as fast as in float64, and exact."""

from math import frexp
from typing import Any

import numpy as np
import numpy.typing as npt

from clipmerge.dtypes import SPREAD, Scratch, Singles, largest_code, round_to_odd, spread_halves
from clipmerge.types import Floats

FINEST = 4096
"""Sums are divided by powers of two up to here in float32: far from where it has fewer digits."""


class HalfSum:
    """One block's sum, in memory that the next block uses again.

    Args:
        numel: of the longest block.
        scratch: for as many elements.
    """

    def __init__(self, numel: int, scratch: Scratch) -> None:
        self._memory = [np.empty(numel, np.float32) for _ in range(3)]
        self._scratch = scratch
        self._scale = 1.0 if scratch.torch else float(SPREAD)
        self.begin(0)

    def begin(self, numel: int) -> None:
        """Forget the last block; `numel` elements follow."""
        self._parts, self._room, self._spilled = list[Singles](), -1.0, False
        self._arrays = [array[:numel] for array in self._memory]

    def add(self, raw: npt.NDArray[Any], total: Floats, term: Floats) -> bool:
        """Add stored numbers, all of them or, where float32 cannot hold them, none.

        Args:
            total: where the sum goes when it outgrows float32 (see `spill`).
            term: float64 to work in.
        """
        # Why float32 rounds nothing here: every finite fp16 is a whole multiple of its smallest number, 2**-24, and
        # so is every sum of them. Float32 has 24 bits of mantissa, so it holds every such multiple up to 1. While the
        # largest magnitudes of the terms add up to at most 1 (`_room` is what is left of it), no partial sum, in any
        # order, leaves that range, and each addition is exact. What outgrows it goes into a second array, and after
        # that all of it into float64, which is exact up to 2**29.
        largest = float(np.uint16(largest_code(raw)).view(np.float16))
        if not largest <= 1:
            return False
        if largest <= self._room:
            other = self._widen(raw, self._scratch.single[: raw.size])
            np.add(self._parts[-1], other, out=self._parts[-1])
            self._room -= largest
            return True
        if len(self._parts) == 2:
            self.spill(total, term)
        self._parts.append(self._widen(raw, self._arrays[len(self._parts)]))
        self._room = 1.0 - largest
        return True

    def _widen(self, raw: npt.NDArray[Any], out: Singles) -> Singles:
        """Widen to the numbers divided by `_scale`, which is put right once, in `over` or `spill`."""
        if self._scratch.torch:
            self._scratch.torch.from_numpy(out).copy_(self._scratch.torch.from_numpy(raw))
        else:
            spread_halves(raw, out)
        return out

    def over(self, divisor: float) -> Singles | None:
        """Return the sum / divisor, exact or rounded to odd, as `narrow` takes it; None where that wants float64."""
        if self._spilled or not self._parts or frexp(divisor)[0] != 0.5 or divisor > FINEST:
            return None
        out, first, factor = self._arrays[2], self._parts[0], np.float32(self._scale / divisor)
        if len(self._parts) == 1:
            return np.multiply(first, factor, out=out)
        second, magnitude = self._parts[1], self._scratch.single[: out.size]
        np.add(first, second, out=out)
        large = np.flatnonzero(np.abs(out, out=magnitude) >= np.float32(1 / self._scale))
        np.multiply(out, factor, out=out)
        if large.size:
            # A sum above 1 of the two arrays may need more digits than float32 has, and may have been rounded. It is
            # taken again in float64 and rounded to odd, after which `narrow` rounds as if once.
            exact = (first[large].astype(np.float64) + second[large]) * float(factor)
            rounded = np.empty(large.size, np.float32)
            round_to_odd(exact, rounded, np.empty(large.size))
            out[large] = rounded
        return out

    def spill(self, total: Floats, term: Floats) -> None:
        """Move the sum to float64: into `total`, or onto what was moved there before."""
        for part in self._parts:
            np.multiply(part, self._scale, out=term if self._spilled else total, dtype=np.float64)
            if self._spilled:
                np.add(total, term, out=total)
            self._spilled = True
        self._parts, self._room = [], -1.0
