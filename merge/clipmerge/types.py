"""Type names that several rooms share."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Bools", "Bytes", "Floats", "Ints", "Pixels", "Progress", "Reals"]

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called as (what, done, total) while something long runs; the command turns it into bars."""

Array: TypeAlias = Any
"""Float64, of numpy or, on a GPU, of torch: what is written in the terms of Python's array API runs on both."""
Bools: TypeAlias = npt.NDArray[np.bool_]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Reals: TypeAlias = npt.NDArray[np.floating[Any]]
"""Float32 or float64."""
Pixels: TypeAlias = npt.NDArray[np.uint8]
"""Images as a model sees them before normalisation: (n, 3, height, width)."""
