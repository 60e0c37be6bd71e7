"""Files that appear whole or not at all, and the header in front."""

import errno
import fcntl
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from clipmerge.checkpoint.output import SUFFIX, check_target, new_files, whole_file, whole_folder, write_at
from clipmerge.checkpoint.safetensors import header, read_header
from clipmerge.checkpoint.tensors import Tensor
from clipmerge.errors import OutputError


def write_bytes(path: Path, content: bytes, *, force: bool = False, fsync: bool = False) -> None:
    with whole_file(path, force=force, fsync=fsync) as sibling:
        sibling.write_bytes(content)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- header --------------------------------------------------------------------------------------------------

MIXED = {
    "b": Tensor("F16", (3,), ()),
    "a": Tensor("F32", (2, 5), ()),
    "n": Tensor("I64", (), ()),
    "m": Tensor("BOOL", (3,), ()),
    "none": Tensor("F32", (0, 7), ()),
}


def test_a_header_puts_the_widest_elements_first_and_aligns_every_tensor() -> None:
    head, offsets, size = header(MIXED, {"format": "pt"})
    assert list(offsets) == ["n", "a", "none", "b", "m"]
    assert list(offsets.values()) == sorted(offsets.values())
    assert offsets["n"] == len(head)
    assert len(head) % 8 == 0
    assert all(
        offsets[name] % (tensor.nbytes // max(tensor.numel, 1) or 1) == 0 for name, tensor in MIXED.items()
    )
    assert size == len(head) + 8 + 40 + 6 + 3


def test_a_header_is_read_back_by_us_and_by_safetensors(tmp_path: Path) -> None:
    from safetensors import safe_open

    head, offsets, size = header(MIXED, {"größe": "é", "format": "pt"})
    path = tmp_path / "file.safetensors"
    path.write_bytes(head + bytes(size - len(head)))
    metadata, tensors = read_header(path)
    assert metadata == {"format": "pt", "größe": "é"}
    assert {n: (t.dtype, t.shape, t.extents[0].offset) for n, t in tensors.items()} == {
        n: (t.dtype, t.shape, offsets[n]) for n, t in MIXED.items()
    }
    with safe_open(path, "np") as file:
        assert file.metadata() == metadata
        for name, tensor in MIXED.items():
            assert file.get_tensor(name).shape == tensor.shape


def test_a_header_does_not_depend_on_the_order_of_its_tensors() -> None:
    turned = dict(reversed(MIXED.items()))
    assert header(MIXED, {"a": "1", "b": "2"}) == header(turned, {"b": "2", "a": "1"})


def test_a_header_of_nothing_is_valid(tmp_path: Path) -> None:
    head, offsets, size = header({}, {})
    (tmp_path / "empty").write_bytes(head)
    assert (offsets, size, read_header(tmp_path / "empty")) == ({}, len(head), ({}, {}))


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(OutputError, match="not Unicode"):
        header({"half \ud800": Tensor("F32", (), ())}, {})


# -- whole or not at all -------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"x", b"line\n" * 100_000])
def test_a_small_file_is_written_whole_with_the_usual_permissions(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    old = os.umask(0o027)
    try:
        write_bytes(path, content)
    finally:
        os.umask(old)
    assert path.read_bytes() == content
    assert path.stat().st_mode & 0o777 == 0o640
    assert path.stat().st_nlink == 1
    assert _names(tmp_path) == ["file"]


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old and longer")
    with pytest.raises(OutputError) as caught:
        write_bytes(path, b"new")
    assert caught.value.message == f"{path} already exists"
    assert caught.value.hint == "choose another name, or replace it with --force"
    assert path.read_bytes() == b"old and longer"
    write_bytes(path, b"new", force=True, fsync=True)
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_while_writing_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "b").write_bytes(b"old")
    targets = [(tmp_path / "a", 10), (tmp_path / "b", 10)]

    def interrupted() -> None:
        with new_files(targets, force=True) as (first, _):
            write_at(first, tmp_path / "a", 0, b"0123456789")
            assert len(_names(tmp_path)) == 3
            raise error

    with pytest.raises(error):
        interrupted()
    assert _names(tmp_path) == ["b"]
    assert (tmp_path / "b").read_bytes() == b"old"


def test_a_second_file_that_does_not_fit_takes_the_first_one_back(tmp_path: Path) -> None:
    too_large = 2**62
    with (
        pytest.raises(OutputError, match=r"needs 4,611,686,018,427\.4 MB and does not fit") as caught,
        new_files([(tmp_path / "a", 10), (tmp_path / "b", too_large)], force=False),
    ):
        pass
    assert caught.value.hint == "free some space or write to another disk; nothing was left behind"
    assert _names(tmp_path) == []


def test_bytes_land_where_they_are_put(tmp_path: Path) -> None:
    with new_files([(tmp_path / "a", 12)], force=False) as (descriptor,):
        write_at(descriptor, tmp_path / "a", 9, np.arange(3, dtype=np.uint8))
        write_at(descriptor, tmp_path / "a", 0, b"abc")
    assert (tmp_path / "a").read_bytes() == b"abc" + bytes(6) + b"\x00\x01\x02"


def test_a_write_that_is_cut_short_by_the_system_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    with new_files([(tmp_path / "a", 100)], force=False) as (descriptor,):
        write_at(descriptor, tmp_path / "a", 0, bytes(range(100)))
    assert (tmp_path / "a").read_bytes() == bytes(range(100))


# -- targets -------------------------------------------------------------------------------------------------


def test_a_target_is_followed_to_the_file_that_will_be_written(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "alias").symlink_to("real")
    (tmp_path / "real" / "link").symlink_to("file")
    assert check_target(tmp_path / "alias" / "link", force=False) == tmp_path / "real" / "file"


def test_a_folder_that_denies_access_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="cannot be written to"):
        check_target(tmp_path / "out", force=False)


