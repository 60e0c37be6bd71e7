"""Plan → numbers: values, dtypes, integers, blocks, progress. (Same bytes and memory: tests/merge/trust.)"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest

from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import Checkpoint, Extent, Tensor
from clipmerge.dtypes import Scratch, narrow, to_float64
from clipmerge.errors import MismatchError, NonFiniteError, RecipeError
from clipmerge.weights import blocks, run
from clipmerge.weights.coefficient import Coefficient
from clipmerge.weights.methods import apply
from clipmerge.weights.weights import Weights, interpolate, load, mean

Point = Callable[..., Weights]
Arrays = Callable[..., dict[str, Any]]
Put = Callable[..., Path]


def test_values_by_hand(point: Point, arrays: Arrays) -> None:
    zs, cars, dtd = (
        point(n, x=v) for n, v in (("zs", [1.0, 2.0]), ("cars", [3.0, 2.0]), ("dtd", [1.0, -8.0]))
    )
    for weights, expected in [
        (interpolate(zs, cars, 0.25), [1.5, 2.0]),
        (mean([zs, cars, dtd]), [np.float32(5 / 3), np.float32(-4 / 3)]),
        (zs + 0.5 * ((cars - zs) + (dtd - zs)), [2.0, -3.0]),
        (zs - 0.5 * (cars - zs), [0.0, 2.0]),
        (cars - zs, [2.0, 0.0]),
    ]:
        np.testing.assert_array_equal(arrays(weights)["x"], np.array(expected, np.float32))


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2", "F64", "F32"])
def test_any_float_dtype_in_any_out(point: Point, arrays: Arrays, dtype: str) -> None:
    a, b = point("a", x=(dtype, [1.0, -2.0, 0.5])), point("b", x=[2.0, 4.0, 0.5])
    np.testing.assert_array_equal(arrays(interpolate(a, b, 0.5), "F32")["x"], np.float32([1.5, 1.0, 0.5]))

    stored = arrays(interpolate(a, b, 0.5))["x"]
    np.testing.assert_array_equal(to_float64(stored, dtype), [1.5, 1.0, 0.5])


def test_minus_zero_survives_every_way(point: Point, arrays: Arrays) -> None:
    """Copied, summed, and as a tensor that is not streamed."""
    minus = np.array([-0.0, 1.0], np.float32)
    a = point("a", x=minus)
    for weights in (a, mean([a, point("b", x=minus)]), apply("slerp", [a, point("b", x=minus)])):
        assert np.signbit(arrays(weights)["x"]).tolist() == [True, False]


def test_tensors_of_every_shape_pass(point: Point, arrays: Arrays) -> None:
    rng = np.random.default_rng(0)
    shapes = {"scalar": (), "empty": (0, 4), "one": (1,), "matrix": (3, 5), "four": (2, 3, 1, 2)}
    a, b = ({k: rng.standard_normal(s).astype("f4") for k, s in shapes.items()} for _ in range(2))
    merged = arrays(mean([point("a", **a), point("b", **b)]))
    for name in shapes:
        expected = ((a[name].astype("f8") + b[name]) / 2).astype("f4")
        assert merged[name].shape == shapes[name]
        np.testing.assert_array_equal(merged[name], expected)


def turned(name: str, numbers: Any) -> Weights:
    """A checkpoint that stores its matrix column by column, as Hugging Face's projections are stored for us."""
    array = np.array(numbers, np.float32)
    raw = np.ascontiguousarray(array.T).reshape(-1).view(np.uint8)
    rows, columns = array.shape
    checkpoint = Checkpoint(
        name, {"x": Tensor("F32", (rows, columns), (Extent(raw, 0, raw.size),), (1, rows))}
    )
    return Weights({checkpoint: Coefficient.of(1)}, checkpoint)


