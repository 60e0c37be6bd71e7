"""What torch, TorchScript and pickle write is read back byte for byte, without torch."""

import io
import math
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from clipmerge.checkpoint.open import open_checkpoint
from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.safetensors import read_header
from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.checkpoint.torch_file import read_torch
from clipmerge.errors import CheckpointError

Save = Callable[[Any, Path], None]


def _pickled(protocol: int) -> Save:
    return lambda value, path: path.write_bytes(pickle.dumps(value, protocol=protocol)) and None


CONTAINERS: Mapping[str, Save] = {
    "zip": torch.save,
    "legacy": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "zip, protocol 4": lambda value, path: torch.save(value, path, pickle_protocol=4),
    "pickle 2": _pickled(2),
    "pickle 3": _pickled(3),
    "pickle 4": _pickled(4),
    "pickle 5": _pickled(5),
}


def every_kind() -> dict[str, Any]:
    """Dtypes, shapes, strides and sharing that a state dict can hold."""
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "f32": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)),
        "f16": torch.ones(3).half(),
        "bf16": torch.linspace(-1, 1, 5).bfloat16(),
        "f64": torch.tensor([1.0, 2.0], dtype=torch.float64),
        "f8a": torch.linspace(-1, 1, 4).to(torch.float8_e4m3fn),
        "f8b": torch.linspace(-1, 1, 4).to(torch.float8_e5m2),
        "i64": torch.tensor(3),
        "i8": torch.tensor([-1, 2], dtype=torch.int8),
        "u8": torch.tensor([1, 255], dtype=torch.uint8),
        "u16": torch.tensor([1, 65535], dtype=torch.uint16),
        "bool": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j], dtype=torch.complex64),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": nn.Parameter(torch.ones(2)),
        "whole": base,
        "shared": base,
        "transposed": base.t(),
        "rows": base[1:3],
        "steps": base[::2, 1::2],
        "column": base[:, 3],
        "permuted": torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
        "expanded row": torch.arange(6.0).expand(1, 6),
    }


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("wrap", [dict, OrderedDict])
def test_every_kind_of_tensor_in_every_container(
    container: str, wrap: Any, tmp_path: Path, assert_same: Callable[..., None]
) -> None:
    state = every_kind()
    CONTAINERS[container](wrap(state), tmp_path / "a.pt")
    assert_same(open_checkpoint(tmp_path / "a.pt"), state)


def test_tensors_stay_on_disk(tmp_path: Path) -> None:
    torch.save(every_kind(), tmp_path / "a.pt")
    for tensor in read_torch(tmp_path / "a.pt")[0][""].values():
        assert all(isinstance(extent.source, Path) for extent in tensor.extents)


def test_neither_torch_nor_open_clip_is_imported(tmp_path: Path) -> None:
    torch.save(every_kind(), tmp_path / "a.pt")
    code = (
        "import sys; from clipmerge.checkpoint.open import open_checkpoint\n"
        "open_checkpoint(sys.argv[1]); print([m for m in ('torch', 'open_clip', 'pickle') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.pt")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "torch" not in shown
    assert "open_clip" not in shown


def test_what_stands_beside_the_weights_does_not_disturb(
    small_clip: nn.Module, small: Any, tmp_path: Path, assert_same: Callable[..., None]
) -> None:
    optimizer = torch.optim.AdamW(small_clip.parameters())
    beside = {
        "epoch": 7,
        "name": "a run",
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": 65536.0},
        "path": Path("logs"),
        "rng": np.random.default_rng(0).bit_generator.state,
        "numpy": np.arange(3),
        "number": np.float64(2.0),
        "torch_rng": torch.get_rng_state(),
        "device": torch.device("cpu"),
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
        "counts": Counter("abca"),
        "nested": defaultdict(
            list, a=[{1, 2}, frozenset([3]), (1, (2, 3)), b"bytes", bytearray(b"x"), 10**30]
        ),
    }
    for name, container in CONTAINERS.items():
        container({**beside, "state_dict": {f"module.{k}": v for k, v in small.items()}}, tmp_path / "a.pt")
        checkpoint = open_checkpoint(tmp_path / "a.pt")
        assert_same(checkpoint, small)
        assert checkpoint.extra["saved"] == {"epoch": 7, "name": "a run"}, name
        assert checkpoint.layout == "open_clip"


