"""`clipmerge finetune` and `clipmerge sweep`, as they are typed."""

import json
from pathlib import Path
from typing import Any

import pytest

from clipmerge_cli.app import main

SMALL = ["--batch-size", "16", "--lr", "1e-3", "--limit", "60"]


def test_finetune_from_a_base(
    tiny_checkpoints: Any, tiny_model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ft.safetensors"
    command = [
        "finetune",
        "--base",
        str(tiny_checkpoints["base"]),
        "--model",
        str(tiny_model_file),
        "--train",
        "digits",
        "--val",
        "digits",
        "--steps",
        "3",
        "--score-every",
        "2",
        "-o",
        str(out),
        *SMALL,
    ]
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "step 2: held-out " in said.err
    assert f"wrote {out}" in said.err
    assert main(command) == 1
    assert "ft.safetensors exists\n\nhint: " in capsys.readouterr().err
    picture = ["--plot", str(tmp_path / "log.png")]
    assert main([*command, "--force", "--json", "--augment", '{"scale": [0.5, 1]}', *picture]) == 0
    assert (tmp_path / "log.svg").stat().st_size > 1000
    training = json.loads(capsys.readouterr().out)["training"]
    assert training["augment"] == {"scale": [0.5, 1]}
    assert training["scores"]["top1"] >= 0


def test_finetune_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "ft.safetensors")
    assert main(["finetune", "--train", "digits", "-o", out]) == 1
    assert "training from scratch needs to know the model" in capsys.readouterr().err
    assert main(["finetune", "--train", "digits", "-o", out, "--method", "flip"]) == 2
    assert main(["finetune", "--train", "digits", "-o", out, "--augment", "{"]) == 2
    assert not list(tmp_path.iterdir())


def test_sweep_leaves_checkpoints_and_a_table(
    tiny_checkpoints: Any, tiny_model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    space = tmp_path / "space.toml"
    space.write_text("[lr]\nlow = 1e-4\nhigh = 1e-2\nlog = true\n[fixed]\nsteps = 2\nmethod = 'flyp'\n")
    command = ["sweep", "--base", str(tiny_checkpoints["base"]), "--model", str(tiny_model_file), "--train", "digits",
               "--val", "digits", "--trials", "2", "--space", str(space), "-o", str(tmp_path / "runs"),
               "--batch-size", "16", "--limit", "60"]  # fmt: skip
    assert main(command) == 0
    said = capsys.readouterr()
    assert "trial-0001.safetensors" in said.out
    assert "2/2 " in said.err
    assert main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 2
    assert {"file", "held_out", "lr"} <= rows[0].keys()


def test_the_limit_is_for_training_images(
    tiny_checkpoints: Any, tiny_model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["finetune", "--base", str(tiny_checkpoints["base"]), "--model", str(tiny_model_file), "--json"]
    data = [
        "--train",
        "digits#train",
        "--val",
        "digits#val",
        "--steps",
        "1",
        "-o",
        str(tmp_path / "ft.safetensors"),
    ]
    assert main([*given, *data, *SMALL]) == 0
    training = json.loads(capsys.readouterr().out)["training"]
    assert training["images"] == 60
    correct = 359 * training["scores"]["top1"]  # of the 359 held-out images, not of 60
    assert correct == pytest.approx(round(correct), abs=1e-6)
