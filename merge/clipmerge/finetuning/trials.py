"""Many finetunings over a search space: Optuna keeps the books, workers come and go, trials leave checkpoints."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipmerge.errors import ClipmergeError, MissingExtraError, TrainingError
from clipmerge.finetuning.resume import StoppedBySignalError
from clipmerge.finetuning.space import Range, Space, draw, load_space, options

if TYPE_CHECKING:
    from clipmerge.data.split import Split
    from clipmerge.weights.weights import Weights

__all__ = ["Trial", "finetune_sweep"]

HEARTBEAT = 30
"""Seconds: a worker that has not been heard of for two of these is dead, and its trial is taken over."""


@dataclass(frozen=True)
class Trial:
    """A trial that is done.

    Attributes:
        number: its place in the sweep; the file is trial-NNNN.safetensors.
        score: held-out accuracy.
        settings: what was drawn for it.
    """

    number: int
    file: Path
    score: float
    settings: Mapping[str, Any]


class _TrialDiedError(Exception):
    """A trial that died; Optuna notes it and goes on."""


def finetune_sweep(
    base: "Weights | None",
    train: "Split",
    val: "Split",
    folder: str | Path,
    *,
    trials: int,
    space: str | Path | Space = "soups",
    storage: str | None = None,
    sampler: str = "random",
    seed: int = 0,
    retries: int = 2,
    heartbeat: int = HEARTBEAT,
    on_trial: Callable[[Trial, int], None] | None = None,
    **fixed: Any,
) -> list[Trial]:
    """Every finished trial of the sweep in `folder`, best held-out accuracy first.

    Any number of workers may call it at once with the same storage: each takes trials until none is left, waits for
    the others, and takes over what a dead worker left (from its saved state). Called again, it goes on.

    Args:
        space: "soups", a TOML file, or a Space.
        storage: Optuna's storage URL; by default SQLite in `folder`.
        sampler: "random" draws trial n from (seed, n), whoever runs it; "tpe" learns from finished trials.
        retries: how often a trial that dies is tried again.
        on_trial: called with each trial that this worker finished, and how many are finished in all.
        fixed: further arguments of `finetune`, the same in every trial; a [fixed] table of the space wins.

    Raises:
        TrainingError: no trial could be finished; the last reason is named.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("optuna", extra="sweep", what="a hyperparameter sweep") from error

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = space if isinstance(space, Space) else load_space(space)
    found = _fitting(found, fixed)
    if {**fixed, **found.fixed}.get("method") == "lp-ft" and fixed.get("head") is None:
        fixed["head"] = _probe(base, train, val, folder / "probe.safetensors", fixed)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = _study(storage or f"sqlite:///{folder / 'sweep.db'}", sampler, seed, retries, heartbeat)
    if sampler == "random":
        _queue(study, found, seed, trials)

    def objective(trial: Any) -> float:
        slot = int(trial.user_attrs.get("slot", trial.number))
        trial.set_user_attr("slot", slot)
        if _queued_twice(study, trial.number, slot):
            raise optuna.TrialPruned
        values = {name: _suggested(trial, name, r) for name, r in found.ranges.items()}
        out = folder / f"trial-{slot:04d}.safetensors"
        try:
            score = _run(base, train, val, out, {"score_every": 0, **fixed, **options(found, values)}, slot)
        except StoppedBySignalError:
            _again(study, trial, tries=trial.user_attrs.get("tries", 0))
            raise
        except (ClipmergeError, RuntimeError, OSError) as error:
            trial.set_user_attr("error", str(error))
            if trial.user_attrs.get("tries", 0) < retries:
                _again(study, trial, tries=trial.user_attrs.get("tries", 0) + 1)
            raise _TrialDiedError from error
        trial.set_user_attr("file", out.name)
        if on_trial is not None:
            on_trial(Trial(slot, out, score, values), len(_finished(study, folder)) + 1)
        return score

    while _work_left(study, trials, sampler):
        study.optimize(objective, n_trials=1, catch=(_TrialDiedError,))
    done = _finished(study, folder)
    if not done:
        reasons = [t.user_attrs["error"] for t in study.get_trials(deepcopy=False) if "error" in t.user_attrs]
        raise TrainingError(
            "no trial could be finished" + (f"; the last one: {reasons[-1]}" if reasons else ""),
            hint="try one finetuning with clipmerge finetune first",
        )
    return done


