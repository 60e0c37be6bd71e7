"""A merge as a file: TOML with an expression, its checkpoints, and how to write the result.

expression = "base + 0.4*(cars - base)"
output = "merged.safetensors"       # all but expression and checkpoints may be left out
base = "base"                       # what adapters among the checkpoints were trained from
dtype = "fp16"
shard_size = "5GB"

[checkpoints]                       # relative to this file
base = "base.safetensors"
cars = "cars.safetensors"
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from keyword import iskeyword
from pathlib import Path
from typing import Any

from clipmerge.errors import RecipeError
from clipmerge.text import did_you_mean
from clipmerge.weights.expression import OptionValue
from clipmerge.weights.parse import parse
from clipmerge.weights.positions import resize_positions
from clipmerge.weights.weights import Weights, load, load_each, placed

_KEYS = {
    "expression": str, "checkpoints": dict, "base": str, "dtype": str, "shard_size": str, "output": str,
}  # fmt: skip
_REMOTE = re.compile(r"hf-hub:.+|[\w.-]{2,}:[\w.-]+")
_UNITS = {
    "": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
}  # fmt: skip
MAX_SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a recipe file says; paths are already relative to the working folder, not to the file."""

    expression: str
    checkpoints: Mapping[str, str]
    dtype: str | None = None
    shard_size: int | None = None
    output: Path | None = None
    base: str | None = None
    resize_positions: bool = False

    def weights(self, **options: OptionValue) -> Weights:
        """The expression over its checkpoints (headers are read); options go to every method that has them."""
        names = load_named(self.checkpoints, self.base, resize=self.resize_positions)
        return parse(self.expression, names, options=options)


def load_named(
    files: Mapping[str, str | Path], base: str | None = None, *, resize: bool = False
) -> dict[str, Weights]:
    """`load` for each file, under its name in the expression.

    Args:
        base: what adapters were trained from: one of the names, or another file.
        resize: bring positional embeddings to the first one's grid.

    Raises:
        RecipeError: a name that no expression can contain.
    """
    for name in files:
        if not name.isidentifier() or iskeyword(name):
            raise RecipeError(f"{name!r} is not a name", hint="letters, digits and _, such as base or ft_2")
    leaves = dict(zip(files, load_each([(file, name) for name, file in files.items()]), strict=True))
    if resize:
        first = next(iter(leaves.values()))
        leaves = {name: resize_positions(leaf, first) for name, leaf in leaves.items()}
    start = leaves[base] if base in leaves else base and load(base)
    return {name: placed(leaf, None if leaf is start else start or None) for name, leaf in leaves.items()}


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a TOML file.

    Raises:
        RecipeError: unreadable, not TOML, an unknown key (the nearest known one is named), or a missing one.
    """
    path = Path(path)
    document = _document(path)
    for key, value in document.items():
        if key not in _KEYS:
            hint = did_you_mean(key, _KEYS, f"known: {', '.join(_KEYS)}")
            raise RecipeError(f"{path} has the unknown key {key!r}", hint=hint)
        if not isinstance(value, _KEYS[key]):
            wanted = "a table of files" if _KEYS[key] is dict else "text in quotes"
            raise RecipeError(f"{key!r} in {path} must be {wanted}, not {value!r}")
    if "expression" not in document:
        raise RecipeError(f"{path} has no expression", hint='expression = "base + 0.4*(a - base)"')
    checkpoints = {}
    for name, file in document.get("checkpoints", {}).items():
        if not isinstance(file, str):
            raise RecipeError(f"checkpoints.{name} in {path} must be a path in quotes, not {file!r}")
        checkpoints[name] = _located(path, file)
    base = document.get("base")
    output, size = document.get("output"), document.get("shard_size")
    return Recipe(
        expression=document["expression"],
        checkpoints=checkpoints,
        dtype=document.get("dtype"),
        shard_size=None if size is None else parse_size(size),
        output=None if output is None else path.parent / Path(output).expanduser(),
        base=base if base is None or base in checkpoints else _located(path, base),
    )


def _located(recipe: Path, file: str) -> str:
    """A file that a recipe names, relative to the recipe; a published checkpoint as it is named."""
    local = recipe.parent / Path(file).expanduser()
    return file if _REMOTE.fullmatch(file) and not local.exists() else str(local)


def parse_size(text: str) -> int:
    """`"5GB"` → 5 000 000 000; plain numbers are bytes, KiB, MiB and GiB count in 1024s.

    Raises:
        RecipeError: not a positive size.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match.group(2).upper()) if match else None
    size = int(float(match.group(1)) * unit) if match and unit else 0
    if size < 1:
        raise RecipeError(f"{text!r} is not a size", hint="a number and a unit, such as 5GB or 500MB")
    return size


def _document(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_SIZE + 1)
        if len(content) > MAX_SIZE:
            raise RecipeError(f"{path} is larger than a recipe can be ({MAX_SIZE:,} bytes)")
        return tomllib.loads(content.decode())
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}", hint="check the path") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not TOML: {error}", hint="see `clipmerge merge --help`") from error
