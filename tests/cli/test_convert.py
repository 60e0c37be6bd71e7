"""`clipmerge convert`, as a user types it."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipmerge_cli.app import main


def test_a_training_checkpoint_becomes_safetensors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {"module.logit_scale": torch.tensor(2.0)}, "epoch": 1}, tmp_path / "epoch_1.pt")
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(tmp_path / "epoch_1.pt"), "-o", str(out)]) == 0
    assert load_file(out)["logit_scale"] == 2.0
    assert f"wrote {out}" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "epoch_1.pt"), "-o", str(out)]) == 1
    assert "already exists" in capsys.readouterr().err


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"logit_scale": torch.tensor(2.0)}, tmp_path / "a.pt")
    out = tmp_path / "o.safetensors"
    assert main(["convert", str(tmp_path / "a.pt"), "-o", str(out), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {
        "kind": "convert", "from": "open_clip", "to": "open_clip", "output": str(out), "dropped": [],
    }  # fmt: skip
    assert said.err == ""


def test_what_was_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"logit_scale": torch.tensor(2.0), "input_resolution": torch.tensor(224)}
    torch.save(state, tmp_path / "ViT.pt")
    assert main(["convert", str(tmp_path / "ViT.pt"), "-o", str(tmp_path / "o.safetensors")]) == 0
    assert "left out" in capsys.readouterr().err


def test_a_file_that_asks_for_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "evil.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert main(["convert", str(tmp_path / "evil.pt"), "-o", str(tmp_path / "o.safetensors")]) == 1
    shown = capsys.readouterr().err
    assert "error:" in shown
    assert "it calls os.system" in shown
    assert "hint:" in shown
    assert not (tmp_path / "o.safetensors").exists()


def test_an_unknown_layout_is_wrong_usage(tmp_path: Path) -> None:
    assert main(["convert", "a.pt", "-o", str(tmp_path / "o.safetensors"), "--to", "onnx"]) == 2


def test_a_folder_as_output_gets_the_models_configuration(
    tiny_checkpoints: Mapping[str, Path],
    tiny_model_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, folder = str(tiny_checkpoints["base"]), f"{tmp_path}/hf/"
    assert main(["convert", base, "--to", "huggingface", "-o", folder]) == 1
    assert "no model is named" in capsys.readouterr().err
    assert main(["convert", base, "--to", "huggingface", "-o", folder, "--model", str(tiny_model_file)]) == 0
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip
    assert main(["convert", folder, "-o", f"{tmp_path}/back/"]) == 0
    back = load_file(tmp_path / "back" / "open_clip_model.safetensors")
    assert all(torch.equal(value, back[name]) for name, value in load_file(base).items())


@pytest.mark.parametrize("only", ["image", "text"])
def test_one_tower_alone(
    tiny_checkpoints: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    only: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    base, tuned = str(tiny_checkpoints["base"]), str(tiny_checkpoints["ft0"])
    assert main(["interpolate", base, tuned, "--alpha", "0.5", "-o", "wise.safetensors"]) == 0
    assert main(["convert", "wise.safetensors", "--only", only, "-o", "tower.safetensors"]) == 0
    whole, tower = load_file("wise.safetensors"), load_file("tower.safetensors")
    names = {n for n in whole if n.startswith("visual.") == (only == "image") and n != "logit_scale"}
    assert tower.keys() == names
    assert all(torch.equal(tower[name], whole[name]) for name in names)
    # It goes into its base again, and does not claim to be the merge that the whole was.
    assert main(["interpolate", base, "tower.safetensors", "--alpha", "1", "-o", "again.safetensors"]) == 0
    again = load_file("again.safetensors")
    assert all(torch.equal(again[n], (whole if n in names else load_file(base))[n]) for n in whole)
    capsys.readouterr()
    assert main(["verify", "tower.safetensors"]) == 1
    assert "does not say how it was made" in capsys.readouterr().err


def test_one_tower_is_no_folder_and_must_be_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"visual.proj": torch.zeros(2, 2), "logit_scale": torch.tensor(2.0)}, "a.pt")
    assert main(["convert", "a.pt", "--only", "image", "-o", "out/"]) == 2
    assert main(["convert", "a.pt", "--only", "text", "-o", "out.safetensors"]) == 1
    assert "a.pt has no text tower" in capsys.readouterr().err