def test_transposed_tensors_merge_as_their_row_major_twins(point: Point, arrays: Arrays) -> None:
    rng = np.random.default_rng(3)
    x, y = (rng.standard_normal((3, 5)).astype("f4") for _ in range(2))
    x[0, 0] = y[0, 0] = -0.0
    expected = arrays(mean([point("a", x=x), point("b", x=y)]))["x"]
    for pair in ((turned("a", x), turned("b", y)), (turned("a", x), point("b", x=y))):
        assert arrays(mean(pair))["x"].tobytes() == expected.tobytes()
    assert arrays(turned("a", x))["x"].tobytes() == x.tobytes()
    x[1, 1] = np.inf
    with pytest.raises(NonFiniteError, match="a: tensor 'x'"):
        arrays(mean([turned("a", x), point("b", x=y)]))


def test_how_a_tensor_is_stored_does_not_change_the_order_of_a_sum(point: Point, arrays: Arrays) -> None:
    rng = np.random.default_rng(5)
    numbers = [rng.standard_normal((40, 50)).astype("f4") for _ in range(3)]
    weights = (0.3333333333333333, 0.3333333333333333, 0.33333333333333337)
    results = set()
    for stored in range(8):
        leaves = [turned(str(i), x) if stored >> i & 1 else point(str(i), x=x) for i, x in enumerate(numbers)]
        merged = sum(
            (w * leaf for w, leaf in zip(weights[1:], leaves[1:], strict=True)), weights[0] * leaves[0]
        )
        results.add(arrays(merged, "F64")["x"].tobytes())
    assert len(results) == 1


