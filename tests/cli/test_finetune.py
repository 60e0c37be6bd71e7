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
    first = said.err.splitlines()[0]
    assert first.startswith(
        "training tiny (--model) by flyp on cpu, fp32: 60 images of digits, #train, 10 classes as 'a "
    )
    assert "; held out: 359 images of digits, #val, 10 classes as 'a photo of the number" in first
    assert f"wrote {out}" in said.err
    events = map(json.loads, Path(f"{out.with_suffix('')}.log.jsonl").read_text().splitlines())
    final = [event for event in events if event["event"] == "score"][-1]
    assert f"held-out {100 * final['top1']:.2f} %, loss {final['loss']:.3f}; 3 steps in " in said.err
    assert main(command) == 1
    assert "ft.safetensors exists\n\nhint: " in capsys.readouterr().err
    picture = ["--plot", str(tmp_path / "log.png")]
    assert main([*command, "--force", "--json", "--augment", '{"scale": [0.5, 1]}', *picture]) == 0
    assert (tmp_path / "log.svg").stat().st_size > 1000
    training = json.loads(capsys.readouterr().out)["training"]
    assert training["augment"] == {"scale": [0.5, 1]}
    assert training["scores"]["top1"] >= 0


def test_a_frozen_head_leaves_none_and_goes_into_patch(
    tiny_checkpoints: Any, tiny_model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PAINT in sequence: finetune, patch, finetune from the patched model, patch again with what was patched so far."""
    base, model = str(tiny_checkpoints["base"]), ["--model", str(tiny_model_file)]
    for step, tasks in (("one", ["digits#val"]), ("two", ["digits#val", "digits#val@invert"])):
        tuned, patched = str(tmp_path / f"{step}.safetensors"), str(tmp_path / f"patched-{step}.safetensors")
        train = [
            "finetune",
            "--base",
            base,
            *model,
            "--train",
            tasks[-1].replace("val", "train"),
            "--head",
            "frozen",
        ]
        assert main([*train, "--method", "ce", "--steps", "2", "-o", tuned, *SMALL]) == 0
        data = [word for task in tasks for word in ("--patch", task)] + [
            "--supported",
            "digits#test",
            "--limit",
            "50",
        ]
        assert main(["patch", base, tuned, *model, *data, "--alphas", "0,1", "-o", patched]) == 0
        base = patched
    assert "chose alpha" in capsys.readouterr().err
    assert main(["inspect", base, "--json"]) == 0
    assert "classification_head" not in capsys.readouterr().out


def test_several_sets_are_trained_on_together(
    tiny_checkpoints: Any, tiny_model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "both.safetensors"
    command = ["finetune", "--base", str(tiny_checkpoints["base"]), "--model", str(tiny_model_file), "--method", "ce",
               "--head", "frozen", "--train", "plain=digits#train[:60]",
               "--train", "turned=digits#train[:20]@rotate:20", "--templates", "turned=a turned {}",
               "--shares", "plain=1,turned=3", "--val", "plain=digits#val[:40]",
               "--val", "turned=digits#val[:20]", "--steps", "2", "--batch-size", "16", "--json",
               "-o", str(out)]  # fmt: skip
    assert main(command) == 0
    training = json.loads(capsys.readouterr().out)["training"]
    assert training["sets"] == {"plain": 60, "turned": 20}
    assert training["shares"] == "plain=1,turned=3"
    assert {"plain top1", "turned top1", "top1"} <= training["scores"].keys()
    import clipmerge as cm

    assert ["a turned {}"] in [entry["templates"] for entry in cm.load(out).prompts]


@pytest.mark.parametrize(("held_out", "called"), [("d", "held-out d"), ("v", "v")])
def test_held_out_images_that_are_trained_on_are_counted_whatever_the_sets_are_called(
    held_out: str,
    called: str,
    tiny_checkpoints: Any,
    tiny_model_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["finetune", "--base", str(tiny_checkpoints["base"]), "--model", str(tiny_model_file)]
    command += ["--train", "d=digits#val", "--val", f"{held_out}=digits#val[:40]", "--steps", "1"]
    assert main([*command, "--batch-size", "16", "-o", str(tmp_path / "ft.safetensors")]) == 0
    assert f"40 of {called}'s 40 images are in d too" in capsys.readouterr().err


def test_a_finetuning_is_repeated_from_its_record(
    tiny_checkpoints: Any, tiny_model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the checkpoint, from what inspect shows of it, and from TOML: the same weights; typed options win."""
    import clipmerge as cm

    start = ["finetune", "--base", str(tiny_checkpoints["base"]), "--model", str(tiny_model_file)]
    data = ["--train", "digits", "--limit", "60"]
    first = tmp_path / "first.safetensors"
    how = [
        "--method",
        "ce",
        "--head",
        "frozen",
        "--lr",
        "2e-3",
        "--steps",
        "2",
        "--batch-size",
        "16",
        "--wd",
        "0.3",
    ]
    how += [
        "--augment",
        '{"scale": [0.5, 1]}',
        "--templates",
        "a {}",
        "--label-smoothing",
        "0.1",
        "--decay",
        "matrices",
    ]
    assert main([*start, *data, *how, "-o", str(first)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(first), "--json"]) == 0
    (tmp_path / "shown.json").write_text(capsys.readouterr().out)
    (tmp_path / "typed.toml").write_text(
        'train = "digits"\nlimit = 60\nmethod = "ce"\nhead = "frozen"\nlr = 2e-3\nsteps = 2\nbatch-size = 16\n'
        'wd = 0.3\ntemplates = "a {}"\nlabel_smoothing = 0.1\ndecay = "matrices"\n[augment]\nscale = [0.5, 1]\n'
    )
    for name, more in ((first.name, data), ("shown.json", data), ("typed.toml", [])):
        out = tmp_path / f"again-{name}.safetensors"
        assert main([*start, "--config", str(tmp_path / name), *more, "-o", str(out)]) == 0, name
        again, tuned = cm.load(out), cm.load(first)
        assert all(bool((again.state_dict()[n] == t).all()) for n, t in tuned.state_dict().items()), name
        assert again.record["training"] == tuned.record["training"]
    other = tmp_path / "other.safetensors"
    assert main([*start, "--config", str(first), *data, "--wd", "0", "-o", str(other)]) == 0
    assert cm.load(other).record["training"]["wd"] == 0


def test_a_configuration_that_says_nothing_is_refused(
    tiny_checkpoints: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.toml").write_text("learning_rate = 1\n")
    (tmp_path / "b.toml").write_text("lr = = 1\n")
    (tmp_path / "c.toml").write_text('lr = "fast"\n')
    command = ["finetune", "--train", "digits", "-o", str(tmp_path / "x.safetensors"), "--config"]
    for file, code, said in (
        ("a.toml", 1, "learning_rate is no option of finetune"),
        ("b.toml", 1, "is not TOML"),
        ("c.toml", 2, "Invalid value for '--lr'"),
        ("d.toml", 1, "cannot be read"),
        (tiny_checkpoints["base"], 1, "records no finetuning"),
    ):
        assert main([*command, str(tmp_path / file)]) == code
        assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_options_that_do_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, said in (
        (["--method", "ce", "--logit-scale", "frozen"], "--logit-scale does nothing here: a trained head"),
        (["--method", "linear-probe", "--lr", "1"], "--lr does nothing here: linear-probe takes no steps"),
        (["--no-freeze-batch-norm", "--method", "linear-probe"], "--freeze-batch-norm does nothing here"),
        (["--head", "trained"], "flyp trains no head"),
    ):
        assert main(["finetune", "--train", "digits", "-o", str(tmp_path / "x.safetensors"), *options]) == 1
        assert said in capsys.readouterr().err


def test_finetune_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "ft.safetensors")
    assert main(["finetune", "--train", "digits", "-o", out]) == 1
    assert "training from scratch needs to know the model" in capsys.readouterr().err
    assert main(["finetune", "base.pt", "--train", "digits", "-o", out]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "hint: say where training starts with --base base.pt"
    assert main(["finetune", "--train", "digits", "-o", out, "--method", "flip"]) == 2
    assert "hint" not in capsys.readouterr().err
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