class Scripted(nn.Module):
    """Parameters, persistent and other buffers, and a plain tensor attribute, two levels deep."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.plain = torch.ones(2)
        self.inner = Scripted(depth - 1) if depth else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.norm(self.linear(x + self.plain)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("half", [False, True])
def test_torchscript_archives(how: str, half: bool, tmp_path: Path, assert_same: Callable[..., None]) -> None:
    model = Scripted().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.jit.script(model) if how == "script" else torch.jit.trace(model, torch.ones(3, 2))
        (made.half() if half else made).save(tmp_path / "a.pt")
        expected = torch.jit.load(tmp_path / "a.pt").state_dict()
    assert "plain" not in expected
    assert_same(open_checkpoint(tmp_path / "a.pt"), expected)


@pytest.mark.parametrize("container", CONTAINERS)
def test_pickled_modules_give_their_state_dict(
    container: str, small_clip: Any, small: Any, tmp_path: Path, assert_same: Callable[..., None]
) -> None:
    assert "attn_mask" in dict(small_clip.named_buffers())
    assert "attn_mask" not in small
    CONTAINERS[container](small_clip, tmp_path / "a.pt")
    assert_same(open_checkpoint(tmp_path / "a.pt"), small)
    CONTAINERS[container]({"model": nn.DataParallel(small_clip), "epoch": 1}, tmp_path / "b.pt")
    assert_same(open_checkpoint(tmp_path / "b.pt"), small)


def test_deflated_archives_are_read_into_memory(
    small: Any, tmp_path: Path, assert_same: Callable[..., None]
) -> None:
    torch.save(dict(small), tmp_path / "a.pt")
    _repack(tmp_path / "a.pt", tmp_path / "b.pt", zipfile.ZIP_DEFLATED)
    assert_same(open_checkpoint(tmp_path / "b.pt"), small)


def test_zip64_archives(small: Any, tmp_path: Path, assert_same: Callable[..., None]) -> None:
    torch.save(dict(small), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            with new.open(zipfile.ZipInfo(name), "w", force_zip64=True) as entry:
                entry.write(old.read(name))
        new._didModify = True  # type: ignore[attr-defined]
    whole = (tmp_path / "b.pt").read_bytes()
    (tmp_path / "b.pt").write_bytes(_with_zip64_end(whole))
    assert_same(open_checkpoint(tmp_path / "b.pt"), small)


def _with_zip64_end(archive: bytes) -> bytes:
    """The same archive with its counts moved into a zip64 record, as for more than 65 535 entries or 4 GiB."""
    at = archive.rfind(b"PK\x05\x06")
    count = int.from_bytes(archive[at + 10 : at + 12], "little")
    size = int.from_bytes(archive[at + 12 : at + 16], "little")
    start = int.from_bytes(archive[at + 16 : at + 20], "little")
    record = b"PK\x06\x06" + (44).to_bytes(8, "little") + b"\x2d\0\x2d\0" + b"\0" * 8
    record += count.to_bytes(8, "little") * 2 + size.to_bytes(8, "little") + start.to_bytes(8, "little")
    locator = b"PK\x06\x07" + b"\0" * 4 + at.to_bytes(8, "little") + (1).to_bytes(4, "little")
    end = b"PK\x05\x06" + b"\0" * 4 + b"\xff" * 12 + b"\0\0"
    return archive[:at] + record + locator + end


def _repack(source: Path, target: Path, method: int) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


def test_big_endian_archives_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("byteorder") else old.read(name))
    with pytest.raises(CheckpointError, match="big-endian"):
        open_checkpoint(tmp_path / "b.pt")
    legacy = io.BytesIO()
    torch.save({"a": torch.ones(2)}, legacy, _use_new_zipfile_serialization=False)
    swapped = legacy.getvalue().replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89", 1)
    assert swapped != legacy.getvalue()
    (tmp_path / "c.pt").write_bytes(swapped)
    with pytest.raises(CheckpointError, match="whose files are not read"):
        open_checkpoint(tmp_path / "c.pt")


def _quantized() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse"),
        (_quantized, "quantized"),
        (lambda: torch.ones(3, device="meta"), "without data"),
        (lambda: torch.ones(3, dtype=torch.complex128), "of a dtype"),
        (lambda: torch.ones(3, dtype=torch.complex64).conj(), "a lazy conj"),
    ],
)
def test_tensors_without_plain_bytes_are_refused_by_name(make: Any, kind: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"fine": torch.ones(1), "odd.one": make()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=f"'odd.one' is {kind}"):
        open_checkpoint(tmp_path / "a.pt")


def test_expanded_tensors_that_repeat_their_storage_are_refused(tmp_path: Path) -> None:
    torch.save({"big": torch.ones(1).expand(10_000, 10_000)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"'big' of shape .* is expanded from fewer numbers"):
        open_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([torch.ones(1)], "holds a list, not weights"),
        ({"epoch": 1}, "holds a dict without tensors"),
        (torch.ones(1), "holds a RawTensor|not weights"),
        (torch.optim.AdamW([nn.Parameter(torch.ones(1))]), "not weights|nothing|holds"),
    ],
)
def test_files_without_weights_say_what_they_hold(value: Any, reason: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(tmp_path / "a.pt")


def test_an_archive_that_torch_did_not_write_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones(2))
    with pytest.raises(CheckpointError, match="not one that torch wrote"):
        open_checkpoint(tmp_path / "a.npz")


@st.composite
def views(draw: st.DrawFn) -> Any:
    """A view of a fresh storage: any dtype, slices with steps, axes in any order."""
    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8]
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    value = torch.arange(math.prod(shape)).reshape(shape).to(draw(st.sampled_from(kinds)))
    cuts = tuple(slice(draw(st.integers(0, 2)), None, draw(st.integers(1, 3))) for _ in shape)
    return value[cuts].permute(draw(st.permutations(range(len(shape))))) if shape else value


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=st.dictionaries(st.text("abcü._0", min_size=1, max_size=6), views(), min_size=1, max_size=4))
def test_one_state_dict_is_the_same_bytes_through_every_container(state: Any, tmp_path: Path) -> None:
    dense = {name: value.contiguous() for name, value in state.items()}
    save_file(dense, tmp_path / "a")
    expected = read_header(tmp_path / "a")[1]
    reference = Checkpoint("a", expected)
    for container in CONTAINERS.values():
        container(state, tmp_path / "b")
        found = Checkpoint("b", read_torch(tmp_path / "b")[0][""])
        assert found.tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (found.tensors[name].dtype, found.tensors[name].shape) == (tensor.dtype, tensor.shape)
            assert (
                Reader().dense(found.tensors[name]).tobytes()
                == Reader().dense(reference.tensors[name]).tobytes()
            )
