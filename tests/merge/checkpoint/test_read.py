"""Bytes of tensors into buffers, and files that are not what they were."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import Checkpoint, Extent, Tensor
from clipmerge.errors import CheckpointError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(200)))
    return path


def _read(tensor: Tensor, start: int, size: int) -> list[int]:
    out = np.full(size, 255, np.uint8)
    with Reader() as reader:
        reader.into(tensor, start, out)
    return out.tolist()


@pytest.mark.parametrize(
    ("start", "size", "expected"),
    [
        (0, 3, [10, 11, 12]),
        (2, 4, [12, 13, 100, 101]),
        (4, 2, [100, 101]),
        (3, 5, [13, 100, 101, 7, 8]),
        (6, 3, [7, 8, 9]),
        (0, 9, [10, 11, 12, 13, 100, 101, 7, 8, 9]),
        (9, 0, []),
    ],
)
def test_several_extents_read_as_one_run_of_bytes(
    file: Path, start: int, size: int, expected: list[int]
) -> None:
    memory = np.arange(7, 10, dtype=np.uint8)
    extents = (Extent(file, 10, 4), Extent(file, 100, 0), Extent(file, 100, 2), Extent(memory, 0, 3))
    assert _read(Tensor("U8", (9,), extents), start, size) == expected


@pytest.mark.parametrize("source", ["file", "memory"])
def test_strides_are_resolved_into_row_major_order(tmp_path: Path, source: str) -> None:
    stored = np.arange(24, dtype=np.int16)
    (tmp_path / "bytes").write_bytes(b"odd" + stored.tobytes())
    extent = Extent(tmp_path / "bytes", 3, 48) if source == "file" else Extent(stored.view(np.uint8), 0, 48)
    views: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any]] = {
        "transposed": ((6, 4), (1, 6), stored.reshape(4, 6).T),
        "every other": ((4, 3), (6, 2), stored.reshape(4, 6)[:, ::2]),
        "repeated": ((2, 5), (0, 1), np.broadcast_to(stored[:5], (2, 5))),
    }
    with Reader() as reader:
        for name, (shape, strides, expected) in views.items():
            found = reader.dense(Tensor("I16", shape, (extent,), strides))
            assert np.array_equal(found, expected), name
            assert found.flags.c_contiguous
            assert found.flags.owndata


def test_0_d_and_empty_tensors(file: Path) -> None:
    with Reader() as reader:
        assert reader.dense(Tensor("U8", (), (Extent(file, 5, 1),))).tolist() == 5
        assert reader.dense(Tensor("F32", (3, 0), (Extent(file, 5, 0),))).shape == (3, 0)
        assert reader.dense(Tensor("F32", (0,), ())).shape == (0,)


def test_what_is_read_does_not_change_with_the_file(file: Path) -> None:
    with Reader() as reader:
        before = reader.dense(Tensor("U8", (3,), (Extent(file, 0, 3),)))
        file.write_bytes(bytes(200))
        assert before.tolist() == [0, 1, 2]


def test_a_file_that_ends_early_is_named_with_the_place(file: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        _read(Tensor("U8", (50,), (Extent(file, 190, 50),)), 0, 50)
    assert caught.value.message == f"{file} ends at byte 200, before the end that its header promises"
    assert caught.value.hint == "the file is truncated or was changed while it was read; copy it again"


@pytest.mark.parametrize(("name", "said"), [("gone", "No such file or directory"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=f"cannot be read: {said}"):
        _read(Tensor("U8", (1,), (Extent(tmp_path / name, 0, 1),)), 0, 1)


def test_unchanged_notices_a_file_written_to_while_it_is_open(file: Path) -> None:
    tensor = Tensor("U8", (1,), (Extent(file, 0, 1),))
    with Reader() as reader:
        reader.dense(tensor)
        reader.unchanged()
        time.sleep(0.02)
        with file.open("r+b") as opened:
            opened.write(b"x")
        with pytest.raises(CheckpointError, match="changed while it was read"):
            reader.unchanged()


def test_a_stamp_ties_a_checkpoint_to_the_file_it_was_read_from(file: Path) -> None:
    tensor = Tensor("U8", (1,), (Extent(file, 0, 1),))
    plain = Checkpoint("a", {"w": tensor}, path=file)
    stamped = Checkpoint("a", {"w": tensor}, path=file, stamps=plain.stamps_now())
    with Reader([stamped, plain]) as reader:
        reader.dense(tensor)
    os.utime(file, ns=(1, 1))
    with Reader([plain]) as reader:
        reader.dense(tensor)
    with (
        Reader([stamped]) as reader,
        pytest.raises(CheckpointError, match=r"bytes changed after it was opened\nhint: load it again"),
    ):
        reader.dense(tensor)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file or directory"):
        plain.stamps_now()


def test_threads_share_one_descriptor_and_all_are_closed_at_the_end(file: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("needs Linux's /proc")

    def opened() -> int:
        return sum(1 for fd in descriptors.iterdir() if fd.exists() and fd.resolve() == file.resolve())

    tensor = Tensor("U8", (100,), (Extent(file, 0, 100),))
    found: list[int] = []
    with Reader() as reader:
        workers = [
            threading.Thread(target=lambda: found.append(int(reader.dense(tensor).sum()))) for _ in range(8)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert opened() == 1
    assert opened() == 0
    assert found == [sum(range(100))] * 8


def test_a_refused_file_leaves_no_descriptor_open(file: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("needs Linux's /proc")
    tensor = Tensor("U8", (1,), (Extent(file, 0, 1),))
    stale = Checkpoint("a", {"w": tensor}, path=file, stamps={file: (0, 0, 0, 0)})
    before = len(list(descriptors.iterdir()))
    for _ in range(3):
        with pytest.raises(CheckpointError), Reader([stale]) as reader:
            reader.dense(tensor)
    assert len(list(descriptors.iterdir())) == before
