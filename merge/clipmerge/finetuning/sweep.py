"""Hyperparameter sweep with Optuna. Workers may join or die; each finished trial leaves a checkpoint."""

import fcntl
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from clipmerge.checkpoint.output import make_folder
from clipmerge.data.split import Split
from clipmerge.distributed import independent
from clipmerge.errors import ClipmergeError, MissingExtraError, TrainingError
from clipmerge.finetuning.finetune import finetune
from clipmerge.finetuning.loop import StoppedBySignalError
from clipmerge.finetuning.settings import METHODS, RECORDED
from clipmerge.text import did_you_mean
from clipmerge.weights.weights import Weights, load

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

__all__ = ["SOUPS", "Range", "Space", "Trial", "draw", "finetune_sweep", "load_space", "options", "table"]

Value: TypeAlias = float | int | str | bool


@dataclass(frozen=True)
class Range:
    """One hyperparameter: low … high (`log`: evenly in the logarithm), or one of `choices`.

    Attributes:
        whole: integers only.
        zero: probability of exactly 0 instead of a draw.
    """

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    zero: float = 0.0
    choices: tuple[Value, ...] = ()

    def draw(self, generator: np.random.Generator) -> Value:
        """Draw a value."""
        position, zero = generator.random(), generator.random() < self.zero
        if self.choices:
            return self.choices[int(position * len(self.choices))]
        if zero:
            return 0.0
        if self.whole:
            return int(self.low + position * (self.high - self.low + 1))
        if self.log:
            return float(np.exp(np.log(self.low) + position * (np.log(self.high) - np.log(self.low))))
        return float(self.low + position * (self.high - self.low))

    def suggest(self, trial: "optuna.Trial", name: str) -> Any:
        """Return the value that Optuna suggests, or that the trial was queued with."""
        if self.choices:
            return trial.suggest_categorical(name, list(self.choices))
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Space:
    """Ranges by hyperparameter, and what is the same in every trial."""

    ranges: Mapping[str, Range]
    fixed: Mapping[str, Any]


SOUPS = Space(
    {
        "lr": Range(1e-6, 1e-4, log=True),
        "wd": Range(1e-4, 10**-0.2, log=True),
        "epochs": Range(4, 16, whole=True),
        "label_smoothing": Range(0.0, 0.25, zero=0.5),
        "mixup": Range(0.0, 0.9, zero=0.5),
        "randaugment_m": Range(0, 20, whole=True),
        "randaugment_n": Range(0, 2, whole=True),
    },
    {"method": "lp-ft"},
)
"""Source: Wortsman et al. 2022, arXiv 2203.05482, the random search behind its 72 models, which start from a probe."""


def load_space(space: str | Path) -> Space:
    """Return "soups", or the space in a TOML file: a table for each hyperparameter, and [fixed] for the others.

        [lr]
        low = 1e-6
        high = 1e-4
        log = true

        [augment]
        choices = ["crop", "crop+randaugment:2,9"]

        [fixed]
        method = "flyp"
        batch_size = 256

    Raises:
        TrainingError: no such file, a name that is no hyperparameter, or a range without values.
    """
    if space == "soups":
        return SOUPS
    path = Path(space)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be read: {error.strerror}", hint="soups, or a TOML file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} is not TOML: {error}", hint="look at the line it names") from error
    fixed = tables.pop("fixed", {})
    known = {*RECORDED, "randaugment_m", "randaugment_n"}
    for name in [*tables, *fixed]:
        if name not in known:
            hint = did_you_mean(name, known, f"known: {', '.join(sorted(known))}")
            raise TrainingError(f"{path}: {name} is no hyperparameter", hint=hint)
    return Space({name: _range(f"{path}: [{name}]", table) for name, table in tables.items()}, fixed)


