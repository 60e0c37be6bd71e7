"""Files made to harm: nothing in them runs, and each is refused with what it asked for or where it lies."""

import os
import pickle
import resource
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clipmerge.checkpoint.open import open_checkpoint
from clipmerge.errors import CheckpointError, UnsafeFileError


class Calls:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def in_zip(path: Path, data: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3")


def bare(path: Path, data: bytes) -> None:
    path.write_bytes(data)


PUT = [in_zip, bare]


@pytest.mark.parametrize("put", PUT)
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("touch {}",), "posix.system"),
        (eval, ("__import__('os').system('touch {}')",), "builtins.eval"),
        (exec, ("open('{}', 'w')",), "builtins.exec"),
        (open, ("{}", "w"), "_?io.open"),
        (subprocess.Popen, (["touch", "{}"],), "subprocess.Popen"),
        (__import__, ("antigravity",), "builtins.__import__"),
        (torch.load, ("{}",), "torch.serialization.load"),
        (torch.hub.load, ("a", "b"), "torch.hub.load"),
    ],
)
def test_a_call_is_refused_by_name_and_does_not_happen(
    function: Any, args: tuple[Any, ...], name: str, protocol: int, put: Callable[..., None], tmp_path: Path
) -> None:
    trap = tmp_path / "trap"
    filled = tuple(str(a).replace("{}", str(trap)) if isinstance(a, str) else a for a in args)
    payload = {"state_dict": {"a": 1}, "callback": Calls(function, *filled)}
    put(tmp_path / "evil.pt", pickle.dumps(payload, protocol=protocol))
    with pytest.raises(UnsafeFileError, match=f"it calls {name}") as caught:
        open_checkpoint(tmp_path / "evil.pt")
    assert "evil.pt" in caught.value.message
    assert not trap.exists()


BY_HAND = {
    "the classic": (b"cos\nsystem\n(S'touch trap'\ntR.", "os.system"),
    "INST": (b"(S'touch trap'\nios\nsystem\n.", "os.system"),
    "OBJ": (b"(cos\nsystem\nS'touch trap'\no.", "os.system"),
    "getattr of a module's attribute": (
        b"\x80\x04cbuiltins\ngetattr\n(cos\npath\nX\x06\0\0\0systemtR(X\x01\0\0\0xtR.",
        "os.path.system",
    ),
    "BUILD on a class": (b"\x80\x02cos\nsystem\n}X\x01\0\0\0aK\x01sb.", "os.system"),
    "calling an instance": (b"\x80\x02cfoo\nBar\n)\x81)R.", "foo.Bar"),
    "rebuild by another function": (
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nNX\x01\0\0\0x\x85NtR.",
        "os.system",
    ),
    "rebuild without end": (
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._tensor\n_rebuild_from_type_v2\nN)NtR.",
        "torch._tensor._rebuild_from_type_v2",
    ),
    "a name with escapes": (b"\x80\x02cos\n\x1b[2Jsystem\n)R.", r"os\.\\x1b\[2Jsystem"),
}


@pytest.mark.parametrize("case", BY_HAND)
@pytest.mark.parametrize("put", PUT)
def test_tricks_at_the_level_of_opcodes(case: str, put: Callable[..., None], tmp_path: Path) -> None:
    data, name = BY_HAND[case]
    put(tmp_path / "evil.pt", data)
    with pytest.raises(UnsafeFileError, match=f"it calls {name}"):
        open_checkpoint(tmp_path / "evil.pt")


