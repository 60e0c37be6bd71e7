"""The same inputs give the same bytes: whatever the threads, the order, the names, the run."""

from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from itertools import islice, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from clipmerge.checkpoint.tensors import Checkpoint, Extent, Tensor
from clipmerge.weights.coefficient import Coefficient
from clipmerge.weights.plan import make_plan
from clipmerge.weights.run import into_arrays
from clipmerge.weights.weights import Weights, interpolate, load, mean

Put = Callable[..., Path]
Stored = Callable[[Path], dict[str, Any]]
SHAPES: Mapping[str, tuple[int, ...]] = {"a": (300, 401), "b": (), "c": (77,), "d": (500, 600), "e": (0, 3)}


def _stored_as(dtype: str, numbers: Any) -> bytes:
    if dtype == "BF16":
        return (np.asarray(numbers, np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return np.asarray(numbers, {"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


@pytest.fixture(params=["F32", "F16", "BF16"])
def soup(tmp_path: Path, put: Put, request: pytest.FixtureRequest) -> list[Path]:
    """Five checkpoints of one dtype, their tensors of several sizes and stored in several orders."""
    rng = np.random.default_rng(5)
    paths = []
    for i in range(5):
        tensors = {}
        for name in rng.permutation(list(SHAPES)):
            numbers = rng.standard_normal(SHAPES[name], np.float32) * np.float32(0.02)
            tensors[str(name)] = (request.param, SHAPES[name], _stored_as(request.param, numbers))
        paths.append(put(tmp_path / f"in{i}.safetensors", **tensors))
    return paths


def _recipes(weights: list[Weights]) -> list[Weights]:
    base, *rest = weights
    added = base
    for other in rest:
        added = added + 0.3 * (other - base)
    return [mean(weights), added, interpolate(base, rest[0], {"a": 0.2, "*": 0.7})]


def test_any_number_of_threads_gives_the_same_file(soup: list[Path], tmp_path: Path) -> None:
    for merged in _recipes([load(path) for path in soup]):
        files = {
            merged.save(tmp_path / "out", force=True, threads=threads, digests=False).read_bytes()
            for threads in (1, 2, 3, 7, 1)
        }
        assert len(files) == 1


def test_any_order_of_the_ingredients_gives_the_same_file(soup: list[Path], tmp_path: Path) -> None:
    weights = [load(path) for path in soup]
    files = set()
    for order in islice(permutations(weights), 0, 120, 11):
        files.add(mean(order).save(tmp_path / "out", force=True).read_bytes())
    assert len(files) == 1


def test_names_of_files_change_what_is_said_about_them_and_no_tensor(
    soup: list[Path], tmp_path: Path, stored: Stored
) -> None:
    found: list[dict[str, Any]] = []
    for names in (["a", "b", "c", "d", "e"], ["e", "c", "b", "a", "d"]):
        links = []
        for name, path in zip(names, soup, strict=True):
            links.append(tmp_path / f"{name}{len(found)}.safetensors")
            links[-1].symlink_to(path)
        found.append(stored(mean([load(link) for link in links]).save(tmp_path / "out", force=True)))
    assert found[0] == found[1]


def test_another_split_into_files_changes_no_tensor(soup: list[Path], tmp_path: Path, stored: Stored) -> None:
    merged = mean([load(path) for path in soup])
    whole = stored(merged.save(tmp_path / "whole.safetensors"))
    merged.save(tmp_path / "cut.safetensors", shard_size=200_000)
    shards = sorted(tmp_path.glob("cut-*-of-*.safetensors"))
    assert len(shards) > 1
    assert {name: entry for shard in shards for name, entry in stored(shard).items()} == whole


def test_memory_and_file_hold_the_same_bytes(soup: list[Path], tmp_path: Path, stored: Stored) -> None:
    import torch

    for merged in _recipes([load(path) for path in soup]):
        found = stored(merged.save(tmp_path / "out", force=True, digests=False))
        for name, tensor in merged.state_dict().items():
            assert tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == found[name][2]


WITHOUT_TORCH = """
import sys
from pathlib import Path
import clipmerge as cm
folder = Path(sys.argv[1])
weights = [cm.load(path) for path in sorted(folder.glob("in*"))]
for dtype in ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"):
    for number, merged in enumerate((cm.mean(weights), cm.interpolate(weights[0], weights[1], 0.3))):
        merged.save(folder / f"alone-{dtype}-{number}", dtype=dtype, threads=3)
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_file_is_the_same_whether_or_not_torch_is_imported(
    tmp_path: Path, put: Put, program: Callable[..., Any], dtype: str
) -> None:
    """torch converts halves with the processor's instructions: it may be faster, never different."""
    import torch  # noqa: F401

    rng = np.random.default_rng(3)
    for i in range(3):
        exponents = rng.integers(-30, 1, 200_000)  # down to where every narrow type is subnormal
        numbers = np.asarray(rng.uniform(-2, 2, 200_000) * 2.0**exponents, np.float32)
        put(tmp_path / f"in{i}", w=(dtype, numbers.shape, _stored_as(dtype, numbers)))
    done = program(WITHOUT_TORCH, tmp_path)
    assert done.returncode == 0, done.stderr
    weights = [load(tmp_path / f"in{i}") for i in range(3)]
    for out in ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"):
        for number, merged in enumerate((mean(weights), interpolate(weights[0], weights[1], 0.3))):
            here = merged.save(tmp_path / "here", dtype=out, force=True)
            assert here.read_bytes() == (tmp_path / f"alone-{out}-{number}").read_bytes(), (out, number)


# -- adversarial sums ----------------------------------------------------------------------------------------


def _memory(name: str, values: Iterable[float], dtype: str = "F32") -> Weights:
    """Weights over one tensor in memory."""
    array = np.array(list(values), {"F32": np.float32, "F64": np.float64}[dtype])
    tensor = Tensor(dtype, array.shape, (Extent(array.view(np.uint8), 0, array.nbytes),))
    checkpoint = Checkpoint(name, {"w": tensor})
    return Weights({checkpoint: Coefficient.of(1)}, checkpoint)


def _bytes(weights: Weights) -> bytes:
    plan = make_plan(weights)
    out = np.empty(sum(tensor.nbytes for tensor in weights.checkpoints[0].tensors.values()), np.uint8)
    into_arrays(plan, lambda _: out)
    return out.tobytes()


def _orders(weights: list[Weights]) -> Iterable[tuple[Weights, ...]]:
    """All of them up to four inputs; 24 spread over the rest beyond."""
    count = {3: 6, 4: 24, 5: 120, 6: 720}[len(weights)]
    return islice(permutations(weights), 0, count, max(1, count // 24))


# Signs, exponents 80 binary orders apart, and mantissas whose sums do not fit in 53 bits.
NUMBER = st.builds(
    lambda sign, mantissa, exponent: sign * (1 + mantissa / 2**23) * 2.0**exponent,
    st.sampled_from([-1.0, 1.0]),
    st.integers(0, 2**23 - 1),
    st.integers(-100, 100),
)
CHECKPOINTS = st.integers(3, 6).flatmap(
    lambda count: st.lists(st.lists(NUMBER, min_size=3, max_size=3), min_size=count, max_size=count)
)
LAW = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])


@LAW
@example(values=[[1e30, 1, 2.0**60], [-1e30, 1, 1], [1, 1, 1], [1e-30, 1, -(2.0**60)]])
@given(values=CHECKPOINTS)
def test_the_mean_is_the_same_bytes_in_every_order(values: list[list[float]]) -> None:
    weights = [_memory(f"w{i}", numbers) for i, numbers in enumerate(values)]
    assert len({_bytes(mean(order)) for order in _orders(weights)}) == 1


@LAW
@given(values=CHECKPOINTS, scales=st.lists(st.floats(-3, 3, width=32), min_size=6, max_size=6))
def test_a_weighted_sum_is_the_same_bytes_in_every_order(
    values: list[list[float]], scales: list[float]
) -> None:
    base = _memory("base", values[0])
    tasks = [
        scale * (_memory(f"t{i}", numbers) - base)
        for i, (numbers, scale) in enumerate(zip(values, scales, strict=False))
    ]
    found = set()
    for order in _orders(tasks):
        total = base
        for task in order:
            total = total + task
        found.add(_bytes(total))
    assert len(found) == 1


@LAW
@given(values=CHECKPOINTS, scales=st.permutations([0.1, 0.2, 0.3, 0.4, 0.7, 0.9]))
def test_copies_of_one_file_with_coefficients_of_their_own_give_the_same_bytes_in_every_order(
    values: list[list[float]], scales: list[float]
) -> None:
    copies = [_memory(f"copy{i}", values[i % 2]) for i in range(len(values))]
    parts = [scale * copy for copy, scale in zip(copies, scales, strict=False)]
    rest = _memory("rest", values[2]) * (1 - sum(round(10 * s) for s in scales[: len(copies)]) / 10)
    found = set()
    for order in _orders([*parts, rest][:6]):
        total = order[0]
        for part in order[1:]:
            total = total + part
        found.add(_bytes(total - (total.total - 1) * copies[0]))
    assert len(found) == 1


@LAW
@given(values=st.lists(NUMBER, min_size=5, max_size=5), count=st.integers(2, 9))
def test_the_mean_of_copies_is_the_file_itself(values: list[float], count: int) -> None:
    copies = [_memory(f"copy{i}", values) for i in range(count)]
    assert _bytes(mean(copies)) == np.array(values, np.float32).tobytes()


@LAW
@given(values=CHECKPOINTS)
def test_the_mean_is_the_exact_mean_rounded_once_where_float64_holds_the_sum(
    values: list[list[float]],
) -> None:
    near = [
        [float(np.float32(x * 2.0 ** (round(20 * np.sin(i)) - np.log2(abs(x))))) for x in numbers]
        for i, numbers in enumerate(values)
    ]  # within 40 binary orders: no bit of the sum is lost
    found = np.frombuffer(_bytes(mean([_memory(f"w{i}", x) for i, x in enumerate(near)])), np.float32)

    for column, value in enumerate(found):
        exact = sum((Fraction(numbers[column]) for numbers in near), Fraction(0)) / len(near)
        assert abs(Fraction(float(value)) - exact) <= abs(Fraction(float(np.spacing(value)))) / 2 * (
            1 + Fraction(1, 2**28)
        )
