"""Shards with an index, folders, and what open_clip downloads."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import clipmerge
from clipmerge.checkpoint.open import open_checkpoint
from clipmerge.errors import CheckpointError

StateDict = Mapping[str, Any]
Same = Callable[..., None]


def shard(folder: Path, state: StateDict, kind: str = "safetensors") -> Path:
    """Three shards and their index, as huggingface_hub writes them."""
    stem = "model" if kind == "safetensors" else "pytorch_model"
    places: dict[str, str] = {}
    for i in range(3):
        name = f"{stem}-{i + 1:05d}-of-00003.{kind}"
        part = dict(list(state.items())[i::3])
        save_file(part, folder / name, metadata={"format": "pt"}) if kind == "safetensors" else torch.save(
            part, folder / name
        )
        places |= dict.fromkeys(part, name)
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_one_checkpoint(kind: str, small: StateDict, tmp_path: Path, assert_same: Same) -> None:
    index = shard(tmp_path, small, kind)
    for path in (index, tmp_path, str(tmp_path), f"local-dir:{tmp_path}"):
        checkpoint = open_checkpoint(path)
        assert_same(checkpoint, small)
        assert len(checkpoint.files()) == 4  # three shards and their index
    assert open_checkpoint(index).name in ("model", "pytorch_model")


def test_a_shard_by_itself_is_no_checkpoint(small: StateDict, tmp_path: Path) -> None:
    index = shard(tmp_path, small)
    with pytest.raises(CheckpointError, match="one shard of a checkpoint") as caught:
        open_checkpoint(tmp_path / "model-00002-of-00003.safetensors")
    assert str(tmp_path) in str(caught.value.hint)
    index.unlink()
    with pytest.raises(CheckpointError, match="without their index"):
        open_checkpoint(tmp_path)
    save_file(dict(small), tmp_path / "model-00001-of-00001.safetensors")  # all there is
    assert len(open_checkpoint(tmp_path / "model-00001-of-00001.safetensors").tensors)


def test_peft_without_factors_is_refused_by_its_kind(small: StateDict, tmp_path: Path) -> None:
    tuned = {f"base_model.model.{name}": t for name, t in small.items() if "ln_" in name}
    save_file(tuned, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LN_TUNING"}')
    with pytest.raises(CheckpointError, match="of the kind 'LN_TUNING'") as caught:
        open_checkpoint(tmp_path)
    assert "merge_and_unload" in str(caught.value.hint)


@pytest.mark.parametrize(
    "evil", ["../a.safetensors", "/etc/passwd", "a/../../b", "..", "", "a\\b", "C:x", "a\0b", 3]
)
def test_an_index_that_points_elsewhere_is_refused(evil: Any, small: StateDict, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_file(dict(small), tmp_path / "a.safetensors")
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(small, evil)}))
    with pytest.raises(CheckpointError, match="not a file of its folder"):
        open_checkpoint(index)


def test_an_index_and_its_shards_must_agree(small: StateDict, tmp_path: Path) -> None:
    index = shard(tmp_path, small)
    document = json.loads(index.read_text())
    first, *_, second = document["weight_map"]

    def written(places: Mapping[str, Any]) -> Path:
        index.write_text(json.dumps({"weight_map": places}))
        return index

    places = document["weight_map"]
    with pytest.raises(CheckpointError, match="does not list tensor"):
        open_checkpoint(written({name: place for name, place in places.items() if name != first}))
    with pytest.raises(CheckpointError, match="lists tensor 'nowhere'"):
        open_checkpoint(written({**places, "nowhere": places[first]}))
    with pytest.raises(CheckpointError, match="does not list tensor"):
        open_checkpoint(written({**places, first: places[second]}))
    with pytest.raises(CheckpointError, match=r"'x\.safetensors', which is not there"):
        open_checkpoint(written({**places, first: "x.safetensors"}))


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": 3}', "{", '{"a":1,"a":2}', "{" * 9999]
)
def test_json_that_is_no_index_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text.ljust(10) if text.startswith("[") else text)
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


def test_an_open_clip_folder_brings_its_configuration(
    small: StateDict, tmp_path: Path, assert_same: Same
) -> None:
    config = {"model_cfg": {"embed_dim": 6}, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(dict(small), tmp_path / "open_clip_model.safetensors")
    save_file({"other": torch.ones(1)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert_same(checkpoint, small)
    record = {"name": tmp_path.name, "config": config["model_cfg"], "preprocess": config["preprocess_cfg"]}
    assert checkpoint.extra["model"] == record
    assert open_checkpoint(tmp_path / "open_clip_model.safetensors").extra["model"] == record
    assert clipmerge.load(tmp_path).model == record


def test_a_folder_with_one_file_is_that_file(small: StateDict, tmp_path: Path, assert_same: Same) -> None:
    folder = tmp_path / "run 1"
    folder.mkdir()
    save_file(dict(small), folder / "whatever.safetensors")
    (folder / "log.txt").write_text("hello")
    checkpoint = open_checkpoint(folder)
    assert_same(checkpoint, small)
    assert checkpoint.name == "run_1"


def test_a_folder_with_several_files_asks_which(small: StateDict, tmp_path: Path) -> None:
    for i in range(2):
        save_file(dict(small), tmp_path / f"ft{i}.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 2 checkpoints: ft0\.safetensors, ft1\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.fixture
def fake_open_clip(monkeypatch: pytest.MonkeyPatch) -> Any:
    """open_clip.pretrained without a network: a dict of what can be fetched."""
    module: Any = ModuleType("open_clip.pretrained")
    module.files = {}
    module.download_pretrained = lambda config: str(module.files[config["url"]])
    known = {("ViT-B-32", "openai"): {"url": "u", "mean": 0.5, "quick_gelu": True}}
    module.get_pretrained_cfg = lambda model, tag: known.get((model, tag), {})
    module.list_pretrained = lambda as_str: ["ViT-B-32:openai", "RN50:yfcc15m"]
    package: Any = ModuleType("open_clip")
    package.get_model_config = lambda name: {"embed_dim": 6}
    monkeypatch.setitem(sys.modules, "open_clip", package)
    monkeypatch.setitem(sys.modules, "open_clip.pretrained", module)
    return module


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """huggingface_hub without a network: a dict of what it has, or nothing but its cache where it is out of reach."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    hub: Any = ModuleType("huggingface_hub")
    hub.files, hub.cache, hub.asked, hub.reachable = {}, {}, [], True

    def fetch(model: str, name: str, *, revision: str | None = None) -> str:
        hub.asked.append(name)
        if not hub.reachable:
            raise LocalEntryNotFoundError("no network")
        if not any(key[0] == model for key in hub.files):
            raise RuntimeError(f"Repository {model} not found")
        if (model, name, revision) not in hub.files:
            raise EntryNotFoundError(f"no {name}")
        return str(hub.files[model, name, revision])

    hub.hf_hub_download = fetch
    hub.try_to_load_from_cache = lambda model, name, revision: hub.cache.get((model, name))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