def tensor_pickle(numel: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> bytes:
    """`{"x": tensor}` over the storage `0`, whatever is said about it."""

    class Storage:
        pass

    class Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(value, Storage) else None

    import io

    out = io.BytesIO()
    rebuild = torch._utils._rebuild_tensor_v2
    tensor = Calls(rebuild, Storage(), offset, shape, strides, False, {})
    Pickler(out, protocol=2).dump({"x": tensor})
    return out.getvalue()


@pytest.mark.parametrize(
    ("numel", "shape", "strides", "offset"),
    [
        (4, (5,), (1,), 0),
        (4, (4,), (1,), 1),
        (4, (2, 2), (3, 1), 0),
        (4, (2**62, 2**62, 0), (1, 1, 1), 5),
        (5, (5,), (1,), 0),
        (2**62, (2**62,), (1,), 0),
        (4, (2**62, 2**62), (0, 0), 0),
        (4, (2**63,), (0,), 0),
        (4, (1,) * 33, (1,) * 33, 0),
        (4, (-1,), (1,), 0),
        (4, (2,), (-1,), 1),
        (4, (2,), (1, 1), 0),
        (4, (2.0,), (1,), 0),
        (4, (True,), (1,), 0),
        (-4, (2,), (1,), 0),
    ],
)
def test_tensors_that_reach_beyond_their_bytes_are_refused(
    numel: int, shape: Any, strides: Any, offset: int, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", tensor_pickle(numel, shape, strides, offset))
        archive.writestr("archive/data/0", b"\0" * 16)
    with pytest.raises(CheckpointError, match=r"a\.pt(: tensor| cannot be read)"):
        open_checkpoint(tmp_path / "a.pt")


def test_a_storage_named_with_dots_is_only_a_name(tmp_path: Path) -> None:
    data = tensor_pickle(4, (4,), (1,)).replace(b"X\x01\0\0\x000", b"X\x09\0\0\0../secret")
    (tmp_path / "secret").write_bytes(b"\1" * 16)
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("../secret", b"\2" * 16)
    with pytest.raises(CheckpointError, match=r"no entry 'archive/data/\.\./secret'"):
        open_checkpoint(tmp_path / "a.pt")


def bombs() -> dict[str, bytes]:
    laughs = b"\x80\x02]q\x00" + b"".join(b"h%c" % i * 2 + b"\x86q%c" % (i + 1) for i in range(60))
    return {
        "laughing tuples": laughs + b".",
        "laughing keys": b"\x80\x02}(" + laughs[2:] + b"K\x01u.",
        "nested lists": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
        "nested tuples": b"\x80\x02)" + b"\x85" * 400_000 + b".",
        "nested dicts": b"\x80\x02" + b"}K\x00" * 100_000 + b"N" + b"s" * 100_000 + b".",
        "marks": b"\x80\x02" + b"(" * 400_000 + b".",
        "steps": b"\x80\x02" + b"N0" * 600_000 + b"N.",
        "huge memo": b"\x80\x02Nr\xff\xff\xff\xffj\xff\xff\xff\xff.",
        "huge text": b"\x80\x02X\xff\xff\xff\xff.",
        "huge bytes": b"\x80\x04\x8e" + b"\xff" * 8 + b".",
        "huge frame": b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
        "huge number": b"\x80\x02\x8b" + struct.pack("<I", 1 << 20) + b"\x7f" * (1 << 20) + b".",
        "long decimal": b"\x80\x02I" + b"9" * 4090 + b"\n.",
        "endless line": b"\x80\x02c" + b"a" * 100_000,
        "self-containing list": b"\x80\x02]q\x00h\x00a.",
        "module in itself": b"\x80\x02ca\nB\n)\x81q\x00}(X\x0b\0\0\0_parameters}"
        b"X\x08\0\0\0_modules}X\x01\0\0\0ah\0sub.",
        "stack underflow": b"\x80\x02R.",
        "mark underflow": b"\x80\x02t.",
        "unknown opcode": b"\x80\x02\xff.",
        "extension registry": b"\x80\x02\x82\x01.",
        "out of band buffer": b"\x80\x05\x97.",
        "text as persistent id": b"\x80\x02Pabc\n.",
    }


@pytest.mark.parametrize("case", bombs())
def test_pickle_bombs_are_refused_in_time(case: str, tmp_path: Path) -> None:
    bare(tmp_path / "bomb.pt", bombs()[case])
    begin = time.process_time()
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "bomb.pt")
    assert time.process_time() - begin < 20


def test_modules_that_share_children_without_end_are_refused(tmp_path: Path) -> None:
    stub = b"ca\nB\n)\x81}(X\x0b\0\0\0_parameters}X\x08\0\0\0_modules}(X\x01\0\0\0ah%cX\x01\0\0\0bh%cuubq%c"
    data = b"\x80\x02Nq\x00" + b"".join(stub % (i, i, i + 1) for i in range(60)) + b"."
    bare(tmp_path / "a.pt", data)
    with pytest.raises(CheckpointError, match="nested without end"):
        open_checkpoint(tmp_path / "a.pt")


def archive_bytes(tmp_path: Path) -> bytes:
    torch.save({"a": torch.ones(3), "b": torch.zeros(3)}, tmp_path / "good.pt")
    return (tmp_path / "good.pt").read_bytes()


def test_overlapping_entries_are_refused(tmp_path: Path) -> None:
    whole = bytearray(archive_bytes(tmp_path))
    first = whole.find(b"PK\x01\x02")
    records = []
    at = first
    while whole[at : at + 4] == b"PK\x01\x02":
        records.append(at)
        at += 46 + sum(struct.unpack_from("<HHH", whole, at + 28))
    whole[records[1] + 42 : records[1] + 46] = whole[records[0] + 42 : records[0] + 46]
    (tmp_path / "a.pt").write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"overlaps|disagree"):
        open_checkpoint(tmp_path / "a.pt")


def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
    with pytest.raises(CheckpointError, match="two entries"):
        open_checkpoint(tmp_path / "a.pt")


