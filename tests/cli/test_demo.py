"""The demo at a twentieth of its training: everything is there, and its commands do what it did, bit for bit."""

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from clipmerge.data.open import open_split
from clipmerge.errors import TrainingError
from clipmerge.evaluate.metrics import Predictions
from clipmerge.evaluate.score import Score, score_of
from clipmerge_cli import demo
from clipmerge_cli.app import main
from clipmerge_cli.demo_steps import MODEL, MODEL_FILE, SHIFTS, commands
from clipmerge_cli.demo_study import TASK_ROLES, Study, compare
from clipmerge_cli.options import Talk

TRAININGS = commands("finetune")


@pytest.fixture(scope="module")
def folder(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(demo_folder, tmp_path_factory.mktemp("copy") / "out", copy_function=os.link)


@pytest.fixture(scope="module")
def results(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_the_model_is_small() -> None:
    import open_clip

    model = open_clip.CLIP(**MODEL["model_cfg"])
    assert sum(p.numel() for p in model.parameters()) < 6_000_000


def test_everything_is_kept(folder: Path) -> None:
    made = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    figures = ("comparison", "greedy-soup", "wise-ft", "forgot", "added", "patched", "base-training")
    merged = ("uniform", "greedy", "wise-ft", "added", "forgot", "patched")
    assert made >= {
        "results.json",
        "commands.sh",
        MODEL_FILE,
        *(f"{name}.{suffix}" for name in figures for suffix in ("png", "svg")),
        *(f"{name}.safetensors" for name in merged),
        *TRAININGS,
        *(f"data/{name}.npz" for name in ("broad", "digits", "low", "high")),
    }


def test_the_table_compares_what_was_asked(results: Any) -> None:
    roles = [model["role"] for model in results["models"]]
    assert roles.count("ingredient") == 8
    assert {"base", "best", "uniform", "greedy", "ensemble", "wise-ft", "added", "negated", "patched"} <= set(
        roles
    )
    by_role = {model["role"]: model for model in results["models"]}
    alone = [m["scores"]["held-out"]["value"] for m in results["models"] if m["role"] == "ingredient"]
    assert by_role["best"]["scores"]["held-out"]["value"] == max(alone)
    greedy = by_role["greedy"]["scores"]["held-out"]["value"]
    assert greedy == results["greedy_soup"]["score"]["value"] >= max(alone)
    for model in results["models"]:
        for score in model["scores"].values():
            assert score["value"] == score["correct"] / score["n"]
        if model["role"] not in TASK_ROLES:
            shifts = [model["scores"][name]["value"] for name in SHIFTS]
            assert model["shifts"]["value"] == pytest.approx(sum(shifts) / len(shifts))
            best = by_role["best"]["shifts"]["value"]
            assert model["against_best"]["shifts"]["difference"] == pytest.approx(
                model["shifts"]["value"] - best
            )
    assert by_role["best"]["against_best"]["test"] == {"difference": 0.0, "p": 1.0}


def test_the_images_are_split_once_and_tests_are_seen_by_no_training(folder: Path) -> None:
    sizes = {part: open_split(f"{folder}/data/digits.npz#{part}") for part in ("train", "val", "test")}
    assert [len(split) for split in sizes.values()] == [297, 400, 200]  # 800 where the demo is not a test's
    broad = np.load(folder / "data" / "broad.npz")
    assert (len(broad["labels"]), set(broad["split"])) == (597, {0})
    images = [{split.image(i).tobytes() for i in range(len(split))} for split in sizes.values()]
    assert not images[0] & images[2]
    assert not images[1] & images[2]


def test_a_paired_comparison_counts_images_and_with_one_split_is_mcnemars() -> None:
    """By hand: of six images one model alone has two right under more shifts, the other one: p of 2 against 1 is 1."""

    def score(*right: int) -> Score:
        labels = np.zeros(len(right), np.int64)
        return score_of(
            Predictions(labels, 1 - np.array(right), np.ones(len(right), bool), np.ones(len(right)), None),
            "top1",
        )

    ours = [score(1, 1, 0, 1, 0, 1), score(1, 0, 0, 1, 1, 1)]
    theirs = [score(1, 0, 0, 1, 1, 1), score(1, 0, 1, 1, 1, 0)]
    assert compare(ours, theirs) == {
        "difference": pytest.approx((2 + 1 + 0 + 2 + 1 + 2 - (2 + 0 + 1 + 2 + 2 + 1)) / 12),
        "p": 1.0,
    }
    one = compare(ours[:1], theirs[:1])
    assert one["p"] == ours[0].p_value(theirs[0])


def test_the_tables_say_every_model_and_where_the_rest_is(
    folder: Path, results: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "run", lambda *_, **__: None)
    assert main(["demo", "--out", str(folder)]) == 0
    shown = capsys.readouterr().out
    for model in results["models"]:
        assert model["name"] in shown
        assert f"{100 * model['scores']['test']['value']:.1f}" in shown
    assert f"{folder}/commands.sh" in shown
    flowing = " ".join(shown.split())
    for sentence in demo.verdicts(results):
        assert sentence in flowing
    assert main(["demo", "--out", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == results


def test_a_verdict_says_what_the_test_found_and_nothing_more() -> None:
    def model(test: tuple[float, float], shifts: tuple[float, float]) -> Any:
        against = {k: {"difference": d, "p": p} for k, (d, p) in {"test": test, "shifts": shifts}.items()}
        return {"name": "greedy soup (2 of 8)", "role": "greedy", "against_best": against}

    (good,) = demo.verdicts({"models": [model((0.0175, 0.004), (-0.032, 0.0001))]})
    assert good == (
        "greedy soup (2 of 8): on test digits 1.8 points better (p = 0.004), under shift 3.2 points worse (p < 0.001)"
    )
    (noise,) = demo.verdicts({"models": [model((0.01, 0.2), (0.0, 1.0))]})
    assert noise == (
        "greedy soup (2 of 8): on test digits no difference that stands (+1.0, p = 0.200), "
        "under shift no difference that stands (+0.0, p = 1.000)"
    )


def test_its_files_open_in_open_clip(folder: Path) -> None:
    import open_clip

    model = open_clip.CLIP(**MODEL["model_cfg"])
    open_clip.load_checkpoint(model, str(folder / "greedy.safetensors"))
    saved = load_file(folder / "greedy.safetensors")["visual.proj"]
    assert np.array_equal(model.visual.proj.detach().numpy(), saved)


def command_lines(script: Path) -> Iterator[list[str]]:
    for line in script.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if line.startswith("clipmerge "):
            yield shlex.split(line)[1:]


def test_its_commands_work_when_typed_and_give_the_same_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["bash", "-n", folder / "commands.sh"], check=True)
    monkeypatch.chdir(folder)
    for name in ("ft", "tasks"):
        Path("again", name).mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("CLIPMERGE_CACHE", str(folder / "cache"))  # nothing is remembered
    for words in command_lines(folder / "commands.sh"):
        globbed = [
            w for word in words for w in (sorted(map(str, Path().glob(word))) if "*" in word else [word])
        ]
        assert main(globbed) == 0, (words, capsys.readouterr().err)
    again = sorted(Path("again").rglob("*.safetensors"))
    assert len(again) == len(TRAININGS) + 6
    for path in again:
        first, second = load_file(path), load_file(path.relative_to("again"))
        assert first.keys() == second.keys()
        different = [name for name in first if not np.array_equal(first[name], second[name])]
        assert different == [], path


def test_a_finished_demo_is_not_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "results.json").stat()
    assert main(["demo", "--out", str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder} holds a finished demo\n\nhint: ")
    assert (folder / "results.json").stat() == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    assert main(["demo", "--out", str(tmp_path), "--force"]) == 1
    assert (
        f"error: {tmp_path} is not empty and was not created by `clipmerge demo`" in capsys.readouterr().err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_demo_of_another_version_is_not_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / MODEL_FILE).write_text("{}")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "holds a demo of another version" in capsys.readouterr().err


def test_force_starts_anew_and_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "ft").mkdir()
    for name in (MODEL_FILE, "results.json", "greedy.safetensors", "notes.txt", "ft/ft1.safetensors"):
        (tmp_path / name).write_text("{}")
    demo._claim(tmp_path, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [MODEL_FILE, "notes.txt"]


def test_an_interrupted_demo_goes_on_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    monkeypatch.setattr(Study, "train", lambda self, file, words: trained.append(file))
    for step in ("compare", "report"):
        monkeypatch.setattr(Study, step, lambda self: None)
    study = Study(tmp_path, Talk(quiet=True))
    (tmp_path / "ft").mkdir()
    (tmp_path / "base.safetensors").touch()
    (tmp_path / "ft/ft2.safetensors").touch()
    study.run()
    assert trained == [file for file in TRAININGS if file not in ("base.safetensors", "ft/ft2.safetensors")]


def test_a_training_that_was_stopped_goes_on_from_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def stopped(*_: Any, resume: bool, **__: Any) -> None:
        asked.append(resume)
        (tmp_path / "base.state").touch()
        raise TrainingError("stopped by SIGINT after step 4 of 70", hint="the same command with --resume")

    monkeypatch.setattr("clipmerge.finetuning.finetune.finetune", stopped)
    study = Study(tmp_path, Talk(quiet=True))
    for _ in range(2):
        with pytest.raises(TrainingError) as caught:
            study.run()
        assert caught.value.hint == "the same command goes on from there"
    assert asked == [False, True]
