"""Search spaces over hyperparameters: the model-soups paper's, or one read from TOML."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from clipmerge.errors import TrainingError
from clipmerge.finetuning.settings import RECORDED
from clipmerge.text import did_you_mean

if TYPE_CHECKING:
    import optuna

__all__ = ["SOUPS", "Range", "Space", "draw", "load_space", "options"]

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