def test_an_inflating_bomb_is_refused_before_it_inflates(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", tensor_pickle(64 << 18, (64 << 18,), (1,)))
        archive.writestr("archive/data/0", b"\0" * (64 << 20))
    with pytest.raises(CheckpointError, match="would inflate to 67108864 bytes"):
        open_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_every_truncation_is_refused(legacy: bool, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "good.pt", _use_new_zipfile_serialization=not legacy)
    whole = (tmp_path / "good.pt").read_bytes()
    for length in range(0, len(whole), 3):
        (tmp_path / "a.pt").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path / "a.pt")


def test_a_bare_pickle_inside_a_bare_pickle_without_end_is_refused(tmp_path: Path) -> None:
    data = b"\x80\x02N."
    for _ in range(5):
        call = b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(data)) + data + b"\x85R"
        data = b"\x80\x03" + call + b"."
    bare(tmp_path / "a.pt", data)
    with pytest.raises(CheckpointError, match="nests files too deeply"):
        open_checkpoint(tmp_path / "a.pt")


def test_a_pickle_that_is_named_a_thousand_times_inside_another_is_refused(tmp_path: Path) -> None:
    inner = b"\x80\x02" + b"N0" * 20_000 + b"N."
    data = (
        b"\x80\x03B" + struct.pack("<I", len(inner)) + inner + b"q\x00ctorch.storage\n_load_from_bytes\nq\x01"
    )
    bare(tmp_path / "a.pt", data + b"h\x01h\x00\x85R0" * 1000 + b"N.")
    with pytest.raises(CheckpointError, match="more than 4000000 steps"):
        open_checkpoint(tmp_path / "a.pt")


def test_memory_stays_within_the_size_of_the_file(tmp_path: Path) -> None:
    """A gigabyte is promised in every way we know, under a limit of the address space."""
    giga = 1 << 30
    files = {
        "a": b"\x80\x02X" + struct.pack("<I", giga) + b"x.",
        "b": b"\x80\x02B" + struct.pack("<I", giga) + b"x.",
        "c": b"\x80\x04\x8d" + struct.pack("<Q", giga) + b"x.",
        "d": b"\x80\x02Nr" + struct.pack("<I", giga) + b".",
        "e": struct.pack("<Q", 99_000_000) + b'{"x"',
        "f": struct.pack("<Q", 100)
        + b'{"x":{"dtype":"F32","shape":[268435456],"data_offsets":[0,1073741824]}}'.ljust(100),
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    code = (
        "import sys, numpy, resource\n"
        "from clipmerge.checkpoint import torch_file\n"
        "from clipmerge.checkpoint.open import open_checkpoint\n"
        "from clipmerge.errors import CheckpointError\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)\n"
        "for path in sys.argv[1:]:\n"
        "    try: open_checkpoint(path)\n"
        "    except CheckpointError: print('refused')\n"
    )
    assert resource.getpagesize()
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.split() == ["refused"] * len(files), done.stderr


def test_a_list_that_is_copied_for_ever_is_refused(tmp_path: Path) -> None:
    items = (
        b"\x80\x02](" + b"N" * 300_000 + b"eq\x01cbuiltins\nlist\nq\x02" + b"h\x02h\x01\x85R" * 100_000 + b"."
    )
    bare(tmp_path / "a.pt", items)
    with pytest.raises(CheckpointError, match="copies more than the file holds"):
        open_checkpoint(tmp_path / "a.pt")


def test_a_text_that_is_encoded_for_ever_is_refused(tmp_path: Path) -> None:
    text = b"\x80\x02X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\x01c_codecs\nencode\nq\x02"
    bare(tmp_path / "a.pt", text + b"h\x02h\x01\x85R" * 10_000 + b".")
    with pytest.raises(CheckpointError, match="copies more than the file holds"):
        open_checkpoint(tmp_path / "a.pt")


def test_a_module_that_names_its_tensors_for_ever_is_refused(tmp_path: Path) -> None:
    """A hundred modules share one dict of ten thousand tensors."""
    tensor = tensor_pickle(4, (4,), (1,))[: -len(b"s.")]
    tensor = b"\x80\x02" + tensor[tensor.index(b"ctorch._utils") :] + b"q\xff0"
    names = b"".join(b"X\x04\0\0\0%04dh\xff" % i for i in range(10_000))
    shared = b"}(" + names + b"uq\xfe0"
    child = b"ca\nB\n)\x81}X\x0b\0\0\0_parametersh\xfesb"
    children = b"".join(b"X\x02\0\0\0%02d" % i + child for i in range(100))
    root = b"ca\nB\n)\x81}(X\x0b\0\0\0_parameters}X\x08\0\0\0_modules}(" + children + b"uub."
    in_zip(tmp_path / "a.pt", tensor + shared + root)
    with pytest.raises(CheckpointError, match="more than 100000 tensors"):
        open_checkpoint(tmp_path / "a.pt")
