"""WiSE-FT over a trained head: the base's zero-shot head as weights, its record, and its verification."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import clipmerge as cm
from clipmerge.errors import MismatchError
from clipmerge_cli.app import main

HEAD = "classification_head.weight"


@pytest.fixture
def files(tiny_checkpoints: Any, tiny_spec: Any, tmp_path: Path) -> tuple[Path, Path]:
    """A base without a head, and a model that was finetuned from it with one, under templates of its own."""
    base = cm.load(tiny_checkpoints["base"])
    base.save(tmp_path / "base.safetensors", metadata={"model": tiny_spec.to_metadata()})
    train = cm.open_split("digits#train", templates=["the digit {}.", "{}"], limit=60)
    options = {"method": "ce", "lr": 1e-3, "steps": 3, "batch_size": 16, "augment": "none", "start": True}
    cm.finetune(tmp_path / "base.safetensors", train, out=tmp_path / "ce.safetensors", **options)
    return tmp_path / "base.safetensors", tmp_path / "ce.safetensors"


def test_it_is_the_head_that_training_started_from(files: tuple[Path, Path]) -> None:
    base, tuned = map(cm.load, files)
    headed, recipe = cm.with_zero_shot_head(base, tuned)
    start = cm.load(files[1].with_name("ce.run") / "ce.start.safetensors").state_dict()
    made = headed.state_dict()
    assert made.keys() == start.keys()
    for name, value in start.items():
        torch.testing.assert_close(made[name], value, rtol=1e-5, atol=1e-6)
    assert recipe["templates"] == ["the digit {}.", "{}"]
    assert recipe["classes"] == list(cm.open_split("digits#train", limit=60).classes)


def test_interpolation_builds_the_head_says_so_and_is_verified(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = files
    out = tmp_path / "wise.safetensors"
    assert main(["interpolate", str(base), str(tuned), "--alpha", "0.25", "-o", str(out)]) == 0
    said = capsys.readouterr().err
    assert "base has no head: its zero-shot head is built from its own text tower" in said
    assert "10 classes and the prompts (2 templates) that ce records" in said
    start = cm.load(tuned.with_name("ce.run") / "ce.start.safetensors").state_dict()[HEAD]
    expected = 0.75 * start + 0.25 * cm.load(tuned).state_dict()[HEAD]
    torch.testing.assert_close(cm.load(out).state_dict()[HEAD], expected, rtol=1e-5, atol=1e-6)
    parents = cm.load(out).record["parents"]
    assert parents["zero_shot_head"]["file"] is None
    assert parents["zero_shot_head"]["made"]["zero_shot_head"]["templates"] == ["the digit {}.", "{}"]
    assert cm.verify(out).status == "verified"
    assert main(["verify", str(out)]) == 0
    again = tmp_path / "again.safetensors"
    cm.load(out).save(again)
    assert cm.verify(again, [out]).status == "verified"
    base.unlink()
    assert {parent.name for parent in cm.verify(out).missing} == {"base", "zero_shot_head"}


def test_another_processors_rounding_is_no_difference_and_another_head_is(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipmerge.evaluate import zero_shot

    base, tuned = map(cm.load, files)
    out = tmp_path / "wise.safetensors"
    cm.interpolate(cm.with_zero_shot_head(base, tuned)[0], tuned, 0.5).save(out)
    plain = zero_shot.zero_shot_head
    for error, status in ((1e-6, "verified"), (1e-2, "differs")):
        monkeypatch.setattr(zero_shot, "zero_shot_head", lambda *args, e=error: plain(*args) + e)
        verdict = cm.verify(out)
        assert verdict.status == status
        assert "to within rounding" in verdict.reason or verdict.tensor == HEAD


def test_a_curve_is_swept_from_the_zero_shot_head(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """At 0 it scores as the base under the recorded prompts, at 1 as the finetuned model."""
    data = ["--eval", "digits#val", "--limit", "100", "--alphas", "0,1", "--json"]
    assert main(["interpolate", *map(str, files), *data]) == 0
    points = json.loads(capsys.readouterr().out)["history"]
    split = cm.open_split("digits#val", templates=["the digit {}.", "{}"], limit=100)
    for point, file in zip(points, files, strict=True):
        score = cm.score(str(file), split)
        assert point["scores"]["id"]["value"] == next(iter(score.values()))["val"].value


def test_a_head_of_unknown_classes_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base, tuned = files
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(tuned), bare)
    with pytest.raises(MismatchError, match="does not record its 10 classes"):
        cm.with_zero_shot_head(cm.load(base), cm.load(bare))
    encoder = tmp_path / "encoder.safetensors"
    save_file({n: t for n, t in load_file(base).items() if n.startswith("visual.")}, encoder)
    with pytest.raises(MismatchError, match="neither a head nor a text tower"):
        cm.with_zero_shot_head(cm.load(encoder), cm.load(tuned))