def test_the_hub(fake_hub: Any, small: StateDict, tmp_path: Path, assert_same: Same) -> None:
    path = tmp_path / "open_clip_model.safetensors"
    save_file(dict(small), path)
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {}}')
    fake_hub.files["org/name", "open_clip_model.safetensors", None] = path
    fake_hub.files["org/hf", "model.safetensors", "v1"] = path
    fake_hub.files["org/empty", "README.md", None] = path
    checkpoint = open_checkpoint("hf-hub:org/name")
    assert_same(checkpoint, small)
    assert checkpoint.name == "name"
    assert checkpoint.extra["model"] == {"name": tmp_path.name, "config": {}, "preprocess": {}}
    assert_same(open_checkpoint("hf-hub:org/hf@v1"), small)
    with pytest.raises(
        CheckpointError, match="hf-hub:org/none cannot be fetched: Repository org/none not found"
    ):
        open_checkpoint("hf-hub:org/none")
    with pytest.raises(
        CheckpointError, match=r"hf-hub:org/empty cannot be fetched: it holds none of open_clip_"
    ):
        open_checkpoint("hf-hub:org/empty")


def test_an_adapter_of_the_hub(fake_hub: Any, tmp_path: Path) -> None:
    factors = {
        f"base_model.model.visual.fc.lora_{n}.weight": torch.ones(shape)
        for n, shape in (("A", (1, 3)), ("B", (2, 1)))
    }
    save_file(factors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 2}')
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        fake_hub.files["org/lora", name, None] = tmp_path / name
    adapter = open_checkpoint("hf-hub:org/lora")
    assert (adapter.name, adapter.layout, list(adapter.tensors)) == ("lora", "peft", ["visual.fc.weight"])
    assert "adapter_config.json" in fake_hub.asked


def test_without_a_network_the_hub_is_asked_once(
    fake_hub: Any, small: StateDict, tmp_path: Path, assert_same: Same
) -> None:
    fake_hub.reachable = False
    with pytest.raises(CheckpointError, match="hf-hub:org/name cannot be fetched: the Hub is out of reach"):
        open_checkpoint("hf-hub:org/name")
    assert fake_hub.asked == ["open_clip_model.safetensors"]
    save_file(dict(small), tmp_path / "model.safetensors")
    fake_hub.cache["org/name", "model.safetensors"] = str(tmp_path / "model.safetensors")
    assert_same(open_checkpoint("hf-hub:org/name"), small)


