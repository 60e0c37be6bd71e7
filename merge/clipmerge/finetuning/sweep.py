"""Hyperparameter sweep with Optuna. Workers may join or die; each finished trial leaves a checkpoint."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipmerge.data.split import Split
from clipmerge.distributed import independent
from clipmerge.errors import ClipmergeError, MissingExtraError, TrainingError
from clipmerge.finetuning.finetune import finetune
from clipmerge.finetuning.loop import StoppedBySignalError
from clipmerge.finetuning.space import Range, Space, draw, load_space, options
from clipmerge.finetuning.table import METHODS
from clipmerge.weights.weights import Weights, load

if TYPE_CHECKING:
    from optuna import Study
    from optuna import Trial as Asked
    from optuna.trial import FrozenTrial

__all__ = ["Trial", "finetune_sweep", "table"]

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


def finetune_sweep(
    base: Weights | None,
    train: Split,
    val: Split,
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
    """Return every finished trial of the sweep in `folder`, best held-out accuracy first.

    Any number of workers may call it at once with the same storage: each takes trials until none is left, waits for
    the others, and takes over what a dead worker left (from its saved state). Called again, it goes on. torchrun's
    processes are such workers, each on its own GPU.

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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    space = space if isinstance(space, Space) else load_space(space)
    method = str({"method": "flyp", **fixed, **space.fixed}["method"])
    if method in METHODS and METHODS[method].head is None:  # no labels to mix
        space = Space({name: r for name, r in space.ranges.items() if name != "mixup"}, space.fixed)
    with independent():
        study, retry = _study(
            storage or f"sqlite:///{folder / 'sweep.db'}", sampler, seed, retries, heartbeat
        )
        if method == "lp-ft" and fixed.get("head") is None:
            fixed["head"] = _probe(base, train, val, folder / "probe.safetensors", fixed)
        if sampler == "random":
            for number in range(trials):
                study.enqueue_trial(draw(space, seed, number), {"slot": number}, skip_if_exists=True)

        def run(trial: "Asked") -> float:
            return _run(trial, base, train, val, folder, space, fixed)

        def after(study: "Study", trial: "FrozenTrial") -> None:
            if trial.state.name == "FAIL":
                retry(study, trial)
            elif on_trial is not None and trial.state.name == "COMPLETE":
                on_trial(_done(trial, folder), len(_finished(study, folder)))

        while _work_left(study, trials, sampler):
            study.optimize(run, n_trials=1, catch=(_TrialDiedError,), callbacks=[after])
    finished = _finished(study, folder)
    if not finished:
        reasons = [t.user_attrs["error"] for t in study.get_trials(deepcopy=False) if "error" in t.user_attrs]
        raise TrainingError(
            "no trial could be finished" + (f"; the last one: {reasons[-1]}" if reasons else ""),
            hint="try one finetuning with clipmerge finetune first",
        )
    return finished


class _TrialDiedError(Exception):
    """A trial that died; Optuna notes it and goes on."""


def _run(
    trial: "Asked",
    base: Weights | None,
    train: Split,
    val: Split,
    folder: Path,
    space: Space,
    fixed: Mapping[str, Any],
) -> float:
    """Return held-out accuracy of one trial, which goes on from its state, or is read from its file if it is done."""
    import optuna

    slot = int(trial.user_attrs.get("slot", trial.number))
    trial.set_user_attr("slot", slot)
    if _runs_elsewhere(trial, slot):
        raise optuna.TrialPruned
    values = {name: _suggest(trial, name, one) for name, one in space.ranges.items()}
    out = folder / f"trial-{slot:04d}.safetensors"
    keywords = {"score_every": 0, **fixed, **options(space, values)}
    resume = out.with_suffix(".state").exists()
    try:
        if out.exists():
            weights = load(out)
        else:
            weights = finetune(
                base, train, val=val, out=out, resume=resume, metadata={"trial": slot}, **keywords
            )
    except StoppedBySignalError:
        trial.study.enqueue_trial(trial.params, {"slot": slot})  # nothing is wrong with it: no try is counted
        raise
    except (ClipmergeError, RuntimeError, OSError) as error:
        trial.set_user_attr("error", str(error))
        raise _TrialDiedError from error
    trial.set_user_attr("file", out.name)
    return float(weights.record["training"]["scores"]["top1"])


def _runs_elsewhere(trial: "Asked", slot: int) -> bool:
    """Return whether an earlier trial is this one too: two workers that start together may both fill the queue."""
    from optuna.trial import TrialState

    alive = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)
    earlier = (t for t in trial.study.get_trials(deepcopy=False, states=alive) if t.number < trial.number)
    return any(t.user_attrs.get("slot") == slot for t in earlier)


def _suggest(trial: "Asked", name: str, one: Range) -> Any:
    if one.choices:
        return trial.suggest_categorical(name, list(one.choices))
    if one.whole:
        return trial.suggest_int(name, int(one.low), int(one.high), log=one.log)
    return trial.suggest_float(name, one.low, one.high, log=one.log)


def _probe(base: Weights | None, train: Split, val: Split, out: Path, fixed: Mapping[str, Any]) -> Weights:
    """Return the head that every trial starts from: probed once, a checkpoint of its own in the folder."""
    if out.exists():
        return load(out)
    names = ("model", "templates", "batch_size", "device", "precision", "workers")
    keywords = {name: fixed[name] for name in names if name in fixed}
    return finetune(base, train, val=val, out=out, method="linear-probe", force=True, **keywords)


def _study(
    url: str, sampler: str, seed: int, retries: int, heartbeat: int
) -> "tuple[Study, Callable[[Study, FrozenTrial], None]]":
    """Return the study, and what queues a failed trial again until it has had its retries."""
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("optuna", extra="sweep", what="a hyperparameter sweep") from error

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
    if sampler not in samplers:
        raise TrainingError(f"{sampler!r} is no sampler", hint="random or tpe")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        retry = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=retries)
        storage = optuna.storages.RDBStorage(
            url, heartbeat_interval=heartbeat, heartbeat_stale_trial_callback=retry
        )
    study = optuna.create_study(
        storage=storage,
        study_name="sweep",
        direction="maximize",
        load_if_exists=True,
        sampler=samplers[sampler](seed=seed),
    )
    return study, retry


def _work_left(study: "Study", trials: int, sampler: str) -> bool:
    """Return whether there is a trial to start now; wait for those of other workers, which may die."""
    from optuna.exceptions import ExperimentalWarning
    from optuna.storages import fail_stale_trials

    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            fail_stale_trials(study)
        there = study.get_trials(deepcopy=False)
        states = {trial.state.name for trial in there}
        slots = {trial.user_attrs.get("slot", trial.number) for trial in there}
        if "WAITING" in states or (sampler != "random" and len(slots) < trials):
            return True
        if "RUNNING" not in states:
            return False
        time.sleep(1)


def _finished(study: "Study", folder: Path) -> list[Trial]:
    there = study.get_trials(deepcopy=False)
    rows = [_done(trial, folder) for trial in there if trial.state.name == "COMPLETE"]
    return sorted(rows, key=lambda row: (-row.score, row.number))


def _done(trial: "FrozenTrial", folder: Path) -> Trial:
    score = float(trial.value or 0.0)
    return Trial(trial.user_attrs["slot"], folder / trial.user_attrs["file"], score, dict(trial.params))


def table(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return rows for a table or JSON: file, held-out accuracy, what was drawn."""
    return [{"file": str(t.file), "held_out": t.score, **t.settings} for t in trials]
