"""Sweeps: the paper's space, TOML spaces, trials that die, workers that are killed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipmerge.errors import TrainingError
from clipmerge.finetuning.sweep import SOUPS, Range, Space, draw, finetune_sweep, load_space, options

SMALL = Space(
    {"lr": Range(1e-4, 1e-2, log=True), "seed": Range(0, 3, whole=True)}, {"method": "flyp", "steps": 2}
)


def test_the_soups_space_is_the_papers() -> None:
    draws = [draw(SOUPS, 0, slot) for slot in range(400)]
    lrs = np.array([d["lr"] for d in draws])
    assert 1e-6 <= lrs.min() < 1.2e-6
    assert 8e-5 < lrs.max() <= 1e-4
    assert abs(np.log10(lrs).mean() + 5) < 0.06
    assert 1e-4 <= min(d["wd"] for d in draws) < max(d["wd"] for d in draws) <= 10**-0.2
    assert {d["epochs"] for d in draws} == set(range(4, 17))
    assert {d["randaugment_m"] for d in draws} == set(range(21))
    assert {d["randaugment_n"] for d in draws} == {0, 1, 2}
    for name, high in (("mixup", 0.9), ("label_smoothing", 0.25)):
        values = np.array([d[name] for d in draws])
        assert 0.4 < (values == 0).mean() < 0.6
        assert values.max() <= high


def test_a_draw_depends_on_seed_and_number_alone() -> None:
    assert draw(SOUPS, 3, 7) == draw(SOUPS, 3, 7)
    assert draw(SOUPS, 3, 7) != draw(SOUPS, 3, 8)


def test_randaugments_two_numbers_become_one_augmentation() -> None:
    assert options(SOUPS, {"randaugment_m": 9, "randaugment_n": 2})["augment"] == "crop+randaugment:2,9"
    assert options(SOUPS, {"randaugment_m": 9, "randaugment_n": 0})["augment"] == "crop"


def test_a_space_in_toml(tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text(
        '[lr]\nlow = 1e-5\nhigh = 1e-3\nlog = true\n[augment]\nchoices = ["none", "crop"]\n[fixed]\nsteps = 3\n'
    )
    assert load_space(path) == Space(
        {"lr": Range(1e-5, 1e-3, log=True), "augment": Range(choices=("none", "crop"))}, {"steps": 3}
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[lr]\nlow = 1\nhigh = 0.5", r"\[lr\] has no values between 1 and 0\.5"),
        ("[lrr]\nlow = 1\nhigh = 2", "lrr is no hyperparameter"),
        ("[lr]\nlowest = 1", r"\[lr\] has unknown keys: lowest"),
        ("[lr", "is not TOML"),
    ],
)
def test_a_space_that_means_nothing(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "space.toml"
    path.write_text(text)
    with pytest.raises(TrainingError, match=said):
        load_space(path)


def sweep(base: Any, train: Any, val: Any, folder: Path, **changed: Any) -> Any:
    settings = {"trials": 3, "space": SMALL, "batch_size": 16, "augment": "none", "save_every": 1, **changed}
    return finetune_sweep(base, train, val, folder, **settings)


def test_every_trial_leaves_a_checkpoint_with_its_hyperparameters(
    base: Any, train: Any, val: Any, tiny_spec: Any, tmp_path: Path
) -> None:
    from clipmerge.weights.weights import load

    done = sweep(base, train, val, tmp_path, model=tiny_spec)
    assert sorted(t.file.name for t in done) == [f"trial-000{i}.safetensors" for i in range(3)]
    assert [t.score for t in done] == sorted((t.score for t in done), reverse=True)
    for trial in done:
        record = load(trial.file).record
        assert record["training"]["lr"] == trial.settings["lr"] == draw(SMALL, 0, trial.number)["lr"]
        assert record["training"]["scores"]["top1"] == trial.score
        assert record["trial"] == trial.number
    assert sorted(tmp_path.glob("trial-*.safetensors")) == sorted(
        t.file for t in done
    )  # what a soup is made of
    again = sweep(base, train, val, tmp_path, model=tiny_spec, trials=4)
    assert len(again) == 4
    assert {t.number for t in again} == {0, 1, 2, 3}


def test_the_papers_trials_start_from_one_probe(
    base: Any, train: Any, val: Any, tiny_spec: Any, tmp_path: Path
) -> None:
    from clipmerge.weights.weights import load

    space = Space({"lr": Range(1e-12, 1e-11, log=True)}, {"method": "lp-ft", "steps": 1})
    done = sweep(base, train, val, tmp_path, model=tiny_spec, space=space, trials=2)
    probe = load(tmp_path / "probe.safetensors").state_dict()
    for trial in done:
        tuned = load(trial.file).state_dict()
        assert (tuned["classification_head.weight"] - probe["classification_head.weight"]).abs().max() < 1e-6


def test_a_trial_that_dies_is_tried_again(
    base: Any, train: Any, val: Any, tiny_spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipmerge.finetuning import sweep as module

    run, calls = module.finetune, []

    def shaky(*arguments: Any, **keywords: Any) -> Any:
        calls.append(keywords["out"])
        if len(calls) in (1, 3):
            raise RuntimeError("CUDA out of memory")
        return run(*arguments, **keywords)

    monkeypatch.setattr(module, "finetune", shaky)
    done = sweep(base, train, val, tmp_path, model=tiny_spec, trials=2)
    assert {t.number for t in done} == {0, 1}
    assert len(calls) == 4


def test_a_sweep_whose_trials_all_die_says_why(
    base: Any, train: Any, val: Any, tmp_path: Path, tiny_spec: Any
) -> None:
    space = Space({"lr": Range(1e-4, 1e-2, log=True)}, {"steps": 2, "augment": "upside-down"})
    with pytest.raises(
        TrainingError, match="no trial could be finished; the last one: 'upside-down' is no augment"
    ):
        sweep(base, train, val, tmp_path, model=tiny_spec, space=space, trials=1, retries=1)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_worker_that_saw_the_last_trial_go_makes_no_further_one(
    sampler: str,
    base: Any,
    train: Any,
    val: Any,
    tiny_spec: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two looked at once and saw one left (a GPU showed it): Optuna makes a new trial for the one that comes second."""
    from clipmerge.finetuning import sweep as module

    real, looks = module._work_left, iter([True])
    monkeypatch.setattr(module, "_work_left", lambda *given: real(*given) or next(looks, False))
    done = sweep(base, train, val, tmp_path, model=tiny_spec, trials=2, sampler=sampler)
    assert next(looks, None) is None
    assert sorted(t.number for t in done) == [0, 1]
    assert len(list(tmp_path.glob("trial-*.safetensors"))) == 2


def test_a_killed_workers_trial_is_taken_over(
    base: Any, train: Any, val: Any, tiny_spec: Any, tmp_path: Path
) -> None:
    """A worker that was killed leaves a running trial without a heartbeat."""
    import optuna

    from clipmerge.finetuning.sweep import _study

    study, _ = _study(f"sqlite:///{tmp_path / 'sweep.db'}", "random", 0, 2, 1)
    study.enqueue_trial(draw(SMALL, 0, 0), {"slot": 0})
    with pytest.warns(UserWarning, match="Heartbeat"):
        dead = study.ask()
    study._storage._backend.record_heartbeat(dead._trial_id)
    done = sweep(base, train, val, tmp_path, model=tiny_spec, trials=1, heartbeat=1)
    assert [t.number for t in done] == [0]
    states = [t.state for t in optuna.load_study(storage=study._storage, study_name="sweep").trials]
    assert states == [optuna.trial.TrialState.FAIL, optuna.trial.TrialState.COMPLETE]