def _range(where: str, table: Any) -> Range:
    known = [field.name for field in fields(Range)]
    if not isinstance(table, dict) or set(table) - set(known):
        unknown = ", ".join(sorted(set(table) - set(known))) if isinstance(table, dict) else "no keys"
        raise TrainingError(f"{where} has unknown keys: {unknown}", hint=f"allowed: {', '.join(known)}")
    values: dict[str, Any] = {k: tuple(v) if k == "choices" else v for k, v in table.items()}
    found = Range(**values)
    if not found.choices and (found.low > found.high or (found.log and found.low <= 0)):
        hint = "low must not be above high, and with log it must be above 0"
        raise TrainingError(f"{where} has no values between {found.low} and {found.high}", hint=hint)
    return found


def draw(space: Space, seed: int, number: int) -> dict[str, Value]:
    """Return the values of a trial of a random search: the same whichever worker asks."""
    generator = np.random.default_rng([seed, number])
    return {name: one.draw(generator) for name, one in space.ranges.items()}


def options(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return keywords of `finetune`: the drawn values, with RandAugment's two joined into `augment`."""
    keywords = {**space.fixed, **values}
    m, n = keywords.pop("randaugment_m", None), keywords.pop("randaugment_n", None)
    if m is not None and n:
        keywords["augment"] = f"{keywords.get('augment', 'crop')}+randaugment:{n},{m}"
    elif n == 0:
        keywords.setdefault("augment", "crop")
    return keywords


@dataclass(frozen=True)
class Trial:
    """A trial that is done: its place in the sweep, its checkpoint, its held-out accuracy, what was drawn for it."""

    number: int
    file: Path
    score: float
    settings: Mapping[str, Any]


def table(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return rows for a table or JSON: file, held-out accuracy, what was drawn."""
    return [{"file": str(t.file), "held_out": t.score, **t.settings} for t in trials]


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
    heartbeat: int = 30,
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
        heartbeat: seconds; a worker that has not been heard of for two of these is dead.
        on_trial: called with each trial that this worker finished, and how many are finished in all.
        fixed: further arguments of `finetune`, the same in every trial; a [fixed] table of the space wins.

    Raises:
        TrainingError: no trial could be finished; the last reason is named.
    """
    folder = Path(folder)
    make_folder(folder)
    space = space if isinstance(space, Space) else load_space(space)
    method = str({"method": "flyp", **fixed, **space.fixed}["method"])
    if method in METHODS and METHODS[method].head is None:  # no labels to mix
        space = Space({name: r for name, r in space.ranges.items() if name != "mixup"}, space.fixed)

    def after(study: "optuna.Study", trial: "FrozenTrial") -> None:
        if trial.state.name == "FAIL":
            retry(study, trial)
        elif on_trial is not None and trial.state.name == "COMPLETE":
            finished = _finished(study, folder)
            on_trial(next(t for t in finished if t.number == trial.user_attrs["slot"]), len(finished))

    with independent():
        with _one_at_a_time(folder / "sweep.lock"):
            url = storage or f"sqlite:///{folder / 'sweep.db'}"
            study, retry = _study(url, sampler, seed, retries, heartbeat)
            if method == "lp-ft" and fixed.get("head") is None:
                fixed["head"] = _probe(base, train, val, folder / "probe.safetensors", fixed)
            if sampler == "random":
                for slot in range(trials):
                    study.enqueue_trial(draw(space, seed, slot), {"slot": slot}, skip_if_exists=True)
        while _work_left(study, trials, sampler):
            study.optimize(
                lambda trial: _run(trial, trials, base, train, val, folder, space, fixed),
                n_trials=1,
                catch=(_TrialDiedError,),
                callbacks=[after],
            )
    if finished := _finished(study, folder):
        return finished
    reasons = [t.user_attrs["error"] for t in study.get_trials(deepcopy=False) if "error" in t.user_attrs]
    raise TrainingError(
        "no trial could be finished" + (f"; the last one: {reasons[-1]}" if reasons else ""),
        hint="try one finetuning with clipmerge finetune first",
    )


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Hold a lock while tables, the probe and the queue are made.

    Workers that start together would each make them, and replace a probe that the other's trials are reading.
    """
    with path.open("w") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _TrialDiedError(Exception):
    """A trial that died; Optuna notes it and goes on."""


def _run(
    trial: "optuna.Trial",
    trials: int,
    base: Weights | None,
    train: Split,
    val: Split,
    folder: Path,
    space: Space,
    fixed: Mapping[str, Any],
) -> float:
    """Return held-out accuracy of one trial, which goes on from its state, or is read from its file if it is done."""
    import optuna

    earlier = [other for other in trial.study.get_trials(deepcopy=False) if other.number < trial.number]
    taken = {other.user_attrs.get("slot", other.number) for other in earlier}
    if "slot" not in trial.user_attrs and len(taken) >= trials:
        raise optuna.TrialPruned  # two workers saw the last one, the other took it, and Optuna made one more
    slot = int(trial.user_attrs.get("slot", trial.number))
    trial.set_user_attr("slot", slot)
    alive = [s for s in optuna.trial.TrialState if s.name in ("WAITING", "RUNNING", "COMPLETE")]
    there = trial.study.get_trials(deepcopy=False, states=alive)
    if any(other.number < trial.number and other.user_attrs.get("slot") == slot for other in there):
        raise optuna.TrialPruned  # two workers that start together may both fill the queue
    values = {name: one.suggest(trial, name) for name, one in space.ranges.items()}
    out = folder / f"trial-{slot:04d}.safetensors"
    keywords = {"score_every": 0, **fixed, **options(space, values), "metadata": {"trial": slot}}
    resume = out.with_suffix(".state").exists()
    try:
        done = (
            load(out) if out.exists() else finetune(base, train, val=val, out=out, resume=resume, **keywords)
        )
    except StoppedBySignalError:
        trial.study.enqueue_trial(trial.params, {"slot": slot})  # nothing is wrong with it: no try is counted
        raise
    except (ClipmergeError, RuntimeError, OSError) as error:
        trial.set_user_attr("error", str(error))
        raise _TrialDiedError from error
    trial.set_user_attr("file", out.name)
    return float(done.record["training"]["scores"]["top1"])


def _probe(base: Weights | None, train: Split, val: Split, out: Path, fixed: Mapping[str, Any]) -> Weights:
    """Return the head that every trial starts from: probed once, a checkpoint of its own in the folder."""
    if out.exists():
        return load(out)
    names = ("model", "templates", "batch_size", "device", "precision", "workers")
    keywords = {name: fixed[name] for name in names if name in fixed}
    return finetune(base, train, val=val, out=out, method="linear-probe", force=True, **keywords)


def _study(
    url: str, sampler: str, seed: int, retries: int, heartbeat: int
) -> "tuple[optuna.Study, Callable[[optuna.Study, FrozenTrial], None]]":
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
    chosen = samplers[sampler](seed=seed)
    study = optuna.create_study(
        storage=storage, study_name="sweep", direction="maximize", load_if_exists=True, sampler=chosen
    )
    return study, retry


def _work_left(study: "optuna.Study", trials: int, sampler: str) -> bool:
    """Return whether there is a trial to start now; wait for those of other workers, which may die."""
    import optuna

    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)
        there = study.get_trials(deepcopy=False)
        states = {trial.state.name for trial in there}
        slots = {trial.user_attrs.get("slot", trial.number) for trial in there}
        if "WAITING" in states or (sampler != "random" and len(slots) < trials):
            return True
        if "RUNNING" not in states:
            return False
        time.sleep(1)


def _finished(study: "optuna.Study", folder: Path) -> list[Trial]:
    rows = [
        Trial(t.user_attrs["slot"], folder / t.user_attrs["file"], float(t.value or 0), dict(t.params))
        for t in study.get_trials(deepcopy=False)
        if t.state.name == "COMPLETE"
    ]
    return sorted(rows, key=lambda row: (-row.score, row.number))
