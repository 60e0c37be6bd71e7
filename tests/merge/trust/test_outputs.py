"""What happens to outputs: disks that are full, folders that are read-only, links, names, and two runs at once."""

import errno
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipmerge.checkpoint.output import whole_file
from clipmerge.checkpoint.read import Reader
from clipmerge.errors import OutputError
from clipmerge.weights.weights import Weights, load, mean

Put = Callable[..., Path]


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def weights(tmp_path: Path, put: Put) -> Weights:
    folder = tmp_path / "in"
    folder.mkdir()
    a = put(folder / "a.safetensors", w=np.arange(2000, dtype=np.float32))
    b = put(folder / "b.safetensors", w=np.ones(2000, np.float32))
    return mean([load(a), load(b)])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "soup.safetensors"


# -- a full disk ---------------------------------------------------------------------------------------------

LIMITED = """
import os, resource, sys
from pathlib import Path
import clipmerge as cm
from clipmerge.errors import ClipmergeError, OutputError
folder = Path(sys.argv[1])
weights = cm.load(folder / "in" / "a.safetensors")
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    weights.save(folder / "out" / "soup.safetensors", force=True)
except OutputError as error:
    print(error.message)
"""


def test_a_file_size_limit_is_an_error_and_the_old_file_stays(
    weights: Weights, out: Path, program: Callable[..., Any]
) -> None:
    out.write_bytes(b"old")
    done = program(LIMITED, out.parent.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out} needs 0.0 MB and does not fit: File too large\n"
    assert _names(out.parent) == [out.name]
    assert out.read_bytes() == b"old"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True
        )
    except OSError as error:
        pytest.skip(f"no mount command: {error}")
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_too_small_is_an_error_before_anything_is_written(
    tmp_path: Path, put: Put, small_disk: Path
) -> None:
    weights = load(put(tmp_path / "a.safetensors", w=np.ones(50_000, np.float32)))
    with pytest.raises(OutputError, match=r"needs 0\.2 MB and does not fit: No space left on device"):
        weights.save(small_disk / "out.safetensors")
    assert _names(small_disk) == []


