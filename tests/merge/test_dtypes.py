"""Stored bits and numbers: every code of every narrow type, against torch, with torch's help and without."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmerge.dtypes import (
    TABLE,
    Scratch,
    finite,
    narrow,
    storage_dtype,
    to_float64,
    torch_dtype,
    widen,
)

NARROW = ["BF16", "F16", "F8_E4M3", "F8_E5M2"]
LARGEST = {name: dtype.largest for name, dtype in TABLE.items() if dtype.largest is not None}
PARTS = 4096
"""Means of at most so many numbers are multiples of the smallest number / so many."""
Narrowed = Callable[[npt.ArrayLike, str], tuple[npt.NDArray[np.generic], bool]]


@pytest.fixture(scope="module", params=[None, torch], ids=["numpy", "torch"])
def scratch(request: pytest.FixtureRequest) -> Scratch:
    """Conversions by numpy alone, and by torch where it is the faster."""
    return Scratch(1 << 18, request.param)


def codes(dtype: str) -> npt.NDArray[np.generic]:
    """Every bit pattern of a narrow type."""
    width = storage_dtype("U16" if dtype in ("F16", "BF16") else "U8")
    return np.arange(1 << (8 * width.itemsize), dtype=width)


def smallest(dtype: str) -> float:
    """The smallest number above 0."""
    return float(to_float64(np.ones(1, codes(dtype).dtype), dtype)[0]) if dtype in NARROW else 2.0**-1000


def by_torch(raw: npt.NDArray[np.generic], dtype: str) -> npt.NDArray[np.float32]:
    return torch.from_numpy(raw.copy()).view(torch_dtype(dtype)).float().numpy()


def rounded_by_torch(numbers: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.generic]:
    """float32 → narrow: one rounding, which torch does right."""
    unsigned = torch.uint16 if dtype in ("F16", "BF16") else torch.uint8
    return torch.from_numpy(numbers.copy()).to(torch_dtype(dtype)).view(unsigned).numpy()


@pytest.fixture(scope="module")
def narrowed(scratch: Scratch) -> Narrowed:
    """(codes, whether all are finite): from float64, and from float32 alike where that is exact."""

    def narrowed(numbers: npt.ArrayLike, dtype: str) -> tuple[npt.NDArray[np.generic], bool]:
        array = np.array(numbers, np.float64)
        out = np.empty(array.size, storage_dtype(dtype))
        with np.errstate(all="ignore"):
            every = narrow(array, dtype, out, scratch)
            single = array.astype(np.float32)
            if np.array_equal(single, array, equal_nan=True):
                again = np.empty_like(out)
                assert narrow(single, dtype, again, scratch) == every
                assert again.tobytes() == out.tobytes()
                assert np.array_equal(single, array, equal_nan=True)  # it is not used up
        return out.view(codes(dtype).dtype) if dtype in NARROW else out, every

    return narrowed


@pytest.mark.parametrize("dtype", NARROW)
def test_every_code_widens_to_its_number(dtype: str, scratch: Scratch) -> None:
    raw = codes(dtype)
    got = widen(raw, dtype, scratch)
    np.testing.assert_array_equal(got, by_torch(raw, dtype))
    np.testing.assert_array_equal(to_float64(raw, dtype), by_torch(raw, dtype))


@pytest.mark.parametrize("dtype", NARROW)
def test_every_finite_code_widens_bit_for_bit_where_nothing_special_is_near(
    dtype: str, scratch: Scratch
) -> None:
    """The fast path: no NaN or infinity among the elements; the sign of zero counts."""
    raw = codes(dtype)
    raw = raw[np.isfinite(by_torch(raw, dtype))]
    got = widen(raw, dtype, scratch)
    np.testing.assert_array_equal(got.view(np.uint32), by_torch(raw, dtype).view(np.uint32))


@pytest.mark.parametrize("dtype", NARROW)
def test_every_finite_code_survives_the_round_trip(dtype: str, narrowed: Narrowed) -> None:
    raw = codes(dtype)
    raw = raw[np.isfinite(by_torch(raw, dtype))]
    back, every = narrowed(to_float64(raw, dtype), dtype)
    assert every
    np.testing.assert_array_equal(back, raw)


@pytest.mark.parametrize("dtype", NARROW)
def test_every_code_is_finite_exactly_where_torch_says_so(dtype: str) -> None:
    raw = codes(dtype)
    numbers = np.isfinite(by_torch(raw, dtype))
    assert finite(raw[numbers], dtype)
    for special in raw[~numbers]:
        assert not finite(np.array([0, special], raw.dtype), dtype)


@pytest.mark.parametrize("dtype", NARROW)
def test_random_numbers_round_as_torch_rounds_them(dtype: str, narrowed: Narrowed) -> None:
    rng = np.random.default_rng(0)
    spread = np.exp2(rng.uniform(-40, 16, 100_000))
    numbers = (rng.standard_normal(100_000) * spread).astype(np.float32)
    numbers = numbers[np.abs(numbers) < LARGEST[dtype]]
    out, every = narrowed(numbers, dtype)
    assert every
    np.testing.assert_array_equal(out, rounded_by_torch(numbers, dtype))


@pytest.mark.parametrize("dtype", NARROW)
def test_midpoints_go_to_even_and_their_neighbours_do_not(dtype: str, narrowed: Narrowed) -> None:
    raw = codes(dtype)
    numbers = np.unique(by_torch(raw, dtype)[np.isfinite(by_torch(raw, dtype))].astype(np.float64))
    middles = (numbers[1:] + numbers[:-1]) / 2
    exact = middles[middles.astype(np.float32) == middles].astype(np.float32)
    np.testing.assert_array_equal(narrowed(exact, dtype)[0], rounded_by_torch(exact, dtype))
    # One float64 step off the middle decides, although float32 cannot tell it from the middle.
    above, below = np.nextafter(middles, np.inf), np.nextafter(middles, -np.inf)
    np.testing.assert_array_equal(to_float64(narrowed(above, dtype)[0], dtype), numbers[1:])
    np.testing.assert_array_equal(to_float64(narrowed(below, dtype)[0], dtype), numbers[:-1])


@pytest.mark.parametrize("dtype", NARROW)
def test_what_does_not_fit_is_written_as_such_and_told(dtype: str, narrowed: Narrowed) -> None:
    largest, special = LARGEST[dtype], np.nan if dtype == "F8_E4M3" else np.inf
    out, every = narrowed([1.0, np.nan, np.inf, -np.inf, 1e39, -1e39, largest, -largest], dtype)
    assert not every
    expected = [1.0, np.nan, special, -special, special, -special, largest, -largest]
    np.testing.assert_array_equal(to_float64(out, dtype), expected)


@pytest.mark.parametrize("dtype", NARROW)
def test_what_overflows_does_not_change_its_neighbours(dtype: str, narrowed: Narrowed) -> None:
    """Halfway above the largest number: E4M3's is even and takes it, the others' are odd and pass it on."""
    largest = LARGEST[dtype]
    below = to_float64(
        rounded_by_torch(np.float32([largest]), dtype) - np.array(1, codes(dtype).dtype), dtype
    )[0]
    edge = largest + (largest - below) / 2
    near = [edge, -edge, np.nextafter(edge, 0), np.nextafter(edge, np.inf), largest, 1.0]
    alone = [narrowed([number], dtype)[0][0] for number in near]
    together, every = narrowed([*near, 1e39], dtype)
    assert not every
    np.testing.assert_array_equal(together[:-1], alone)
    assert np.isfinite(to_float64(together[:1], dtype)[0]) == (dtype == "F8_E4M3")


@pytest.mark.parametrize("dtype", NARROW)
def test_a_little_over_the_largest_still_rounds_down(dtype: str, narrowed: Narrowed) -> None:
    largest = LARGEST[dtype]
    out, every = narrowed([np.nextafter(largest, np.inf)], dtype)
    assert every
    assert to_float64(out, dtype)[0] == largest


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_wide_types_are_stored_as_numpy_stores_them(dtype: str, narrowed: Narrowed) -> None:
    numbers = [0.1, -0.0, 1e-300, 3.0]
    out, every = narrowed(numbers, dtype)
    assert every
    assert out.tobytes() == np.array(numbers).astype(storage_dtype(dtype)).tobytes()
    assert narrowed([np.inf], dtype)[1] is False
    assert narrowed([np.nan, 1.0], dtype)[1] is False


def test_overflow_of_float32_is_told(narrowed: Narrowed) -> None:
    assert narrowed([1e39], "F32")[1] is False
    assert narrowed([LARGEST["F32"]], "F32")[1] is True


@pytest.mark.parametrize("dtype", [*NARROW, "F32", "F64"])
def test_nothing_is_finite_and_rounds_to_nothing(dtype: str, narrowed: Narrowed, scratch: Scratch) -> None:
    empty = np.empty(0, storage_dtype(dtype))
    assert finite(empty, dtype)
    assert narrowed([], dtype)[1]
    assert widen(empty, dtype, scratch).size == 0


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("parts", [1, 2, PARTS])
def test_means_round_the_same_from_float32(dtype: str, parts: int, narrowed: Narrowed) -> None:
    """`narrowed` compares; down to parts of the smallest number, and midpoints among them."""
    step = smallest(dtype) / parts
    counts = np.concatenate([np.arange(5000), 2 ** np.arange(24) + 1, 2 ** np.arange(24) * 3 // 2])
    numbers = counts[counts * step <= LARGEST[dtype]] * step
    assert narrowed(np.concatenate([numbers, -numbers]), dtype)[1]


@pytest.mark.parametrize("dtype", NARROW)
def test_numbers_far_below_the_smallest_normal_one_round_once(dtype: str, narrowed: Narrowed) -> None:
    """A hair above and below every middle between two subnormal numbers: closer than float32 can tell."""
    step = smallest(dtype)
    middles = (np.arange(300) + 0.5) * step
    below = narrowed(np.nextafter(middles, 0), dtype)[0]
    above = narrowed(np.nextafter(middles, 1), dtype)[0]
    few = np.arange(300) < (1 << {"BF16": 7, "F16": 10, "F8_E4M3": 3, "F8_E5M2": 2}[dtype])
    np.testing.assert_array_equal(to_float64(below, dtype)[few] / step, np.arange(300)[few])
    np.testing.assert_array_equal(to_float64(above, dtype)[few] / step, np.arange(300)[few] + 1)
    negative = narrowed(-np.nextafter(middles, 1), dtype)[0]
    np.testing.assert_array_equal(to_float64(negative, dtype)[few] / step, -np.arange(300)[few] - 1)


@settings(deadline=None, max_examples=60)
@given(numbers=st.lists(st.floats(-60000, 60000, allow_subnormal=True), min_size=1, max_size=30))
def test_halves_round_once_from_float64_as_numpy_does(numbers: list[float], narrowed: Narrowed) -> None:
    """numpy's double → half rounds once; torch's rounds twice and would fail here."""
    out, _ = narrowed(numbers, "F16")
    np.testing.assert_array_equal(out.view(np.float16), np.array(numbers).astype(np.float16))