def test_blocks_and_chunks_do_not_show(point: Point, arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    a, b, c = (rng.standard_normal(5000).astype("f4") for _ in range(3))
    merged = mean([point("a", x=a), point("b", x=b), point("c", x=c)])
    whole = arrays(merged)["x"].tobytes()
    monkeypatch.setattr(blocks, "BLOCK", 32)
    assert arrays(merged)["x"].tobytes() == whole


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("size", [1e-6, 0.02, 0.3, 30.0])
@pytest.mark.parametrize("helped", [True, False], ids=["torch", "numpy"])
def test_narrow_sums_are_exact_whatever_they_are_summed_in(
    point: Point, arrays: Arrays, dtype: str, size: float, helped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:

    if not helped:
        monkeypatch.setitem(sys.modules, "torch", None)
    rng = np.random.default_rng(2)
    points = [point(f"p{i}", x=(dtype, rng.standard_normal(2000) * size)) for i in range(7)]
    stored = [to_float64(Reader().dense(p.checkpoints[0].tensors["x"]), dtype) for p in points]
    np.testing.assert_array_equal(arrays(mean(points), "F64")["x"], sum(stored) / 7)


@pytest.mark.parametrize("helped", [True, False], ids=["torch", "numpy"])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 16, 17, 40])
@pytest.mark.parametrize("size", [1e-7, 3e-5, 0.02, 0.05, 0.3, 3000.0])
def test_means_of_halves_round_once(
    point: Point, arrays: Arrays, count: int, size: float, helped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near each other like finetuned models; the sizes take one, two and more float32 sums, and float64."""
    if not helped:
        monkeypatch.setitem(sys.modules, "torch", None)
    rng = np.random.default_rng(count)
    base = rng.standard_normal(20_000)
    stored = [((base + 0.1 * rng.standard_normal(base.size)) * size).astype(np.float16) for _ in range(count)]
    got = arrays(mean([point(f"p{i}", x=x) for i, x in enumerate(stored)]))["x"]
    exact = reduce(np.add, [x.astype(np.float64) for x in stored]) / count
    assert got.tobytes() == exact.astype(np.float16).tobytes()  # numpy rounds float64 to halves once


def test_integers_are_copied_and_must_agree(point: Point, arrays: Arrays) -> None:
    a, b = (point(n, ids=np.arange(4), x=[1.0], on=np.array([True, False])) for n in "ab")
    merged = arrays(mean([a, b]))
    np.testing.assert_array_equal(merged["ids"], np.arange(4))
    np.testing.assert_array_equal(merged["on"], [True, False])
    odd = point("odd", ids=np.arange(4) + 1, x=[1.0], on=np.array([True, False]))
    with pytest.raises(MismatchError, match="'ids' holds integers that differ between a and odd"):
        arrays(mean([a, odd]))


def test_step_counters(point: Point, arrays: Arrays) -> None:
    a, b = (point(n, **{"bn.num_batches_tracked": np.array(k), "x": [1.0]}) for n, k in (("a", 3), ("b", 7)))
    counter = "bn.num_batches_tracked"
    assert arrays(mean([a, b]))[counter] == 7
    assert arrays(interpolate(a, b, 0.9))[counter] == 3
    assert arrays(interpolate(b, a, 0.9))[counter] == 7


def test_methods_within_expressions(point: Point, arrays: Arrays) -> None:
    """slerp at right angles: (1, 0) and (0, 1) meet at (1, 1)/√2."""
    a, b = point("a", x=[1.0, 0.0]), point("b", x=[0.0, 1.0])
    half = float(np.sqrt(0.5))
    arc = apply("slerp", [a, b])
    np.testing.assert_allclose(arrays(arc)["x"], [half, half], rtol=1e-7)
    np.testing.assert_allclose(arrays(a + 2 * (arc - a))["x"], [2 * half - 1, 2 * half], rtol=1e-6)
    vector = apply("magmax", [a - b, 3 * (b - a)])
    np.testing.assert_array_equal(arrays(b + 0.5 * vector)["x"], [-1.5, 2.5])


def test_a_methods_operands_do_not_depend_on_how_they_were_listed(point: Point, arrays: Arrays) -> None:
    rng = np.random.default_rng(2)
    models = [point(f"m{i}", x=rng.standard_normal(500).astype("f4")) for i in range(4)]
    pivot = point("p", x=rng.standard_normal(500).astype("f4"))
    forward = arrays(apply("slerp", [mean(models), pivot], alpha=0.3))["x"]
    backward = arrays(apply("slerp", [mean(models[::-1]), pivot], alpha=0.3))["x"]
    assert forward.tobytes() == backward.tobytes()


def test_patterns_inside_methods_leave_what_they_do_not_match(point: Point, arrays: Arrays) -> None:
    a, b = (point(n, **{"visual.x": [v], "text.x": [v]}) for n, v in (("a", 1.0), ("b", 3.0)))
    vector = apply("magmax", [{"visual": 1.0} * (b - a), {"visual": 0.5} * (b - a)])
    found = arrays(vector)
    assert found["visual.x"] == [2.0]
    assert found["text.x"] == [0.0]


def test_a_bad_number_is_located_in_methods_too(point: Point, arrays: Arrays) -> None:
    a, b = point("a", x=[1.0, 2.0]), point("b", x=[1.0, float("nan")])
    with pytest.raises(NonFiniteError, match=r"b: tensor 'x' holds 1 values? that (is|are) not finite"):
        arrays(apply("slerp", [a, b]))


def test_overflow_of_the_dtype_is_told_with_the_way_out(point: Point, arrays: Arrays) -> None:
    a, b = point("a", x=[60000.0]), point("b", x=[1.0])
    with pytest.raises(NonFiniteError, match="tensor 'x' reaches 119999") as refused:
        arrays(2 * a - b, "F16")
    assert refused.value.hint == "write a wider dtype: --dtype fp32"


def test_progress_counts_bytes_up_to_all_of_them(point: Point, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    weights = mean([point(n, x=np.ones(1000, np.float32)) for n in "ab"])
    weights.save(tmp_path / "out.safetensors", on_progress=lambda *args: told.append(args), digests=False)
    assert told[-1] == ("merging", 4000, 4000)


def test_a_saved_file_reads_as_any_safetensors_file(point: Point, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    a, b = (point(n, y=np.ones(3, np.float16), x=[[v, v]]) for n, v in (("a", 1.0), ("b", 2.0)))
    path = mean([a, b]).save(tmp_path / "out.safetensors")
    found = load_file(path)
    np.testing.assert_array_equal(found["x"], np.float32([[1.5, 1.5]]))
    assert found["y"].dtype == np.float16


def test_the_record_says_how_it_was_made(put: Put, tmp_path: Path) -> None:
    from clipmerge.weights.record import read_record

    a, b = (load(put(n, x=np.float32([v]))) for n, v in (("a", 1.0), ("b", 2.0)))
    path = mean([a, b]).save(
        tmp_path / "out.safetensors", metadata={"selection": {"by": "hand"}}, dtype="half"
    )
    record = read_record(load(path).checkpoints[0].metadata)
    assert record["notation"] == "mean([a, b])"
    assert record["dtype"] == "F16"
    assert record["selection"] == {"by": "hand"}
    assert (record["format"], record["total"]) == (1, 1)


def test_a_task_vector_is_no_model_to_load(point: Point) -> None:
    torch = pytest.importorskip("torch")
    a, b = (point(n, weight=[[1.0]], bias=[0.0]) for n in "ab")
    with pytest.raises(RecipeError, match=r"a - b is a task vector \(total 0\), not a model"):
        (a - b).load_into(torch.nn.Linear(1, 1))


def test_weights_go_into_a_module_in_its_own_dtype(point: Point) -> None:
    torch = pytest.importorskip("torch")
    a, b = (point(n, weight=[[v]], bias=[v]) for n, v in (("a", 1.0), ("b", 2.0)))
    module = torch.nn.Linear(1, 1).to(torch.bfloat16)
    before = module.weight
    mean([a, b]).load_into(module)
    assert module.weight is before
    assert module.weight.item() == module.bias.item() == 1.5


def test_a_module_that_does_not_fit_is_explained_all_at_once(point: Point) -> None:
    from clipmerge.errors import ModelError

    torch = pytest.importorskip("torch")
    weights = point("a", wieght=[[1.0]], bias=[1.0, 2.0])
    with pytest.raises(ModelError) as refused:
        weights.load_into(torch.nn.Linear(1, 1))
    assert refused.value.message.splitlines()[1:] == [
        "  the weights lack 'weight'",
        "  the model has no 'wieght' (it has 'weight')",
        "  'bias' is [2] in the weights and [1] in the model",
    ]
    with pytest.raises(ModelError):
        weights.check_fit(torch.nn.Linear(1, 1, device="meta"))


def test_a_state_dict_is_what_would_be_saved(point: Point, arrays: Arrays) -> None:
    torch = pytest.importorskip("torch")
    a = point("a", x=("BF16", [1.0, 2.0]), n=np.array(3))
    b = point("b", x=("BF16", [3.0, 2.0]), n=np.array(3))
    found = mean([a, b]).state_dict()
    assert found["x"].dtype == torch.bfloat16
    assert found["x"].tolist() == [2.0, 2.0]
    assert found["n"].item() == 3
    assert mean([a, b]).state_dict("fp32")["x"].dtype == torch.float32


def test_torch_is_left_as_it_was_and_subnormals_are_numbers(point: Point, arrays: Arrays) -> None:
    """A program's own settings: its threads, and that subnormals count as zero, which would lose tiny halves."""
    import torch

    tiny = np.float16([6e-8, -1.2e-7, 3e-5, 1.0])
    single = np.float32([1e-45, -1e-40, 3e-39, 1.0])
    merged = mean([point(n, half=tiny, single=single) for n in "ab"])
    square = np.float32([[1e-45, -1e-40], [3e-39, 1.0]])
    stored = mean([turned(n, square) for n in "ab"])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot treat subnormals as zero")
        got, whole = arrays(merged), arrays(stored)
        assert torch.get_num_threads() == 3
        assert torch.tensor([1e-39]).mul(1.0).item() == 0.0  # still as the program wants it
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    assert got["half"].tobytes() == tiny.tobytes()
    assert got["single"].tobytes() == single.tobytes()
    assert whole["x"].tobytes() == square.tobytes()


@pytest.mark.parametrize("helped", [True, False], ids=["torch", "numpy"])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2", "F32"])
def test_any_sum_is_that_of_float64_rounded_once(
    point: Point, arrays: Arrays, dtype: str, helped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random expressions against a plain loop: whatever is summed in float32 on the way, in blocks of any length."""
    from clipmerge.weights.plan import make_plan

    if not helped:
        monkeypatch.setitem(sys.modules, "torch", None)
    rng = np.random.default_rng(7)
    for _ in range(60):
        count, divisor = int(rng.integers(1, 20)), int(rng.choice([1, 2, 3, 16, 4096, 8192, 12289]))
        size = 10.0 ** rng.integers(-7, 2)
        base = rng.standard_normal(300)
        numbers = [(base + 0.1 * rng.standard_normal(300)) * size for _ in range(count)]
        total = int(rng.integers(0, 2))  # task vectors may be divided by anything, models by their number
        points = [point(f"p{i}", total, x=(dtype, x)) for i, x in enumerate(numbers)]
        merged = mean(points) if total else sum(points[1:], points[0]) / divisor
        if total and rng.integers(0, 2):
            merged = interpolate(points[0], merged, 0.3)
        out = str(rng.choice([dtype, dtype, "F16", "BF16", "F32", "F64"]))
        (step,) = make_plan(merged, dtype=out).steps.values()
        parts = [f * to_float64(Reader().dense(leaf.tensors["x"]), dtype) for f, leaf in step.terms]
        exact = reduce(np.add, parts) / step.divisor
        wanted = arrays(points[0], out)["x"].copy()
        with np.errstate(all="ignore"):
            narrow(exact, out, wanted, Scratch(exact.size))
        monkeypatch.setattr(blocks, "BLOCK", int(rng.choice([1 << 18, 64, 13])))
        assert arrays(merged, out)["x"].tobytes() == wanted.tobytes()


def test_a_failure_stops_a_long_tensor_in_another_thread_at_its_next_block(
    point: Point, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where digests are taken, one thread has the whole of a long tensor: it must not go on to its end."""
    monkeypatch.setattr(blocks, "BLOCK", 100)
    blocks_written = 0

    def slow(_what: str, _done: int, _total: int) -> None:
        nonlocal blocks_written
        blocks_written += 1
        time.sleep(0.002)

    weights = point("a", long=np.ones(1_000_000, np.float32), short=[float("nan")])
    with pytest.raises(NonFiniteError, match="'short'"):
        mean([weights, point("b", long=np.ones(1_000_000, np.float32), short=[1.0])]).save(
            tmp_path / "out.safetensors", threads=2, on_progress=slow
        )
    assert blocks_written < 1000


BLAS = """
import sys
import numpy as np
from threadpoolctl import threadpool_info
from clipmerge.ops.decompose import solved, triplets
from clipmerge.weights.expression import Applied
from clipmerge.weights.methods import METHODS
from clipmerge.weights.run import _one_blas_thread
def threads():
    return sorted(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")
with _one_blas_thread([Applied(METHODS[sys.argv[1]], (), {})]):
    drawn = np.random.default_rng(0).standard_normal((64, 64))
    assert len(triplets(drawn, 8).values) == 8 and solved(drawn, drawn.T @ drawn, 1.0) is not None
    print(threads())
print(threads())
"""


@pytest.mark.parametrize("method", ["tsv", "regmean"])
def test_every_blas_keeps_to_one_thread_while_methods_run(method: str) -> None:
    """scipy's is another than numpy's, and is loaded late: on two threads last bits depend on them."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", BLAS, method]
    inside, after = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert inside == "[1, 1]"
    assert after == "[2, 2]"


def test_large_tensors_are_computed_one_at_a_time_beside_small_ones(
    point: Point, arrays: Arrays, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "SMALL", 100)
    original, lock = run._compute_whole, Lock()
    large_now, most_large, names = 0, 0, []

    def watched(step: Any, *rest: Any) -> Any:
        nonlocal large_now, most_large
        large = step.numel > 100
        with lock:
            names.append(step.name)
            large_now += large
            most_large = max(most_large, large_now)
        time.sleep(0.005)
        result = original(step, *rest)
        with lock:
            large_now -= large
        return result

    monkeypatch.setattr(run, "_compute_whole", watched)
    shapes = {**{f"l{i}": (12, 10) for i in range(6)}, **{f"s{i}": (6, 5) for i in range(6)}}
    rng = np.random.default_rng(0)
    a, b, base = (
        point(n, **{k: rng.standard_normal(s).astype("f4") for k, s in shapes.items()})
        for n in ("a", "b", "base")
    )
    merged = base + apply("tsv", [a - base, b - base])
    one = merged.save(tmp_path / "1.safetensors", threads=1).read_bytes()
    names.clear()
    assert merged.save(tmp_path / "3.safetensors", threads=3).read_bytes() == one
    assert sorted(names) == sorted(shapes)
    assert most_large == 1
