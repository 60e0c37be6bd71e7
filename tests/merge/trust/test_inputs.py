"""What happens to inputs: gone, shortened, rewritten, shared, strided, empty, enormous, or saying things twice."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipmerge.errors import CheckpointError, MismatchError
from clipmerge.weights.weights import Weights, interpolate, load, mean

Put = Callable[..., Path]
Stored = Callable[[Path], dict[str, Any]]


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _f32(*numbers: float) -> np.ndarray[Any, Any]:
    return np.array(numbers, np.float32)


# -- files that change ---------------------------------------------------------------------------------------


@pytest.fixture
def a(tmp_path: Path, put: Put) -> Path:
    return put(tmp_path / "a.safetensors", w=_f32(1, 2), v=_f32(3, 4))


@pytest.fixture
def b(tmp_path: Path, put: Put) -> Path:
    return put(tmp_path / "b.safetensors", w=_f32(5, 6), v=_f32(7, 8))


def test_an_input_that_vanished_after_it_was_opened_is_named(a: Path, b: Path) -> None:
    weights = mean([load(a), load(b)])
    b.unlink()
    for digests in (True, False):
        with pytest.raises(
            CheckpointError, match=r"b\.safetensors cannot be read: No such file or directory"
        ):
            weights.save(a.with_name("out"), digests=digests)
    assert _names(a.parent) == ["a.safetensors"]


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("digests", [True, False])
def test_an_input_that_was_written_again_after_it_was_opened_is_refused_even_at_the_same_size(
    a: Path, b: Path, put: Put, in_place: bool, digests: bool
) -> None:
    weights = interpolate(load(a), load(b), 0.5)
    time.sleep(0.02)  # a file system's clock may tick only every few milliseconds
    if not in_place:
        b.unlink()
    put(b, v=_f32(7, 8), w=_f32(5, 6))  # the old header would read v as w
    with pytest.raises(CheckpointError, match=r"b\.safetensors changed after it was opened") as caught:
        weights.save(a.with_name("out"), digests=digests)
    assert caught.value.hint == "load it again when it is complete"
    with pytest.raises(CheckpointError, match="changed after it was opened"):
        weights.state_dict()
    assert _names(a.parent) == ["a.safetensors", "b.safetensors"]
    interpolate(load(a), load(b), 0.5).save(a.with_name("out"), digests=digests)


@pytest.mark.parametrize("size", [0, 7, 60, -1])
def test_an_input_that_was_shortened_after_it_was_opened_is_refused(a: Path, size: int) -> None:
    weights = load(a)
    os.truncate(a, size % a.stat().st_size)
    with pytest.raises(CheckpointError, match="changed after it was opened"):
        weights.save(a.with_name("out"), digests=False)
    assert _names(a.parent) == ["a.safetensors"]


def _during(weights: Weights, out: Path, action: Callable[[], object]) -> None:
    """Save, and act once while the pass runs."""
    waiting = [action]

    def once(what: str, *_: int) -> None:
        if what == "merging" and waiting:
            waiting.pop()()

    weights.save(out, digests=False, threads=2, on_progress=once)


@pytest.mark.parametrize("change", ["shorten", "lengthen", "rewrite"])
def test_an_input_that_changes_while_it_is_read_is_an_error_and_no_output_appears(
    tmp_path: Path, put_sparse: Put, change: str
) -> None:
    a, b = (put_sparse(tmp_path / f"{name}.safetensors", "F32", (2_000_000,)) for name in "ab")

    def act() -> None:
        time.sleep(0.02)
        if change == "rewrite":
            with b.open("r+b") as file:
                file.seek(1000)
                file.write(b"\x01")
        else:
            os.truncate(b, 1000 if change == "shorten" else 9_000_000)

    with pytest.raises(CheckpointError, match=r"b\.safetensors (changed while it was read|ends at byte)"):
        _during(mean([load(a), load(b)]), tmp_path / "out", act)
    assert _names(tmp_path) == ["a.safetensors", "b.safetensors"]


def test_an_input_replaced_by_a_new_file_while_it_is_read_is_read_to_its_end(
    tmp_path: Path, put_sparse: Put, put: Put, stored: Stored
) -> None:
    a, b = (put_sparse(tmp_path / f"{name}.safetensors", "F32", (2_000_000,)) for name in "ab")
    other = put(tmp_path / "other", w=np.ones(2_000_000, np.float32))
    _during(mean([load(a), load(b)]), tmp_path / "out", lambda: other.replace(b))
    assert not np.frombuffer(stored(tmp_path / "out")["w"][2], np.float32).any()


def test_two_openings_with_a_change_in_between_do_not_mix(a: Path, put: Put) -> None:
    before = load(a)
    time.sleep(0.02)
    put(a, w=_f32(9, 9), v=_f32(9, 9))
    after = load(a)
    with pytest.raises(CheckpointError, match="changed after it was opened"):
        mean([before, after]).save(a.with_name("out"))


MANY = """
import resource, sys
from pathlib import Path
import clipmerge as cm
from clipmerge.errors import CheckpointError
weights = [cm.load(path) for path in sorted(Path(sys.argv[1]).iterdir())]
resource.setrlimit(resource.RLIMIT_NOFILE, (25, 25))
try:
    cm.mean(weights).save(Path(sys.argv[1]) / "out")
