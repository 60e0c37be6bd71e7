"""NaN, infinities and overflow: refused and located, or let through as they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipmerge.errors import NonFiniteError
from clipmerge.weights.weights import Weights, interpolate, load, mean

Put = Callable[..., Path]
Stored = Callable[[Path], dict[str, Any]]

# dtype → (unsigned integer of its width, 1.0, largest, NaN, infinity or None), as bits
FORMATS: dict[str, tuple[str, int, int, int, int | None]] = {
    "F64": ("<u8", 0x3FF0000000000000, 0x7FEFFFFFFFFFFFFF, 0x7FF8000000000000, 0x7FF0000000000000),
    "F32": ("<u4", 0x3F800000, 0x7F7FFFFF, 0x7FC00000, 0x7F800000),
    "F16": ("<u2", 0x3C00, 0x7BFF, 0x7E00, 0x7C00),
    "BF16": ("<u2", 0x3F80, 0x7F7F, 0x7FC0, 0x7F80),
    "F8_E5M2": ("u1", 0x3C, 0x7B, 0x7E, 0x7C),
    "F8_E4M3": ("u1", 0x38, 0x7E, 0x7F, None),
}
ROWS, COLUMNS = 300, 300  # several pieces of work


def _bits(dtype: str, marks: dict[int, int], rows: int = ROWS) -> tuple[str, tuple[int, ...], bytes]:
    """A tensor of ones, but for these bits at these places."""
    kind, one, *_ = FORMATS[dtype]
    array = np.full(rows * COLUMNS, one, kind)
    for place, bits in marks.items():
        array[place] = bits
    return dtype, (rows, COLUMNS), array.tobytes()


def _bad(dtype: str) -> list[int]:
    """NaN, a signalling or negative NaN, and both infinities."""
    kind, _, _, nan, infinity = FORMATS[dtype]
    sign = 1 << (8 * np.dtype(kind).itemsize - 1)
    return [nan, nan | sign] + ([infinity, infinity | sign, infinity | 1] if infinity is not None else [])


CASES = [(dtype, bits) for dtype in FORMATS for bits in _bad(dtype)]


def _merges(bad: Weights, good: Weights) -> dict[str, Weights]:
    return {
        "copy": bad,
        "mean of one": mean([bad]),
        "mean": mean([good, bad]),
        "interpolation": interpolate(good, bad, 0.3),
        "difference": bad - good,
        "negation": good - 0.5 * (bad - good),
        "of three": mean([good, bad, good + 0.1 * (bad - good)]),
    }


@pytest.mark.parametrize(("dtype", "bits"), CASES)
def test_every_merge_refuses_what_is_not_finite_and_says_where(
    tmp_path: Path, put: Put, dtype: str, bits: int
) -> None:
    place = 123 * COLUMNS + 45
    bad = put(
        tmp_path / "bad.st", fine=_bits(dtype, {}, 2), w=_bits(dtype, {place: bits, place + 1000: bits})
    )
    good = put(tmp_path / "good.st", fine=_bits(dtype, {}, 2), w=_bits(dtype, {}))
    for kind, merged in _merges(load(bad), load(good)).items():
        with pytest.raises(NonFiniteError) as caught:
            merged.save(tmp_path / "out", digests=False)
        said = f"{bad}: tensor 'w' holds 2 values that are not finite, the first at [123, 45]"
        assert caught.value.message == said, kind
        assert caught.value.hint is not None
        assert "--allow-nonfinite" in caught.value.hint
        assert not (tmp_path / "out").exists(), kind


@pytest.mark.parametrize(("dtype", "bits"), CASES)
def test_allow_nonfinite_copies_them_bit_for_bit(
    tmp_path: Path, put: Put, stored: Stored, dtype: str, bits: int
) -> None:
    entry = _bits(dtype, {7: bits, ROWS * COLUMNS - 1: bits})
    bad, good = load(put(tmp_path / "bad.st", w=entry)), load(put(tmp_path / "good.st", w=_bits(dtype, {})))
    for merged in (bad, mean([bad]), interpolate(bad, good, {"*": 0.0}), good + 1 * (bad - good)):
        assert (
            stored(merged.save(tmp_path / "out", force=True, digests=False, allow_nonfinite=True))["w"]
            == entry
        )


@pytest.mark.parametrize("dtype", FORMATS)
def test_allow_nonfinite_keeps_nan_nan_and_infinity_infinity_through_arithmetic(
    tmp_path: Path, put: Put, stored: Stored, dtype: str
) -> None:
    kind, one, _, nan, infinity = FORMATS[dtype]
    sign = 1 << (8 * np.dtype(kind).itemsize - 1)
    marks = {3: nan, 70_000: nan | sign}
    if infinity is not None:
        marks |= {5: infinity, 80_000: infinity | sign}
    bad, good = (
        load(put(tmp_path / "bad.st", w=_bits(dtype, marks))),
        load(put(tmp_path / "ok", w=_bits(dtype, {}))),
    )
    for merged in (
        mean([bad, good]),
        interpolate(good, bad, 0.25),
        mean([bad, good, good + 0.5 * (bad - good)]),
    ):
        found = stored(merged.save(tmp_path / "out", force=True, digests=False, allow_nonfinite=True))["w"]
        array = np.frombuffer(found[2], kind)
        changed = np.flatnonzero(array != one).tolist()
        assert changed == sorted(marks)
        for place in changed:
            if marks[place] & ~sign == nan:
                assert int(array[place]) & ~sign & nan == nan
            else:
                assert array[place] == marks[place]


@pytest.mark.parametrize("source", FORMATS)
def test_allow_nonfinite_keeps_them_through_every_change_of_dtype(
    tmp_path: Path, put: Put, stored: Stored, source: str
) -> None:
    _, _, _, nan, infinity = FORMATS[source]
    marks = {1: nan} | ({2: infinity} if infinity is not None else {})
    weights = load(put(tmp_path / "a", w=_bits(source, marks, 1)))
    for target, (kind, _, _, _, target_infinity) in FORMATS.items():
        if target == source:
            continue
        with pytest.raises(NonFiniteError, match="the first at"):
            weights.save(tmp_path / "out", dtype=target)
        raw = stored(weights.save(tmp_path / "out", dtype=target, allow_nonfinite=True))["w"][2]
        (tmp_path / "out").unlink()
        full = FORMATS[target][4] or 0x7F  # every bit of the exponent; E4M3 has one NaN and no infinity
        array = np.frombuffer(raw, kind)
        assert int(array[1]) & full == full, target
        assert target_infinity is None or int(array[1]) & ~(1 << (8 * array.itemsize - 1)) != full
        if infinity is not None:
            assert int(array[2]) == (FORMATS[target][3] if target_infinity is None else target_infinity), (
                target
            )
        assert int(array[0]) == int(array[3]) == FORMATS[target][1]


def test_opposite_infinities_make_nan_where_they_are_allowed(
    tmp_path: Path, put: Put, stored: Stored
) -> None:
    up, down = (load(put(tmp_path / f"{x}", w=np.array([x, 1], np.float32))) for x in (np.inf, -np.inf))
    for merged in (mean([up, down]), interpolate(up, down, 0.5)):
        with pytest.raises(NonFiniteError, match=r"holds 1 value that is not finite, the first at \[0\]"):
            merged.save(tmp_path / "out")
        found = stored(merged.save(tmp_path / "out", allow_nonfinite=True, force=True))["w"][2]
        assert np.array_equal(np.frombuffer(found, np.float32), [np.nan, 1], equal_nan=True)
        (tmp_path / "out").unlink()


@pytest.mark.parametrize(("dtype", "infinity"), [(d, f[4]) for d, f in FORMATS.items() if d != "F64"])
def test_an_output_that_overflows_its_dtype_is_reported_with_how_far_it_reaches(
    tmp_path: Path, put: Put, stored: Stored, dtype: str, infinity: int | None
) -> None:
    kind, _, largest, nan, _ = FORMATS[dtype]
    big = load(put(tmp_path / "big", w=_bits(dtype, {250: largest})))
    small = load(put(tmp_path / "small", w=_bits(dtype, {})))
    mean([big, small]).save(tmp_path / "fits", digests=False)
    too_much = small + 3 * (big - small)
    with pytest.raises(NonFiniteError, match=rf"tensor 'w' reaches .* more than {dtype} holds") as caught:
        too_much.save(tmp_path / "out")
    assert caught.value.hint is not None
    assert caught.value.hint == (
        "use smaller scales" if dtype == "F32" else "write a wider dtype: --dtype fp32"
    )
    assert not (tmp_path / "out").exists()
    too_much.save(tmp_path / "wide", dtype="F64")
    found = stored(too_much.save(tmp_path / "out", allow_nonfinite=True))["w"][2]
    assert int(np.frombuffer(found, kind)[250]) == (nan if infinity is None else infinity)


def test_fp32_that_does_not_fit_the_dtype_asked_for_is_reported(tmp_path: Path, put: Put) -> None:
    weights = load(put(tmp_path / "a", ok=np.ones(3, np.float32), w=np.array([[1, -70000]], np.float32)))
    with pytest.raises(NonFiniteError, match=r"tensor 'w' reaches 70000, more than F16 holds \(65504\)"):
        weights.save(tmp_path / "out", dtype="F16")
    weights.save(tmp_path / "out", dtype="BF16")


def test_what_rounds_to_the_largest_number_is_no_overflow(tmp_path: Path, put: Put, stored: Stored) -> None:
    weights = load(put(tmp_path / "a", w=np.array([65519.99, -65519.99], np.float32)))
    found = stored(weights.save(tmp_path / "out", dtype="F16"))["w"][2]
    assert np.frombuffer(found, np.float16).tolist() == [65504, -65504]
    with pytest.raises(NonFiniteError, match="more than F16 holds"):
        load(put(tmp_path / "b", w=np.array([65520], np.float32))).save(tmp_path / "out2", dtype="F16")


def test_sums_beyond_fp32_that_average_within_it_are_exact(tmp_path: Path, put: Put, stored: Stored) -> None:
    largest = np.finfo(np.float32).max
    paths = [put(tmp_path / f"{i}", w=np.full(5, largest, np.float32)) for i in range(8)]
    found = stored(mean([load(path) for path in paths]).save(tmp_path / "out"))["w"][2]
    assert np.frombuffer(found, np.float32).tolist() == [largest] * 5


def test_sums_beyond_fp64_are_refused_and_never_written_as_infinity(tmp_path: Path, put: Put) -> None:
    paths = [put(tmp_path / f"{i}", w=np.full(5, 1.5e308)) for i in range(2)]
    with pytest.raises(NonFiniteError, match="tensor 'w' reaches inf, more than F64 holds"):
        mean([load(path) for path in paths]).save(tmp_path / "out")


def test_a_coefficient_of_zero_leaves_a_damaged_input_out(tmp_path: Path, put: Put, stored: Stored) -> None:
    bad = load(put(tmp_path / "bad", w=np.array([np.nan], np.float32)))
    good = load(put(tmp_path / "good", w=np.array([2], np.float32)))
    assert stored(interpolate(good, bad, 0.0).save(tmp_path / "out"))["w"][2] == np.float32(2).tobytes()


def test_in_memory_results_refuse_too(tmp_path: Path, put: Put) -> None:
    bad = load(put(tmp_path / "bad", w=np.array([1, np.nan], np.float32)))
    with pytest.raises(
        NonFiniteError, match=r"bad: tensor 'w' holds 1 value that is not finite, the first at \[1\]"
    ):
        bad.state_dict()


def test_transposed_inputs_are_located_as_well(tmp_path: Path) -> None:
    import torch

    square = torch.ones(3, 4)
    square[1, 2] = torch.inf
    torch.save({"w": square.T}, tmp_path / "turned.pt")
    with pytest.raises(
        NonFiniteError, match=r"turned\.pt: tensor 'w' holds 1 value .* the first at \[2, 1\]"
    ):
        load(tmp_path / "turned.pt").save(tmp_path / "out")
    load(tmp_path / "turned.pt").save(tmp_path / "out", allow_nonfinite=True)


def test_a_nonlinear_method_never_swallows_what_is_not_finite(tmp_path: Path, put: Put) -> None:
    from clipmerge.weights.methods import apply

    rng = np.random.default_rng(0)
    base, one, two = (
        put(tmp_path / name, w=rng.standard_normal((4, 8), np.float32)) for name in ("base", "one", "two")
    )
    numbers = rng.standard_normal((4, 8), np.float32)
    numbers[2, 5] = -np.inf
    put(two, w=numbers)
    zs, a, b = (load(path) for path in (base, one, two))
    with pytest.raises(
        NonFiniteError, match=r"two: tensor 'w' holds 1 value that is not finite, the first at \[2, 5\]"
    ):
        (zs + apply("magmax", [a - zs, b - zs])).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_finding_the_place_takes_no_memory_of_the_tensor_s_size(
    tmp_path: Path, put_sparse: Put, program: Callable[..., Any]
) -> None:
    path = put_sparse(tmp_path / "large.safetensors", "F16", (60_000_000,))
    with path.open("r+b") as file:
        file.seek(-2, 2)
        file.write(np.array([np.inf], np.float16).tobytes())
    code = (
        "import sys, resource, clipmerge as cm\nfrom clipmerge.errors import NonFiniteError\n"
        "large = cm.load(sys.argv[1])\nresource.setrlimit(resource.RLIMIT_DATA, (240_000_000, 240_000_000))\n"
        "try:\n    large.save(sys.argv[2], dtype='BF16', digests=False, threads=1)\n"
        "except NonFiniteError as error:\n    print(error.message)\n"
    )
    done = program(code, path, tmp_path / "out")
    said = f"{path}: tensor 'w' holds 1 value that is not finite, the first at [59999999]\n"
    assert (done.stdout, done.stderr) == (said, "")
