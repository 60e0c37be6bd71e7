"""Headers: what is read, and every rule that a broken one breaks."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from clipmerge.checkpoint.open import open_checkpoint
from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.safetensors import read_header
from clipmerge.errors import CheckpointError

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def test_reads_what_the_reference_implementation_writes(tmp_path: Path) -> None:
    arrays = {
        "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.array(2.5, np.float64),
        "empty": np.zeros((0, 3), np.float16),
        "mask": np.array([True, False, True]),
        "ü name": np.arange(3, dtype=np.int64),
    }
    save_file(arrays, tmp_path / "x y-ü.safetensors", metadata={"format": "pt", "note": "ä"})
    checkpoint = open_checkpoint(tmp_path / "x y-ü.safetensors")
    assert list(checkpoint.tensors) == sorted(arrays)
    assert checkpoint.metadata == {"format": "pt", "note": "ä"}
    assert checkpoint.name.isidentifier()
    for name, array in arrays.items():
        read = Reader().dense(checkpoint.tensors[name])
        assert read.dtype == array.dtype
        assert read.shape == array.shape
        np.testing.assert_array_equal(read, array)


def test_old_unaligned_files_are_read(tmp_path: Path, raw_safetensors: Callable[..., Path]) -> None:
    value = np.array([1.5, -2.0], np.float32)
    text = json.dumps({"x": F32})
    text += " " * ((5 - len(text)) % 8)
    path = raw_safetensors(tmp_path / "a.safetensors", text, value.tobytes())
    assert (8 + len(text)) % 4
    np.testing.assert_array_equal(Reader().dense(open_checkpoint(path).tensors["x"]), value)


def test_a_file_without_tensors_is_read(tmp_path: Path, raw_safetensors: Callable[..., Path]) -> None:
    assert read_header(raw_safetensors(tmp_path / "a", "{}")) == ({}, {})


BROKEN: Mapping[str, tuple[Any, int, str]] = {
    "same key twice": (f'{{"x":{json.dumps(F32)},"x":{json.dumps(F32)}}}', 8, "the key 'x' stands twice"),
    "twice inside": ('{"x":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8, "'dtype' stands"),
    "not an object": ("[1]", 0, "not a JSON object"),
    "not JSON": ("{x", 0, "malformed JSON"),
    "NaN": ('{"x":NaN}', 0, "needs exactly"),
    "not UTF-8": ('{"\udc80"', 0, ""),
    "deep": ("{" + '"a":{' * 100_000, 0, "malformed JSON|nested too deeply"),
    "huge number": ('{"x":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,8]}}', 8, "malformed JSON"),
    "lone surrogate": ({"\ud800": F32}, 8, "invalid JSON in header"),
    "metadata not text": ({"__metadata__": {"a": 1}}, 0, "expected a string"),
    "metadata a list": ({"__metadata__": ["a"]}, 0, "expected a map"),
    "unknown dtype": ({"x": {**F32, "dtype": "F4"}}, 8, "'x' has the dtype 'F4'"),
    "dtype a list": ({"x": {**F32, "dtype": ["F32"]}}, 8, "dtype"),
    "extra field": ({"x": {**F32, "more": 1}}, 8, "needs exactly"),
    "missing field": ({"x": {"dtype": "F32", "shape": [2]}}, 8, "needs exactly"),
    "entry a number": ({"x": 3}, 0, "needs exactly"),
    "negative size": ({"x": {**F32, "shape": [-2]}}, 8, "expected usize"),
    "float size": ({"x": {**F32, "shape": [2.0]}}, 8, "expected usize"),
    "bool size": ({"x": {**F32, "shape": [True, 2]}}, 8, "expected usize"),
    "offsets reversed": ({"x": {**F32, "data_offsets": [8, 0]}}, 8, "invalid (offset|length 3)"),
    "three offsets": ({"x": {**F32, "data_offsets": [0, 8, 8]}}, 8, "invalid (offset|length 3)"),
    "size and offsets differ": ({"x": {**F32, "shape": [3]}}, 8, "invalid shape"),
    "larger than the file": ({"x": {**F32, "shape": [200], "data_offsets": [0, 800]}}, 8, "bytes, its header promises"),
    "huge": ({"x": {**F32, "shape": [2**61], "data_offsets": [0, 2**63]}}, 8, "overflow"),
    "huge and empty": ({"x": {**F32, "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}, 0, "overflow"),
    "too many axes": ({"x": {**F32, "shape": [2] + [1] * 99}}, 8, "100 dimensions"),
    "hole at the start": ({"x": {**F32, "data_offsets": [4, 12]}}, 12, "invalid offset for tensor `x`"),
    "overlap": ({"x": F32, "y": {**F32, "data_offsets": [4, 12]}}, 12, "invalid offset for tensor `y`"),
    "same place": ({"x": F32, "y": F32}, 8, "invalid offset for tensor `[xy]`"),
    "rest": ({"x": F32}, 11, "bytes, its header promises"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_header_is_refused_with_its_reason(
    case: str, tmp_path: Path, raw_safetensors: Callable[..., Path]
) -> None:
    header, nbytes, reason = BROKEN[case]
    path = tmp_path / "broken.safetensors"
    if case == "not UTF-8":
        path.write_bytes((4).to_bytes(8, "little") + b'{"\x80"')
        reason = "malformed JSON"
    else:
        raw_safetensors(path, header, b"\0" * nbytes)
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(path)
    assert "broken.safetensors" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("size", [0, 1, 3, 2**62, 2**64 - 1, 100_000_001, 500])
def test_a_header_size_that_cannot_be_is_refused(
    size: int, tmp_path: Path, raw_safetensors: Callable[..., Path]
) -> None:
    path = raw_safetensors(tmp_path / "a.safetensors", {"x": F32}, b"\0" * 8, size=size)
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = save({"a": np.ones((2, 3), np.float32), "b": np.ones(2, np.float16)}, metadata={"format": "pt"})
    path = tmp_path / "a.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_missing_and_unreadable_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors does not exist"):
        open_checkpoint(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint("a\0b")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="- does not exist") as refusal:
        open_checkpoint("-")
    assert "none is read from standard input" in str(refusal.value.hint)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x7fELF" + b"\0" * 60, "not a checkpoint that clipmerge knows"),
    ],
)
def test_what_is_no_checkpoint_is_called_by_its_name(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(tmp_path / "x.pt")


def test_a_tensor_over_two_gigabytes_is_found_where_it_lies(
    tmp_path: Path, raw_safetensors: Callable[..., Path]
) -> None:
    big = (1 << 31) + 4
    header = {
        "big": {"dtype": "U8", "shape": [big], "data_offsets": [0, big]},
        "small": {"dtype": "U8", "shape": [3], "data_offsets": [big, big + 3]},
    }
    path = raw_safetensors(tmp_path / "a.safetensors", header)
    with path.open("r+b") as file:
        file.seek(0, 2)
        file.seek(big, 1)
        file.write(b"abc")
    checkpoint = open_checkpoint(path)
    assert Reader().dense(checkpoint.tensors["small"]).tobytes() == b"abc"
    assert checkpoint.tensors["big"].nbytes == big


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda n: n != "__metadata__")
arrays = hnp.arrays(
    st.sampled_from([np.float32, np.float16, np.float64, np.int64, np.int8, np.uint8, np.bool_]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(names, arrays, max_size=5), st.dictionaries(st.text(max_size=5), st.text(max_size=5)))
def test_agrees_with_the_reference_implementation(
    tmp_path: Path, tensors: dict[str, Any], metadata: dict[str, str]
) -> None:
    path = tmp_path / "h.safetensors"
    try:
        path.write_bytes(save(tensors, metadata=metadata or None))
        with safe_open(path, framework="numpy") as reference:
            expected = {name: reference.get_tensor(name) for name in reference.keys()}  # noqa: SIM118
    except (SafetensorError, UnicodeEncodeError):
        return
    found_metadata, found = read_header(path)
    assert found_metadata == metadata
    assert {name: (t.shape, t.nbytes) for name, t in found.items()} == {
        name: (array.shape, array.nbytes) for name, array in expected.items()
    }