def test_errors_of_the_system_are_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OutputError) as caught:
        write_bytes(tmp_path / "out", b"x")
    assert caught.value.message == f"{tmp_path / 'out'} cannot be written: Read-only file system"
    assert caught.value.hint == "write to another folder"


def test_a_path_through_a_file_or_in_a_loop_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "file" / "out", tmp_path / "loop" / "out"):
        with pytest.raises(OutputError):
            check_target(path, force=True)


# -- leftovers -----------------------------------------------------------------------------------------------


def test_only_this_target_s_abandoned_files_are_cleared(tmp_path: Path) -> None:
    target = tmp_path / "a[1]*.st"
    dead = tmp_path / f".{target.name}.0123abcd{SUFFIX}"
    kept = [
        tmp_path / f".{target.name}.0123abcde{SUFFIX}",
        tmp_path / f".{target.name}.x.0123abcd{SUFFIX}",
        tmp_path / f"{target.name}.0123abcd{SUFFIX}",
        tmp_path / f".a1x.st.0123abcd{SUFFIX}",
        tmp_path / f".{target.name}.0123abcd{SUFFIX}.bak",
    ]
    for path in (dead, *kept):
        path.write_bytes(b"")
    write_bytes(target, b"new")
    target.unlink()
    assert _names(tmp_path) == sorted(path.name for path in kept)


def test_a_leftover_that_is_a_link_a_folder_or_a_pipe_is_left_alone(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / f".out.00000001{SUFFIX}").symlink_to(victim)
    (tmp_path / f".out.00000002{SUFFIX}").mkdir()
    os.mkfifo(tmp_path / f".out.00000003{SUFFIX}")
    write_bytes(tmp_path / "out", b"x")
    assert victim.read_bytes() == b"precious"
    assert (tmp_path / "out").read_bytes() == b"x"


def test_a_reserved_file_has_its_size_is_locked_and_looks_like_its_target(tmp_path: Path) -> None:
    with new_files([(tmp_path / "out.st", 12345)], force=True):
        (sibling,) = tmp_path.iterdir()
        assert sibling.stat().st_size == 12345
        assert sibling.name.startswith(".out.st.")
        write_bytes(tmp_path / "out.st", b"of another run")
        assert sibling.exists(), "what another run is writing is left alone"
    assert (tmp_path / "out.st").stat().st_size == 12345


def test_a_file_that_is_cleared_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the making and the locking of a temporary file, another run may take it for a leftover."""
    flock = fcntl.flock
    cleared: list[Path] = []

    def late(descriptor: int, how: int) -> None:
        if not cleared and not how & fcntl.LOCK_NB:
            cleared.extend(tmp_path.iterdir())
            cleared[0].unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    write_bytes(tmp_path / "out", b"whole")
    assert len(cleared) == 1
    assert (tmp_path / "out").read_bytes() == b"whole"
    assert _names(tmp_path) == ["out"]


def test_an_interrupt_right_after_a_file_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = os.open

    def interrupted(path: Path, *rest: int) -> int:
        descriptor = opening(path, *rest)
        if str(path).endswith(SUFFIX):
            os.close(descriptor)
            raise KeyboardInterrupt
        return descriptor

    monkeypatch.setattr(os, "open", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "out"):
        pass
    assert _names(tmp_path) == []


def test_threads_that_write_one_file_leave_one_whole_file(tmp_path: Path) -> None:
    contents = [bytes([number]) * 50_000 for number in range(4)]

    def work(content: bytes) -> None:
        for _ in range(20):
            write_bytes(tmp_path / "out", content, force=True)

    workers = [threading.Thread(target=work, args=(content,)) for content in contents]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (tmp_path / "out").read_bytes() in contents
    assert _names(tmp_path) == ["out"]


def test_a_folder_appears_whole_or_its_files_replace_older_ones(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    dead = tmp_path / f".model.0123abcd{SUFFIX}"
    dead.mkdir()
    (dead / "half").write_bytes(b"half")
    with pytest.raises(ValueError, match="stop"), whole_folder(folder, ["a", "b"]) as stage:  # noqa: PT012
        (stage / "a").write_bytes(b"a")
        raise ValueError("stop")
    assert _names(tmp_path) == []
    for content in (b"old", b"new"):
        with whole_folder(folder, ["a", "b"]) as stage:
            (stage / "a").write_bytes(content)
            (stage / "b").write_bytes(content)
        assert (_names(tmp_path), _names(folder)) == (["model"], ["a", "b"])
        assert (folder / "b").read_bytes() == content


def test_an_index_comes_last_and_goes_first(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("1-of-2", "2-of-2", "index")]
    for path in paths:
        path.write_bytes(b"old")
    (tmp_path / "2-of-2").unlink()
    (tmp_path / "2-of-2").mkdir()  # the second rename fails
    with pytest.raises(OutputError), new_files([(path, 3) for path in paths], force=True):
        pass
    assert _names(tmp_path) == ["1-of-2", "2-of-2"]


def test_the_header_of_many_tensors_is_what_json_says() -> None:
    tensors = {f"w{i}": Tensor("F32", (i,), ()) for i in range(50)}
    head, offsets, _ = header(tensors, {})
    found = json.loads(head[8:])
    assert {name: len(head) + entry["data_offsets"][0] for name, entry in found.items()} == offsets
