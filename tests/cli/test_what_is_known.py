"""What is known of a model when it is read is there in whatever a command writes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import clipmerge
from clipmerge_cli.app import main

SAYS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.2], "interpolation": "bilinear", "resize_mode": "squash"}


@pytest.fixture(scope="module")
def inputs(
    tiny_checkpoints: Mapping[str, Path], tiny_model_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    """One model, QuickGELU: an open_clip folder that says it all, OpenAI's names, a file that says nothing."""
    folder = tmp_path_factory.mktemp("inputs")
    config = json.loads(tiny_model_file.read_text())["model_cfg"]
    states = [load_file(tiny_checkpoints[name]) for name in ("base", "ft0", "ft1")]
    document = {"model_cfg": {**config, "quick_gelu": True}, "preprocess_cfg": SAYS}
    (folder / "said").mkdir()
    (folder / "said" / "open_clip_config.json").write_text(json.dumps(document))
    torch.save(states[0], folder / "said" / "open_clip_pytorch_model.bin")
    sizes = {
        name: torch.tensor(n)
        for name, n in (("input_resolution", 16), ("context_length", 32), ("vocab_size", 49408))
    }
    torch.save(states[1] | sizes, folder / "openai.pt")
    torch.save(states[2], folder / "silent.pt")
    return {"said": folder / "said", "openai": folder / "openai.pt", "silent": folder / "silent.pt"}


COMMANDS: Mapping[str, tuple[str, ...]] = {
    "soup": ("soup", "silent", "said", "openai"),
    "the order decides nothing": ("soup", "openai", "silent", "said"),
    "interpolate": ("interpolate", "silent", "said", "--alpha", "0.5"),
    "negate": ("negate", "silent", "said", "--scale", "0.1"),
    "add": ("add", "openai", "silent", "said", "--scale", "0.1"),
    "merge": ("merge", "a + 0.5*(b - a)", "a=silent", "b=said"),
    "convert": ("convert", "said"),
    "task-vector": ("task-vector", "silent", "said"),
}


def given(words: tuple[str, ...], inputs: Mapping[str, Path]) -> list[str]:
    places = {
        **inputs,
        **{f"{letter}={name}": f"{letter}={path}" for letter in "ab" for name, path in inputs.items()},
    }
    return [str(places.get(word, word)) for word in words]


@pytest.mark.parametrize("output", ["out.safetensors", "out/"])
@pytest.mark.parametrize("command", COMMANDS)
def test_model_activation_and_preprocessing_survive(
    command: str, output: str, inputs: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = given(COMMANDS[command], inputs)
    if command == "task-vector" and output == "out/":
        pytest.skip("a task vector is no folder to publish")
    code, said = main([*words, "-o", f"{tmp_path}/{output}"]), capsys.readouterr()
    assert code == 0, said.err
    assert "no input says" not in said.err
    spec = clipmerge.resolve_model(None, clipmerge.load(tmp_path / output))
    assert spec.config["quick_gelu"] is True
    assert spec.config["embed_dim"] == 16
    assert {key: spec.preprocess[key] for key in SAYS} == SAYS


def test_transformers_folders_say_it_too(inputs: Mapping[str, Path], tmp_path: Path) -> None:
    for source, target, to in (("said", "hf", "huggingface"), ("hf", "back", "open_clip")):
        place = inputs.get(source, tmp_path / source)
        assert main(["convert", str(place), "--to", to, "-o", f"{tmp_path}/{target}/"]) == 0
    for folder in ("hf", "back"):
        spec = clipmerge.resolve_model(None, clipmerge.load(tmp_path / folder))
        assert spec.config["quick_gelu"] is True
        assert {key: spec.preprocess[key] for key in SAYS} == SAYS
    weights = tmp_path / "hf" / "model.safetensors"  # without the record in the file: by its sidecars alone
    from safetensors.torch import save_file

    save_file(load_file(weights), weights, {"format": "pt"})
    spec = clipmerge.resolve_model(None, clipmerge.load(tmp_path / "hf"))
    assert spec.config["quick_gelu"] is True
    assert {key: spec.preprocess[key] for key in SAYS} == SAYS


def test_a_soup_with_openais_archive_needs_quick_gelu_where_no_model_is_known(
    inputs: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (("convert", "openai"), ("soup", "silent", "openai")):
        out = tmp_path / f"{words[0]}.safetensors"
        assert main([*given(words, inputs), "-o", str(out)]) == 0
        assert "no input says which model it is for" in capsys.readouterr().err
        assert clipmerge.load(out).record["quick_gelu"] is True


@pytest.mark.parametrize(
    "words", [("soup", "silent", "openai"), ("convert", "openai"), ("convert", "silent")]
)
def test_a_model_that_is_named_is_recorded_where_it_can_be_true(
    words: tuple[str, ...], inputs: Mapping[str, Path], tiny_model_file: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out.safetensors"
    assert main([*given(words, inputs), "-o", str(out), "--model", "ViT-B-32"]) == 1
    assert "the weights do not fit the model" in capsys.readouterr().err
    assert not out.exists()
    assert main([*given(words, inputs), "-o", str(out), "--model", str(tiny_model_file)]) == 0
    spec = clipmerge.resolve_model(None, clipmerge.load(out))
    assert bool(spec.config.get("quick_gelu")) is ("openai" in words)
    assert spec.preprocess["mean"] == [0.5] * 3


def test_two_statements_are_chosen_between_by_name(
    inputs: Mapping[str, Path], tiny_model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.safetensors"
    assert main(["convert", str(inputs["silent"]), "-o", str(other), "--model", str(tiny_model_file)]) == 0
    words = ["soup", str(inputs["said"]), str(other), "-o", str(tmp_path / "out.safetensors")]
    assert main(words) == 1
    assert "--model" in capsys.readouterr().err
    document = json.loads(tiny_model_file.read_text())
    document["model_cfg"]["quick_gelu"] = True
    (tmp_path / "chosen.json").write_text(json.dumps(document))
    assert main([*words, "--model", str(tmp_path / "chosen.json")]) == 0
    assert (
        clipmerge.resolve_model(None, clipmerge.load(tmp_path / "out.safetensors")).preprocess["mean"]
        == [0.5] * 3
    )
