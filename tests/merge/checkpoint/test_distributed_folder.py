"""What `torch.distributed.checkpoint` writes: read as torch reads it, without running what its metadata asks for."""

import io
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import clipmerge
from clipmerge.checkpoint.open import open_checkpoint
from clipmerge.errors import CheckpointError, UnsafeFileError

Same = Callable[..., None]
StateDict = Mapping[str, Any]


def save(state: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is one process
        dcp.save(state, checkpoint_id=folder)
    return folder


def trained(small_clip: Any) -> dict[str, Any]:
    """Model, optimiser and counters, as an FSDP trainer saves them."""
    import copy

    model = copy.deepcopy(small_clip)
    optimiser = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    optimiser.step()
    return {"model": model.state_dict(), "optimizer": optimiser.state_dict(), "epoch": 3}


def test_a_trainers_folder_is_its_model(small_clip: Any, tmp_path: Path, assert_same: Same) -> None:
    state = trained(small_clip)
    folder = save(state, tmp_path / "epoch_3")
    checkpoint = open_checkpoint(folder)
    assert_same(checkpoint, state["model"])
    assert (checkpoint.name, checkpoint.layout) == ("epoch_3", "open_clip")
    assert all(isinstance(e.source, Path) for t in checkpoint.tensors.values() for e in t.extents)
    assert_same(open_checkpoint(save({"app": state}, tmp_path / "nested")), state["model"])
    (tmp_path / "run").mkdir()
    folder.rename(tmp_path / "run" / "pytorch_model_fsdp_0")
    with pytest.raises(CheckpointError, match="run holds no checkpoint") as caught:
        open_checkpoint(tmp_path / "run")
    assert caught.value.hint == "give one of the folders in it: pytorch_model_fsdp_0"


def test_two_sets_are_asked_for(small: StateDict, tmp_path: Path, assert_same: Same) -> None:
    averages = {name: value * 1.01 for name, value in small.items()}
    folder = save({"model": dict(small), "ema_model": averages}, tmp_path / "e")
    with pytest.raises(CheckpointError, match="holds 2 sets of weights"):
        open_checkpoint(folder)
    assert_same(open_checkpoint(f"{folder}#ema"), averages)


def test_a_merge_of_folders_is_verified(small: StateDict, tmp_path: Path) -> None:
    other = {name: value * 1.01 for name, value in small.items()}
    folders = [save(dict(state), tmp_path / name) for name, state in (("a", small), ("b", other))]
    merged = clipmerge.mean([clipmerge.load(folder) for folder in folders]).save(
        tmp_path / "soup.safetensors"
    )
    assert clipmerge.verify(merged, parents=[str(tmp_path)]).status == "verified"


def sharded(
    folder: Path, pieces: Mapping[str, list[tuple[tuple[int, ...], torch.Tensor]]], **change: Any
) -> Path:
    """A folder of several processes: each tensor in shards at offsets, in torch's own classes."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )  # fmt: skip

    folder.mkdir()
    described, stored, files = {}, {}, [io.BytesIO(), io.BytesIO()]
    for name, shards in pieces.items():
        size = [max(at[axis] + t.shape[axis] for at, t in shards) for axis in range(shards[0][1].ndim)]
        chunks = [ChunkStorageMetadata(torch.Size(at), t.shape) for at, t in shards]
        described[name] = TensorStorageMetadata(
            TensorProperties(shards[0][1].dtype), torch.Size(size), chunks
        )
        for i, (at, tensor) in enumerate(shards):
            file = files[i % 2]
            begin = file.tell()
            torch.save(tensor.clone(), file)
            info = {
                "relative_path": f"__{i % 2}_0.distcp",
                "offset": begin,
                "length": file.tell() - begin,
            } | change
            stored[MetadataIndex(name, torch.Size(at), i)] = _StorageInfo(**info)
    for i, file in enumerate(files):
        (folder / f"__{i}_0.distcp").write_bytes(file.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(described, None, stored)))
    return folder


def test_shards_make_up_their_tensor_as_torch_puts_them_together(tmp_path: Path, assert_same: Same) -> None:
    rows, both = torch.randn(7, 3), torch.randn(4, 6).bfloat16()
    pieces = {
        "visual.rows": [((4, 0), rows[4:]), ((0, 0), rows[:4])],
        "visual.both": [((i, j), both[i : i + 2, j : j + 3]) for i in (0, 2) for j in (0, 3)],
        "visual.one": [((0,), torch.arange(5.0))],
        "scale": [((), torch.tensor(2.0))],
    }
    folder = sharded(tmp_path / "s", pieces)
    right = {"visual.rows": torch.zeros(7, 3), "visual.both": torch.zeros(4, 6).bfloat16(),
             "visual.one": torch.zeros(5), "scale": torch.tensor(0.0)}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(right, checkpoint_id=folder)
    assert torch.equal(right["visual.both"], both)
    assert_same(open_checkpoint(folder), right)


class Evil:
    def __reduce__(self) -> Any:
        import os

        return os.system, ("touch /tmp/clipmerge-evil",)


def test_code_in_the_metadata_does_not_run(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "s", {"visual.x": [((0,), torch.ones(2))]})
    (folder / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Evil()}))
    with pytest.raises(UnsafeFileError, match=r"it calls (posix|os|nt)\.system"):
        open_checkpoint(folder)
    assert not Path("/tmp/clipmerge-evil").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"relative_path": "../secret.distcp"}, "not a file of its folder"),
        ({"relative_path": "/etc/passwd"}, "not a file of its folder"),
        ({"relative_path": "absent.distcp"}, "not a file of its folder"),
        ({"offset": 10**9}, "not what torch saves"),
        ({"offset": -1}, "not a count of bytes"),
        ({"offset": "0"}, "not a count of bytes"),
        ({"length": 40}, "zip directory cannot be read"),
        ({"length": 10**15}, None),
        ({"transform_descriptors": ["zstd"]}, "compressed"),
    ],
)
def test_no_place_in_the_metadata_is_believed(
    change: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    (tmp_path / "secret.distcp").write_bytes(b"secret")
    folder = sharded(tmp_path / "s", {"visual.x": [((0,), torch.ones(2))]}, **change)
    if said is None:  # longer than the file: what is there counts
        assert list(open_checkpoint(folder).tensors) == ["visual.x"]
        return
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(folder)


def test_shards_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    ones = torch.ones(2, 2)
    for i, shards in enumerate((
        [((0, 0), ones), ((3, 0), ones)],  # a gap
        [((0, 0), ones), ((2, 0), ones.half())],
    )):  # fmt: skip
        folder = sharded(tmp_path / str(i), {"visual.x": shards})
        with pytest.raises(
            CheckpointError, match=r"the shards of tensor 'visual\.x' do not make up its shape"
        ):
            open_checkpoint(folder)
    only = save({"optimizer": {"state": {"a": {"exp_avg": torch.ones(2)}}}}, tmp_path / "optimiser")
    with pytest.raises(CheckpointError, match="an optimiser's state"):
        open_checkpoint(only)