def _probe(
    base: "Weights | None", train: "Split", val: "Split", out: Path, fixed: Mapping[str, Any]
) -> "Weights":
    """The head that every trial starts from: probed once, a checkpoint of its own in the folder."""
    from clipmerge.finetuning.methods import finetune
    from clipmerge.weights.weights import load

    if out.exists():
        return load(out)
    names = ("model", "templates", "batch_size", "device", "precision", "workers")
    options = {name: fixed[name] for name in names if name in fixed}
    return finetune(base, train, val=val, out=out, method="linear-probe", force=True, **options)


def _fitting(space: Space, fixed: Mapping[str, Any]) -> Space:
    """The space without mixup where the method has no labels to mix."""
    from clipmerge.finetuning.methods import METHODS

    method = METHODS.get(str({**fixed, **space.fixed}.get("method", "flyp")))
    if method is not None and method.head is None:
        return Space({k: r for k, r in space.ranges.items() if k != "mixup"}, space.fixed)
    return space


def _study(url: str, sampler: str, seed: int, retries: int, heartbeat: int) -> Any:
    import optuna

    def took_over(study: Any, trial: Any) -> None:
        if trial.user_attrs.get("tries", 0) < retries:
            _again(study, trial, tries=trial.user_attrs.get("tries", 0) + 1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = optuna.storages.RDBStorage(
            url, heartbeat_interval=heartbeat, heartbeat_stale_trial_callback=took_over
        )
    kinds = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
    if sampler not in kinds:
        raise TrainingError(f"{sampler!r} is no sampler", hint="random or tpe")
    return optuna.create_study(
        storage=storage,
        study_name="sweep",
        direction="maximize",
        load_if_exists=True,
        sampler=kinds[sampler](seed=seed),
    )


def _queue(study: Any, space: Space, seed: int, trials: int) -> None:
    """Put every draw of a random search that is not there yet into the queue."""
    there = {t.user_attrs.get("slot") for t in study.get_trials(deepcopy=False)}
    for slot in range(trials):
        if slot not in there:
            study.enqueue_trial(draw(space, seed, slot), user_attrs={"slot": slot}, skip_if_exists=True)


def _queued_twice(study: Any, number: int, slot: int) -> bool:
    """Whether an earlier trial is this one too: two workers that start together both fill the queue."""
    from optuna.trial import TrialState

    alive = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)
    earlier = (t for t in study.get_trials(deepcopy=False, states=alive) if t.number < number)
    return any(t.user_attrs.get("slot") == slot for t in earlier)


def _suggested(trial: Any, name: str, found: Range) -> Any:
    if found.choices:
        return trial.suggest_categorical(name, list(found.choices))
    if found.whole:
        return trial.suggest_int(name, int(found.low), int(found.high), log=found.log)
    return trial.suggest_float(name, found.low, found.high, log=found.log)


def _run(
    base: "Weights | None", train: "Split", val: "Split", out: Path, settings: Mapping[str, Any], slot: int
) -> float:
    """Held-out accuracy of one trial, which goes on from its state, or is read from its file if it is done."""
    from clipmerge.finetuning.methods import finetune
    from clipmerge.weights.weights import load

    if out.exists():
        weights = load(out)
    else:
        state = out.with_suffix(".state")
        weights = finetune(
            base, train, val=val, out=out, resume=state.exists(), metadata={"trial": slot}, **settings
        )
    return float(weights.record["training"]["scores"]["top1"])


def _again(study: Any, trial: Any, *, tries: int) -> None:
    slot = trial.user_attrs.get("slot", trial.number)
    study.enqueue_trial(trial.params, user_attrs={"slot": slot, "tries": tries})


def _work_left(study: Any, trials: int, sampler: str) -> bool:
    """Whether there is a trial to start now; waits for those of other workers, which may die."""
    from optuna.exceptions import ExperimentalWarning
    from optuna.storages import fail_stale_trials
    from optuna.trial import TrialState

    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            fail_stale_trials(study)
        states = [t.state for t in study.get_trials(deepcopy=False)]
        slots = {t.user_attrs.get("slot", t.number) for t in study.get_trials(deepcopy=False)}
        if TrialState.WAITING in states or (sampler != "random" and len(slots) < trials):
            return True
        if TrialState.RUNNING not in states:
            return False
        time.sleep(1)


def _finished(study: Any, folder: Path) -> list[Trial]:
    from optuna.trial import TrialState

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    rows = [
        Trial(t.user_attrs["slot"], folder / t.user_attrs["file"], float(t.value), dict(t.params))
        for t in done
    ]
    return sorted(rows, key=lambda row: (-row.score, row.number))


def table(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Rows for a table or JSON: file, held-out accuracy, what was drawn."""
    return [{"file": str(t.file), "held_out": t.score, **t.settings} for t in trials]
