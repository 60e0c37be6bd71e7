"""A Hub-ready folder: open_clip loads it, the card says what it is, it appears whole or not at all."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from clipmerge.errors import ModelError, OutputError, RecipeError
from clipmerge.report.card import model_card
from clipmerge.report.model_folder import CARD, CONFIG, WEIGHTS, push, save_folder
from clipmerge.weights.verify import verify
from clipmerge.weights.weights import Weights, from_state_dict, load, mean


@pytest.fixture
def soup(tiny_checkpoints: Mapping[str, Path]) -> Weights:
    return mean([load(tiny_checkpoints[f"ft{i}"]) for i in range(3)])


def front_matter(folder: Path) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    text = (folder / CARD).read_text()
    _, head, _ = text.split("---\n", 2)
    return yaml.safe_load(head)


def test_open_clip_loads_the_folder(soup: Weights, tiny_spec: Any, tmp_path: Path) -> None:
    import open_clip

    folder = save_folder(soup, tmp_path / "soup", model=tiny_spec)
    assert sorted(p.name for p in folder.iterdir()) == sorted([WEIGHTS, CONFIG, CARD])
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    held = model.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in soup.state_dict().items())
    assert preprocess.transforms[-1].mean == [0.5] * 3
    assert open_clip.get_tokenizer(f"local-dir:{folder}")(["a"]).shape == (1, 32)


def test_clipmerge_reads_the_folder_back_with_its_model(
    soup: Weights, tiny_spec: Any, tmp_path: Path
) -> None:
    folder = save_folder(soup, tmp_path / "soup", model=tiny_spec)
    again = load(folder)
    assert again.model == tiny_spec.to_metadata()
    assert save_folder(again, tmp_path / "copy") == tmp_path / "copy"  # no model named: the file knows


def test_a_folder_of_others_says_its_model_through_its_configuration(
    soup: Weights, tiny_spec: Any, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    folder = save_folder(soup, tmp_path / "theirs", model=tiny_spec)
    save_file(soup.state_dict(), folder / WEIGHTS)  # no record of ours
    assert load(folder).model == {**tiny_spec.to_metadata(), "name": "theirs"}


def test_the_file_in_the_folder_proves_itself(
    soup: Weights, tiny_spec: Any, tmp_path: Path, tiny_checkpoints: Mapping[str, Path]
) -> None:
    folder = save_folder(soup, tmp_path / "soup", model=tiny_spec)
    assert verify(folder, [tiny_checkpoints["base"].parent]).status == "verified"


def test_the_card(soup: Weights, tiny_spec: Any, tmp_path: Path) -> None:
    metadata = {
        "selection": {"by": "greedy_soup", "metric": "top1", "value": 0.875, "n": 64},
        "scores": {"shift: blur": {"metric": "top1", "value": 0.5, "n": 32}},
    }
    folder = save_folder(soup, tmp_path / "My soup", model=tiny_spec, metadata=metadata)
    head = front_matter(folder)
    assert "base_model" not in head  # the parents are local files: their names mean nothing on the Hub
    assert head["library_name"] == "open_clip"
    assert head["merge_notation"] == "mean([ft0, ft1, ft2])"
    assert {"clip", "merge", "clipmerge"} <= set(head["tags"])
    results = head["model-index"][0]["results"]
    assert [(r["dataset"]["name"], r["metrics"][0]["value"]) for r in results] == [
        ("held-out (selection)", 0.875), ("shift: blur", 0.5),
    ]  # fmt: skip
    card = (folder / CARD).read_text()
    assert "# My soup\n" in card
    assert "mean([ft0, ft1, ft2])" in card
    assert "| held-out (selection) |   top1 | 0.8750 |     64 |" in card
    assert "clipmerge verify" in card


def test_parents_from_the_hub_are_named_as_the_hub_names_them(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from clipmerge.weights.record import write_record

    parents = {"a": {"file": "hf-hub:org/model-a", "digest": "0" * 64}, "b": {"file": "my file!.pt"}}
    record = {"format": 1, "notation": "mean([a, b])", "parents": parents, "version": "1", "dtype": "base"}
    import numpy as np

    save_file({"x": np.ones(1)}, tmp_path / "m.safetensors", metadata=write_record(record))
    (tmp_path / CARD).write_text(model_card("name", tmp_path / "m.safetensors"))
    head = front_matter(tmp_path)
    assert (head["base_model"], head["base_model_relation"]) == (["org/model-a"], "merge")


def test_the_license_is_the_parents_where_they_agree(soup: Weights, tiny_spec: Any, tmp_path: Path) -> None:
    folders = [save_folder(soup, tmp_path / name, model=tiny_spec) for name in "abc"]
    a, b, c = map(load, folders)
    for folder, license in zip(folders, ("mit", "mit", "apache-2.0"), strict=True):
        (folder / CARD).write_text(f"---\nlicense: {license}\ntags:\n- clip\n---\n# {folder.name}\n")
    alike = save_folder(mean([a, b]), tmp_path / "alike")
    assert front_matter(alike)["license"] == "mit"
    again = save_folder(
        mean([a, load(alike / WEIGHTS)]), tmp_path / "again"
    )  # by the record of the file alone
    assert front_matter(again)["license"] == "mit"
    for i, others in enumerate(([b, c], [a, soup])):  # two licenses; one of them unknown
        assert "license" not in front_matter(save_folder(mean(others), tmp_path / f"o{i}", model=tiny_spec))
    stated = save_folder(mean([b, c]), tmp_path / "stated", license="cc-by-4.0")
    assert front_matter(stated)["license"] == "cc-by-4.0"
    (folders[0] / CARD).write_text("---\nlicense: [\n---\n")  # no YAML
    assert "license" not in front_matter(save_folder(a, tmp_path / "odd"))


def test_an_unknown_model_must_be_named(soup: Weights, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model is named") as refused:
        save_folder(soup, tmp_path / "soup")
    assert "--model" in (refused.value.hint or "")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_open_clip_could_not_load_are_refused(
    soup: Weights, tiny_spec: Any, tmp_path: Path
) -> None:
    tensors = soup.state_dict()
    headed = from_state_dict({**tensors, "classification_head.weight": torch.ones(2, 16)})
    with pytest.raises(ModelError, match="no place for a trained classification head"):
        save_folder(headed, tmp_path / "x", model=tiny_spec)
    del tensors["visual.proj"]
    with pytest.raises(ModelError, match=r"the weights lack 'visual\.proj'"):
        save_folder(from_state_dict(tensors), tmp_path / "x", model=tiny_spec)
    with pytest.raises(RecipeError, match="a task vector is not a model"):
        save_folder(soup - load_first(soup), tmp_path / "x", model=tiny_spec)
    with pytest.raises(OutputError, match="not shards"):
        save_folder(soup, tmp_path / "x", model=tiny_spec, shard_size=10)
    assert list(tmp_path.iterdir()) == []


def load_first(weights: Weights) -> Weights:
    path = weights.checkpoints[0].path
    assert path
    return load(path)


def test_existing_files_stay_without_force_and_others_stay_always(
    soup: Weights, tiny_spec: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "soup"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    save_folder(soup, folder, model=tiny_spec)
    (folder / CARD).write_text("edited")
    with pytest.raises(OutputError, match="already exists"):
        save_folder(soup, folder, model=tiny_spec)
    assert (folder / CARD).read_text() == "edited"
    save_folder(soup, folder, model=tiny_spec, force=True)
    assert (folder / CARD).read_text().startswith("---\n")
    assert (folder / "notes.txt").read_text() == "mine"


def test_its_own_weights_are_never_replaced(soup: Weights, tiny_spec: Any, tmp_path: Path) -> None:
    folder = save_folder(soup, tmp_path / "soup", model=tiny_spec)
    with pytest.raises(OutputError, match="is also an input"):
        save_folder(load(folder), folder, force=True)


def test_nothing_is_left_behind_by_a_failure(
    soup: Weights, tiny_spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clipmerge.report.model_folder.model_card", full)
    with pytest.raises(OutputError, match="No space left on device"):
        save_folder(soup, tmp_path / "soup", model=tiny_spec)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_runs_are_cleared(soup: Weights, tiny_spec: Any, tmp_path: Path) -> None:
    left = tmp_path / ".soup.0123abcd.clipmerge-tmp"
    left.mkdir()
    (left / WEIGHTS).write_text("half")
    other = tmp_path / ".other.0123abcd.clipmerge-tmp"
    other.mkdir()
    save_folder(soup, tmp_path / "soup", model=tiny_spec)
    assert sorted(p.name for p in tmp_path.iterdir()) == [other.name, "soup"]


def test_a_file_where_the_folder_should_be(soup: Weights, tiny_spec: Any, tmp_path: Path) -> None:
    (tmp_path / "soup").write_text("a file")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        save_folder(soup, tmp_path / "soup", model=tiny_spec)
    with pytest.raises(OutputError, match="does not exist"):
        save_folder(soup, tmp_path / "no" / "soup", model=tiny_spec)


class FakeHub:
    """Stands for huggingface_hub.HfApi: notes what would be uploaded."""

    calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012
    fails: Exception | None = None

    def create_repo(self, repo: str, **options: Any) -> str:
        if self.fails is not None:
            raise self.fails
        self.calls.append((repo, options))
        return f"https://hub/{repo}"

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", options))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "calls", [])
    return FakeHub


def test_push_uploads_the_three_files(hub: type[FakeHub], tmp_path: Path) -> None:
    assert push(tmp_path, "org/name", private=True) == "https://hub/org/name"
    assert hub.calls[0] == ("org/name", {"private": True, "exist_ok": True})
    upload = hub.calls[1][1]
    assert (upload["repo_id"], upload["folder_path"]) == ("org/name", str(tmp_path))
    assert upload["allow_patterns"] == [WEIGHTS, CONFIG, CARD]


class NoNetwork(Exception):  # noqa: N818
    """What an HTTP library raises: no OSError."""


@pytest.mark.parametrize("failure", [OSError("401 Unauthorized"), NoNetwork("name not known")])
def test_a_refused_upload_is_explained(
    hub: type[FakeHub], failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "fails", failure)
    with pytest.raises(OutputError, match=f"org/name could not be uploaded: {failure}") as refused:
        push(tmp_path, "org/name")
    assert "your login" in (refused.value.hint or "")


def test_the_command_writes_and_pushes_a_folder(
    hub: type[FakeHub],
    tiny_checkpoints: Mapping[str, Path],
    tiny_model_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from clipmerge_cli.app import main

    files = [f"{n}={tiny_checkpoints[f'ft{i}']}" for i, n in enumerate("ab")]
    out = f"{tmp_path}/merged/"
    arguments = ["merge", "mean([a, b])", *files, "-o", out, "--model", str(tiny_model_file)]
    assert main([*arguments, "--push-to-hub", "org/merged"]) == 0
    assert "uploaded to https://hub/org/merged" in capsys.readouterr().err
    assert json.loads((tmp_path / "merged" / CONFIG).read_text())["model_cfg"]["embed_dim"] == 16
    shutil.rmtree(tmp_path / "merged")
    (tmp_path / "merged").mkdir()  # an existing folder needs no slash
    assert main([*arguments[:-3], f"{tmp_path}/merged", *arguments[-2:]]) == 0
    assert (tmp_path / "merged" / WEIGHTS).exists()


@pytest.mark.parametrize("command", ["soup", "interpolate"])
def test_every_command_that_merges_pushes(
    hub: type[FakeHub],
    tiny_checkpoints: Mapping[str, Path],
    tiny_model_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    from clipmerge_cli.app import main

    arguments = [
        command,
        *map(str, [tiny_checkpoints["ft0"], tiny_checkpoints["ft1"]]),
        "--push-to-hub",
        "org/s",
    ]
    model = ["--model", str(tiny_model_file)]
    assert main([*arguments, *model, "-o", f"{tmp_path}/file.safetensors"]) == 2
    assert "goes with a folder: -o DIR/" in capsys.readouterr().err
    assert hub.calls == []
    assert main([*arguments, *model, "-o", f"{tmp_path}/soup/"]) == 0
    said = capsys.readouterr().err
    assert said.index("wrote ") < said.index("uploaded to https://hub/org/s")


@pytest.mark.slow
def test_open_clip_loads_a_merged_file_of_a_real_model(tmp_path: Path) -> None:
    import open_clip

    from clipmerge.model import build_model, resolve_model

    shapes = build_model(resolve_model("ViT-B-32"), "meta").state_dict()
    noise = (torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) * 0.02).half()

    def filled(shape: torch.Size) -> torch.Tensor:
        return noise.repeat(shape.numel() // noise.numel() + 1)[: shape.numel()].reshape(shape)

    a = {name: filled(tensor.shape) for name, tensor in shapes.items()}
    b = {name: 4 * tensor for name, tensor in a.items()}
    merged = mean([from_state_dict(a, "a"), from_state_dict(b, "b")])
    path = merged.save(tmp_path / "merged.safetensors", digests=False)
    held = open_clip.create_model("ViT-B-32", pretrained=str(path)).state_dict()
    assert held.keys() == a.keys()
    assert all(torch.equal(held[name], (2.5 * a[name].double()).half().float()) for name in a)