def _full_at(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_disk_that_fills_up_meanwhile_is_an_error_and_nothing_is_left_behind(
    weights: Weights, out: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    _full_at(call, monkeypatch)
    with pytest.raises(OutputError, match="does not fit: No space left on device") as caught:
        weights.save(out)
    assert caught.value.hint == "free some space or write to another disk; nothing was left behind"
    assert _names(out.parent) == []


def test_a_file_system_without_fallocate_works(
    weights: Weights, out: Path, monkeypatch: pytest.MonkeyPatch, digest: Callable[[Path], str]
) -> None:
    weights.save(out)
    expected = digest(out)

    def lacking(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", lacking)
    weights.save(out, force=True)
    assert digest(out) == expected


def test_a_file_system_without_locks_and_hard_links_works(
    weights: Weights, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr("fcntl.flock", lacking)
    monkeypatch.setattr(os, "link", lacking)
    weights.save(out)
    assert _names(out.parent) == [out.name]
    assert weights.save(out) == out  # the same bytes
    out.write_bytes(b"theirs")
    with pytest.raises(OutputError, match="already exists"):
        weights.save(out)
    assert out.read_bytes() == b"theirs"


# -- folders that cannot be written to -----------------------------------------------------------------------

AS_NOBODY = """
import json, os, sys
from pathlib import Path
import clipmerge as cm
from clipmerge.errors import ClipmergeError, OutputError
folder = Path(sys.argv[1])
weights = cm.load(folder / "in.safetensors")
weights.save(folder / "first.safetensors")  # imports everything while it still may
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
else:
    os.chmod(folder / "readonly", 0o555)
    os.chmod(folder / "secret.safetensors", 0)
errors = []
for attempt in (
    lambda: weights.save(folder / "readonly" / "out.safetensors"),
    lambda: weights.save(folder / "readonly" / "there.safetensors", force=True),
    lambda: cm.load(folder / "secret.safetensors"),
):
    try:
        attempt()
    except ClipmergeError as error:
        errors.append([type(error).__name__, error.message.replace(str(folder), "F"), error.hint])
print(json.dumps(errors))
"""


def test_read_only_folders_and_unreadable_inputs_are_refused_with_a_reason(
    tmp_path_factory: pytest.TempPathFactory, put: Put, program: Callable[..., Any]
) -> None:
    folder = tmp_path_factory.mktemp("shared")
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
        if parent.name.startswith("pytest-of-"):
            break
    put(folder / "in.safetensors", w=np.ones(3, np.float32))
    put(folder / "secret.safetensors", w=np.ones(3, np.float32)).chmod(0o600)
    readonly = folder / "readonly"
    readonly.mkdir(mode=0o755)
    (readonly / "there.safetensors").write_bytes(b"old")
    done = program(AS_NOBODY, folder)
    assert done.returncode == 0, done.stderr
    refused = "the folder F/readonly cannot be written to"
    assert json.loads(done.stdout) == [
        ["OutputError", refused, "check its permissions"],
        ["OutputError", refused, "check its permissions"],
        ["CheckpointError", "F/secret.safetensors cannot be read: Permission denied", None],
    ]
    readonly.chmod(0o755)
    assert _names(readonly) == ["there.safetensors"]
    assert (readonly / "there.safetensors").read_bytes() == b"old"


# -- links ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_is_an_input_under_another_name_is_refused(
    weights: Weights, out: Path, link: Callable[[Path, Path], None], force: bool
) -> None:
    source = out.parent.parent / "in" / "a.safetensors"
    before = source.read_bytes()
    link(source, out)
    with pytest.raises(OutputError, match="is also an input") as caught:
        weights.save(out, force=force)
    assert caught.value.hint == "write to another name; inputs are never replaced"
    assert source.read_bytes() == before


def test_an_input_that_is_a_link_to_the_output_is_refused(tmp_path: Path, put: Put) -> None:
    real = put(tmp_path / "real.safetensors", w=np.ones(3, np.float32))
    (tmp_path / "link.safetensors").symlink_to(real)
    with pytest.raises(OutputError, match="is also an input"):
        load(tmp_path / "link.safetensors").save(real, force=True)


def test_an_output_that_is_an_input_through_a_linked_folder_is_refused(tmp_path: Path, put: Put) -> None:
    (tmp_path / "folder").mkdir()
    real = put(tmp_path / "folder" / "a.safetensors", w=np.ones(3, np.float32))
    (tmp_path / "alias").symlink_to(tmp_path / "folder")
    with pytest.raises(OutputError, match="is also an input"):
        load(real).save(tmp_path / "alias" / ".." / "folder" / "a.safetensors", force=True)


def test_an_index_whose_shards_are_input_is_refused_opened_by_itself_or_by_its_folder(
    tmp_path: Path, put: Put
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    many = {f"w{i}": np.full(8, i, np.float32) for i in range(3)}
    load(put(tmp_path / "many.safetensors", **many)).save(folder / "model.safetensors", shard_size=32)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for opened in (folder, folder / "model.safetensors.index.json"):
        for shard_size in (32, 64):  # other shards, the same index
            with pytest.raises(OutputError, match="is also an input"):
                load(opened).save(folder / "model.safetensors", shard_size=shard_size, force=True)
        with pytest.raises(OutputError, match="is also an input"):
            load(opened).save(folder / "model.safetensors.index.json", force=True)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("legacy", [True, False])
def test_an_output_that_is_a_torch_file_which_was_read_into_memory_is_refused(
    tmp_path: Path, legacy: bool
) -> None:
    import torch

    path = tmp_path / "model.pt"
    torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(OutputError, match="is also an input"):
        load(path).save(path, force=True)


def test_a_linked_output_stays_a_link_and_what_it_points_to_is_replaced(weights: Weights, out: Path) -> None:
    elsewhere = out.parent.parent / "elsewhere.safetensors"
    elsewhere.write_bytes(b"old")
    out.symlink_to(elsewhere)
    with pytest.raises(OutputError, match="already exists"):
        weights.save(out)
    assert weights.save(out, force=True) == elsewhere
    assert out.is_symlink()
    assert load(out).names == ("w",)


def test_a_dangling_link_gets_the_file_that_it_names(weights: Weights, out: Path) -> None:
    out.symlink_to("there.safetensors")
    weights.save(out)
    assert out.is_symlink()
    assert (out.parent / "there.safetensors").is_file()


def test_what_is_no_regular_file_is_never_replaced(weights: Weights, out: Path) -> None:
    os.mkfifo(out)
    with pytest.raises(OutputError, match="is not a regular file"):
        weights.save(out, force=True)
    with pytest.raises(OutputError, match="/dev/null is not a regular file"):
        weights.save("/dev/null", force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_as_output_is_refused_and_told_a_name(weights: Weights, out: Path, force: bool) -> None:
    with pytest.raises(OutputError, match="is a folder") as caught:
        weights.save(out.parent, force=force)
    assert caught.value.hint == f"name the file: -o {out.parent}/merged.safetensors"


def test_a_folder_that_does_not_exist_is_refused(weights: Weights, out: Path) -> None:
    with pytest.raises(OutputError, match="does not exist") as caught:
        weights.save(out.parent / "deeper" / "soup.safetensors")
    assert caught.value.hint == f"mkdir -p {out.parent / 'deeper'}"


# -- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "with spaces.safetensors",
        'it\'s "quoted".safetensors',
        "two\nlines.safetensors",
        "größe-模型-🥣.safetensors",
        os.fsdecode(b"not \xff unicode.safetensors"),
        "-o.safetensors",
        "*[a-z]?.safetensors",
        "no suffix",
        ".hidden",
        "x" * 255,
        "é" * 127,
        "x" * 240 + ".safetensors"[:15],
    ],
    ids=ascii,
)
def test_any_name_can_be_written_read_and_written_over(
    weights: Weights, out: Path, name: str, leftovers: Callable[[Path], list[str]]
) -> None:
    path = out.with_name(name)
    weights.save(path)
    again = load(path)
    assert Reader().dense(again.checkpoints[0].tensors["w"]).sum() == np.float32(0.5) * (2000 + 1999 * 1000)
    again.save(out.with_name("again"))  # the name is in the provenance of what is made of it
    weights.save(path, force=True)
    assert leftovers(out.parent) == []


def test_leftovers_of_a_name_too_long_for_them_are_found_again(
    weights: Weights, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = out.with_name("x" * 255)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # as if the process were killed
    with pytest.raises(KeyboardInterrupt), whole_file(path):
        raise KeyboardInterrupt
    monkeypatch.undo()
    (left,) = _names(out.parent)
    assert left.startswith(".xxx")
    assert left.endswith(".clipmerge-tmp")
    weights.save(path)
    assert _names(out.parent) == [path.name]


def test_a_name_longer_than_the_file_system_allows_is_an_error_of_ours(weights: Weights, out: Path) -> None:
    with pytest.raises(OutputError, match="File name too long") as caught:
        weights.save(out.with_name("x" * 256))
    assert caught.value.hint == "choose a shorter name"
    with pytest.raises(OutputError, match="no name for a file"):
        weights.save(out.with_name("a\0b"))


# -- two runs at once ----------------------------------------------------------------------------------------

AT_ONCE = """
import hashlib, json, os, sys
from pathlib import Path
import clipmerge as cm
from clipmerge.errors import ClipmergeError, OutputError
folder, force = Path(sys.argv[1]), sys.argv[2] == "force"
target = folder / "out" / "soup.safetensors"
a, b = (cm.load(folder / "in" / f"{name}.safetensors") for name in "ab")
choices = [cm.interpolate(a, b, k / 4) for k in range(4)]
whole = set()
for k, weights in enumerate(choices):
    whole.add(hashlib.sha256(weights.save(folder / f"{k}.safetensors").read_bytes()).hexdigest())
ready, go = os.pipe()
children = []
for weights in choices:
    children.append(os.fork())
    if not children[-1]:
        code = 0
        os.close(go)
        os.read(ready, 1)
        try:
            for _ in range(20 if force else 1):
                weights.save(target, force=force)
        except OutputError:
            code = 3
        os._exit(code)
os.close(go)
codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
is_whole = hashlib.sha256(target.read_bytes()).hexdigest() in whole
print(json.dumps([codes, is_whole, os.listdir(target.parent)]))
"""


@pytest.mark.parametrize(("mode", "codes"), [("force", [0, 0, 0, 0]), ("keep", [0, 3, 3, 3])])
def test_runs_that_write_one_output_at_once_all_finish_or_are_refused_and_it_is_whole(
    weights: Weights, out: Path, program: Callable[..., Any], mode: str, codes: list[int]
) -> None:
    done = program(AT_ONCE, out.parent.parent, mode)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [codes, True, [out.name]]


SHARDS_AT_ONCE = """
import json, os, sys
from pathlib import Path
import clipmerge as cm
from clipmerge.weights.digest import content_digest
folder = Path(sys.argv[1])
out = folder / "out"
a, b = (cm.load(folder / f"many-{name}.st") for name in "ab")
choices = [cm.interpolate(a, b, k / 4) for k in range(3)]
whole = [content_digest(cm.load(w.save(folder / f"{k}.st")).checkpoints[0]) for k, w in enumerate(choices)]
children = []
for weights in choices:
    children.append(os.fork())
    if not children[-1]:
        for _ in range(15):
            weights.save(out / "soup.safetensors", shard_size=64, force=True)
        os._exit(0)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
found = content_digest(cm.load(out / "soup.safetensors.index.json").checkpoints[0])
print(json.dumps([codes, found in whole, len(os.listdir(out))]))
"""


def test_runs_that_write_the_same_shards_at_once_leave_those_of_one_run(
    tmp_path: Path, out: Path, put: Put, program: Callable[..., Any]
) -> None:
    for name, value in (("a", 0.0), ("b", 1.0)):
        put(tmp_path / f"many-{name}.st", **{f"w{i}": np.full(8, value, np.float32) for i in range(8)})
    done = program(SHARDS_AT_ONCE, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[0, 0, 0], True, 5]


def test_the_same_merge_again_finds_its_bytes_there_and_leaves_them(weights: Weights, out: Path) -> None:
    weights.save(out)
    before = out.stat()
    assert weights.save(out) == out
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert _names(out.parent) == [out.name]


@pytest.mark.parametrize("change", ["a byte of the output", "a parent", "a note", "the dtype"])
def test_the_same_merge_again_with_other_bytes_is_refused(
    weights: Weights, out: Path, change: str, put: Put
) -> None:
    weights.save(out)
    options: dict[str, Any] = {}
    if change == "a byte of the output":
        content = bytearray(out.read_bytes())
        content[-1] ^= 1
        out.write_bytes(content)
    elif change == "a parent":
        a, b = (checkpoint.path for checkpoint in weights.checkpoints)
        assert a is not None
        assert b is not None
        put(b, w=np.full(2000, 3, np.float32))
        weights = mean([load(a), load(b)])
    else:
        options = {"metadata": {"note": "another"}} if change == "a note" else {"dtype": "F16"}
    before = out.read_bytes()
    with pytest.raises(OutputError, match="exists"):
        weights.save(out, **options)
    assert out.read_bytes() == before
    assert _names(out.parent) == [out.name]


def test_a_file_that_appears_meanwhile_is_kept(weights: Weights, out: Path) -> None:
    with pytest.raises(OutputError, match="exists and holds something else"):
        weights.save(out, on_progress=lambda *_: _touch(out))
    assert out.read_bytes() == b"theirs"
    assert _names(out.parent) == [out.name]


# -- shards --------------------------------------------------------------------------------------------------


@pytest.fixture
def several(tmp_path: Path, put: Put) -> Weights:
    return load(put(tmp_path / "many.safetensors", **{f"w{i}": np.full(8, i, np.float32) for i in range(3)}))


SHARDS = [f"soup-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
INDEX = "soup.safetensors.index.json"


@pytest.mark.parametrize("there", [SHARDS[1], INDEX])
def test_any_shard_or_index_that_exists_is_refused_before_work(
    several: Weights, out: Path, there: str
) -> None:
    out.with_name(there).write_bytes(b"old")
    with pytest.raises(OutputError, match=f"{there} already exists"):
        several.save(out, shard_size=32)
    assert _names(out.parent) == [there]


def test_what_stands_under_the_same_name_in_another_shape_goes_with_it(several: Weights, out: Path) -> None:
    """Five shards, then two, then one file, then shards again: a folder never holds two answers."""
    mine = out.with_name("soup-00001-of-00002.bin")
    mine.write_bytes(b"not a shard of ours")
    shapes = [
        (32, [*SHARDS, INDEX]),
        (64, [s.replace("3.", "2.") for s in SHARDS[:2]] + [INDEX]),
        (None, [out.name]),
    ]
    for size, names in [*shapes, shapes[0], shapes[2]]:
        several.save(out, shard_size=size, force=True)
        assert _names(out.parent) == sorted([*names, mine.name])
        np.testing.assert_array_equal(
            Reader().dense(load(out.parent / names[-1]).checkpoints[0].tensors["w2"]), np.full(8, 2, "f4")
        )


def test_without_force_no_other_shape_is_taken_away_and_no_input_ever(several: Weights, out: Path) -> None:
    several.save(out, shard_size=32)
    before = _names(out.parent)
    with pytest.raises(OutputError, match=f"{INDEX} already exists"):
        several.save(out)
    with pytest.raises(OutputError, match="is also an input"):
        load(out.with_name(INDEX)).save(out, force=True)
    assert _names(out.parent) == before


def test_an_index_of_another_kind_names_nothing_to_take_away(several: Weights, out: Path) -> None:
    theirs = out.with_name("other.safetensors")
    for content in (b"{", b"[]", b'{"weight_map": {"w": "other.safetensors", "v": "../x", "u": 3}}'):
        theirs.write_bytes(b"theirs")
        out.with_name(INDEX).write_bytes(content)
        several.save(out, force=True)
        assert _names(out.parent) == sorted([out.name, theirs.name])


def _touch(path: Path) -> None:
    path.write_bytes(b"theirs")


def test_a_shard_that_appears_meanwhile_is_kept_and_no_other_is_left(several: Weights, out: Path) -> None:
    theirs = out.with_name(SHARDS[2])
    with pytest.raises(OutputError, match="exists and holds something else"):
        several.save(out, shard_size=32, digests=False, on_progress=lambda *_: _touch(theirs))
    assert _names(out.parent) == [theirs.name]


def test_no_index_ever_names_a_mixture_of_old_and_new_shards(
    several: Weights, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several.save(out, shard_size=32)
    assert _names(out.parent) == sorted([*SHARDS, INDEX])
    done: list[str] = []
    replace = Path.replace

    def fail_at_the_second(self: Path, target: Path) -> Path:
        if done:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_at_the_second)
    with pytest.raises(OutputError, match="Input/output error"):
        several.save(out, shard_size=32, force=True)
    assert done == [SHARDS[0]]
    assert _names(out.parent) == SHARDS


# -- a pass that breaks off ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_a_callback_raises_ends_the_pass_and_leaves_nothing(
    weights: Weights, out: Path, error: type[BaseException], threads: int
) -> None:
    def fail(what: str, *_: int) -> None:
        if what == "merging":
            raise error("stop")

    running = threading.active_count()
    with pytest.raises(error, match="stop"):
        weights.save(out, threads=threads, on_progress=fail)
    assert _names(out.parent) == []
    assert threading.active_count() == running


def test_a_system_that_allows_no_more_threads_makes_it_slower_and_not_wrong(
    weights: Weights, out: Path, monkeypatch: pytest.MonkeyPatch, digest: Callable[[Path], str]
) -> None:
    expected = digest(weights.save(out, threads=3, digests=False))

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert digest(weights.save(out, threads=3, digests=False, force=True)) == expected