def test_pretrained_tags_through_open_clip(
    fake_open_clip: Any, small: StateDict, tmp_path: Path, assert_same: Same
) -> None:
    torch.save(dict(small), tmp_path / "ViT-B-32.pt")
    fake_open_clip.files["u"] = tmp_path / "ViT-B-32.pt"
    checkpoint = open_checkpoint("ViT-B-32:openai")
    assert_same(checkpoint, small)
    assert checkpoint.extra["model"] == {
        "name": "ViT-B-32",
        "config": {"embed_dim": 6},
        "preprocess": {"mean": 0.5},
    }
    assert checkpoint.extra["quick_gelu"] is True
    assert checkpoint.path == tmp_path / "ViT-B-32.pt"
    with pytest.raises(CheckpointError, match="no pretrained weights 'ViT-B-32:opnai'") as caught:
        open_checkpoint("ViT-B-32:opnai")
    assert caught.value.hint == "did you mean ViT-B-32:openai?"


def snapshot(root: Path, small: StateDict, repository: str = "models--laion--CLIP-ViT-B-32") -> Path:
    """A repository in the Hub's cache: files are links to blobs that are called by their digest."""
    folder, blobs = root / repository / "snapshots" / "0123abc", root / repository / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    save_file(dict(small), blobs / "9f8e")
    (blobs / "77aa").write_text(json.dumps({"model_cfg": {"embed_dim": 6}}))
    (folder / "open_clip_model.safetensors").symlink_to("../../blobs/9f8e")
    (folder / "open_clip_config.json").symlink_to("../../blobs/77aa")
    return folder


def test_a_model_is_called_after_its_repository(small: StateDict, tmp_path: Path) -> None:
    folder = snapshot(tmp_path, small)
    for path in (folder, folder / "open_clip_model.safetensors"):
        assert open_checkpoint(path).extra["model"]["name"] == "CLIP-ViT-B-32"
    assert open_checkpoint(folder).name == "CLIP_ViT_B_32"


def test_a_repository_of_the_cache_is_its_main_snapshot(
    small: StateDict, tmp_path: Path, assert_same: Same
) -> None:
    other = snapshot(tmp_path, small).parent
    root = other.parent
    assert_same(open_checkpoint(root), small)  # the only one
    commit = "0123456789abcdef0123456789abcdef01234567"
    (other / "0123abc").rename(other / commit)
    (other / "newer").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    opened = open_checkpoint(root)
    assert (opened.name, opened.extra["model"]["name"]) == ("CLIP_ViT_B_32", "CLIP-ViT-B-32")
    (root / "refs" / "main").write_text("../../..")
    with pytest.raises(
        CheckpointError, match="holds 2 snapshots, and refs/main names none of them"
    ) as several:
        open_checkpoint(root)
    assert str(other / commit) in str(several.value.hint)


@pytest.mark.parametrize(
    "broken", ["", "version https://git-lfs.github.com/spec/v1\n", "<html>", 5, 300, 1200]
)
def test_a_good_file_beside_a_broken_one_is_named(
    broken: str | int, small: StateDict, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(dict(small), path)
    path.write_bytes(broken.encode() if isinstance(broken, str) else path.read_bytes()[:broken])
    torch.save(dict(small), tmp_path / "pytorch_model.bin")
    for place in (path, tmp_path):
        with pytest.raises(CheckpointError, match=r"model\.safetensors (is|holds) ") as refusal:
            open_checkpoint(place)
        assert str(refusal.value.hint).endswith(", or give pytorch_model.bin, which lies beside it")


def test_a_link_to_a_model_still_says_what_it_is(small: StateDict, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    save_file(dict(small), tmp_path / "run" / "model.safetensors")
    (tmp_path / "run" / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 6}}))
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "model.safetensors"
    link.symlink_to(tmp_path / "run" / "model.safetensors")
    assert open_checkpoint(link).extra["model"]["name"] == "run"
    (tmp_path / "links" / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 7}}))
    assert open_checkpoint(link).extra["model"]["config"] == {"embed_dim": 7}  # beside the link comes first


@pytest.mark.parametrize(
    "stray",
    ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "random_states_0.pkl.pt", "training_args.bin", "scaler.pt",
     ".hidden.safetensors", "._weights.safetensors", "notes.txt"],
)  # fmt: skip
def test_what_a_trainer_leaves_beside_the_weights_decides_nothing(
    stray: str, small: StateDict, tmp_path: Path, assert_same: Same
) -> None:
    save_file(dict(small), tmp_path / "weights.safetensors")
    (tmp_path / stray).write_bytes(b"not a checkpoint")
    assert_same(open_checkpoint(tmp_path), small)


def test_an_empty_name_is_not_the_folder_here() -> None:
    with pytest.raises(CheckpointError, match="the name of a checkpoint is empty"):
        open_checkpoint("")
