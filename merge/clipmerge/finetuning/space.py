"""Search spaces over hyperparameters: the model-soups paper's, or one read from TOML."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipmerge.errors import TrainingError

__all__ = ["Range", "Space", "load_space"]

Value = float | int | str | bool


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
    """ "soups", or a TOML file: a table for each hyperparameter of `finetune`, and [fixed] for the others.

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
        TrainingError: no such file, or a range that means nothing.
    """
    if str(space) == "soups":
        return SOUPS
    path = Path(space)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(
            f"the space {space} cannot be read: {error.strerror}", hint="name a TOML file, or soups"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise TrainingError(f"{space} is not TOML: {error}") from error
    fixed = tables.pop("fixed", {})
    ranges = {name: _range(path, name, table) for name, table in tables.items()}
    _refuse_unknown(path, {*ranges, *fixed})
    return Space(ranges, fixed)


def _range(path: Path, name: str, table: Any) -> Range:
    hint = "give low and high (and log, whole, zero), or choices"
    if not isinstance(table, dict):
        raise TrainingError(f"{path}: {name} is no table", hint=hint)
    try:
        given: dict[str, Any] = {k: tuple(v) if k == "choices" else v for k, v in table.items()}
        found = Range(**given)
    except TypeError as error:
        raise TrainingError(f"{path}: [{name}] has {', '.join(table)}", hint=hint) from error
    if not found.choices and (found.low > found.high or (found.log and found.low <= 0)):
        raise TrainingError(f"{path}: [{name}] has no values between {found.low} and {found.high}", hint=hint)
    return found


def _refuse_unknown(path: Path, names: set[str]) -> None:
    from clipmerge.finetuning.methods import RECORDED

    unknown = sorted(names - RECORDED - {"randaugment_m", "randaugment_n"})
    if unknown:
        raise TrainingError(
            f"{path}: {', '.join(unknown)} is no hyperparameter", hint=f"known: {', '.join(sorted(RECORDED))}"
        )


def draw(space: Space, seed: int, slot: int) -> dict[str, Value]:
    """The values of trial `slot` of a random search: the same whichever worker asks."""
    generator = np.random.default_rng([seed, slot])
    return {name: _drawn(found, generator) for name, found in space.ranges.items()}


def _drawn(found: Range, generator: np.random.Generator) -> Value:
    position, zero = generator.random(), generator.random() < found.zero
    if found.choices:
        return found.choices[int(position * len(found.choices))]
    if zero:
        return 0.0
    if found.whole:
        return int(found.low + position * (found.high - found.low + 1))
    if found.log:
        return float(np.exp(np.log(found.low) + position * (np.log(found.high) - np.log(found.low))))
    return float(found.low + position * (found.high - found.low))


def options(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `finetune`: the drawn values with RandAugment's two joined into `augment`."""
    found = {**space.fixed, **values}
    m, n = found.pop("randaugment_m", None), found.pop("randaugment_n", None)
    if m is not None and n is not None:
        base = found.get("augment", "crop")
        found["augment"] = f"{base}+randaugment:{n},{m}" if n else base
    return found