except CheckpointError as error:
    print(error.message.split(": ")[1], "-", error.hint)
"""


def test_more_inputs_than_files_may_be_open_are_an_error_that_says_how_to_allow_more(
    tmp_path: Path, put: Put, program: Callable[..., Any]
) -> None:
    for i in range(40):
        put(tmp_path / f"{i}.st", w=_f32(i))
    done = program(MANY, tmp_path)
    assert done.stdout == "Too many open files - let it open more files: ulimit -n 4096\n", done.stderr
    assert len(_names(tmp_path)) == 40


# -- shapes and storage --------------------------------------------------------------------------------------


def test_empty_and_zero_dimensional_tensors_come_through_every_kind_of_merge(
    tmp_path: Path, put: Put, stored: Stored
) -> None:
    tensors = {"none": np.zeros((0,), np.float32), "flat": np.zeros((3, 0, 2), np.float16), "n": np.int64(7)}
    paths = [put(tmp_path / str(i), scale=np.float32(x), **tensors) for i, x in enumerate([1, 2, 6])]
    weights = [load(path) for path in paths]
    out = tmp_path / "out"
    for merged, scale in (
        (weights[1], 2.0),
        (mean(weights), 3.0),
        (interpolate(weights[0], weights[1], 0.25), 1.25),
    ):
        found = stored(merged.save(out, force=True))
        assert found["none"] == ("F32", (0,), b"")
        assert found["flat"] == ("F16", (3, 0, 2), b"")
        assert found["n"] == ("I64", (), np.int64(7).tobytes())
        assert found["scale"] == ("F32", (), np.float32(scale).tobytes())
        assert dict(merged.state_dict())["flat"].shape == (3, 0, 2)


def test_a_checkpoint_of_empty_tensors_or_of_none_is_a_whole_file(
    tmp_path: Path, put: Put, stored: Stored
) -> None:
    only = load(put(tmp_path / "only", none=np.zeros((0, 5), np.float32)))
    assert stored(only.save(tmp_path / "out")) == {"none": ("F32", (0, 5), b"")}
    nothing = load(put(tmp_path / "nothing"))
    assert stored(nothing.save(tmp_path / "out2")) == {}


def test_one_storage_under_two_names_is_written_twice(tmp_path: Path, stored: Stored) -> None:
    import torch

    shared = torch.arange(6.0)
    torch.save({"a": shared, "b": shared, "part": shared[2:4]}, tmp_path / "tied.pt")
    found = stored(load(tmp_path / "tied.pt").save(tmp_path / "out"))
    assert found["a"] == found["b"] == ("F32", (6,), np.arange(6, dtype=np.float32).tobytes())
    assert found["part"] == ("F32", (2,), _f32(2, 3).tobytes())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64"])
def test_tensors_saved_transposed_or_strided_are_written_in_row_major_order(
    tmp_path: Path, stored: Stored, dtype: str
) -> None:
    import torch

    square = torch.arange(12).reshape(3, 4).to(getattr(torch, dtype))
    views = {"turned": square.T, "columns": square[:, ::2], "wide": square[:1].expand(3, 4)}
    torch.save(views, tmp_path / "views.pt")
    weights = load(tmp_path / "views.pt")
    for merged in (weights, mean([weights, load(tmp_path / "views.pt", "again")])):
        found = stored(merged.save(tmp_path / "out", force=True))
        for name, view in views.items():
            expected = view.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert found[name][1:] == (tuple(view.shape), expected), name


def test_a_tensor_whose_bytes_are_not_aligned_is_read(tmp_path: Path, put: Put, stored: Stored) -> None:
    path = put(tmp_path / "odd", a=np.array([1], np.uint8), w=_f32(1, 2, 3))
    found = stored(mean([load(path), load(path, "again")]).save(tmp_path / "out"))
    assert found["w"][2] == _f32(1, 2, 3).tobytes()


def test_a_header_that_names_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    entry = b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    head = b"{" + entry + b"," + entry + b"}"
    path = tmp_path / "twice.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(4))
    with pytest.raises(CheckpointError, match=r"twice\.safetensors .*the key 'w' stands twice"):
        load(path)


def test_integers_must_agree_and_are_never_averaged(tmp_path: Path, put: Put, stored: Stored) -> None:
    ids = np.arange(5)
    paths = [put(tmp_path / f"{i}.st", w=_f32(i), position_ids=ids, mask=ids > 2) for i in range(3)]
    found = stored(mean([load(path) for path in paths]).save(tmp_path / "out"))
    assert found["position_ids"] == ("I64", (5,), ids.tobytes())
    assert found["mask"] == ("BOOL", (5,), (ids > 2).tobytes())
    put(paths[2], w=_f32(2), position_ids=ids + 1, mask=ids > 2)
    with pytest.raises(
        MismatchError, match=r"'position_ids' holds integers that differ between .*0\.st and .*2\.st"
    ):
        mean([load(path) for path in paths]).save(tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_step_counters_are_the_base_s_or_the_largest_of_a_mean(
    tmp_path: Path, put: Put, stored: Stored
) -> None:
    name = "bn.num_batches_tracked"
    steps = (30, 90, 60)
    few, many, some = (load(put(tmp_path / f"{n}.st", w=_f32(n), **{name: np.int64(n)})) for n in steps)
    for merged, expected in (
        (mean([few, many, some]), 90),
        (mean([some, few]), 60),
        (interpolate(some, many, 0.5), 60),
        (few + 2 * (many - some), 30),
        (many, 90),
    ):
        found = stored(merged.save(tmp_path / "out", force=True))
        assert np.frombuffer(found[name][2], np.int64).tolist() == [expected], str(merged)


# -- size ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tensor_of_more_than_2_gib_is_merged(tmp_path: Path, put_sparse: Put) -> None:
    numel = 600_000_001  # 2.4 GB in, and an output whose second half lies beyond 2**31
    paths = [put_sparse(tmp_path / f"{name}.safetensors", "F32", (numel,)) for name in "ab"]
    marks = {0: 1.0, 2**29 - 1: 2.0, 2**29: 3.0, numel - 1: 4.0}
    start = paths[0].stat().st_size - 4 * numel
    with paths[0].open("r+b") as file:
        for at, value in marks.items():
            file.seek(start + 4 * at)
            file.write(_f32(value).tobytes())
    out = mean([load(path) for path in paths]).save(tmp_path / "out.safetensors", digests=False)
    begin = out.stat().st_size - 4 * numel
    with out.open("rb") as file:
        for at, value in marks.items():
            file.seek(begin + 4 * at)
            assert np.frombuffer(file.read(4), np.float32)[0] == value / 2
