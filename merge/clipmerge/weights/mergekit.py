"""Read mergekit's YAML, for its methods that we have and mean the same; for others say how to write it as ours."""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from clipmerge.checkpoint.tensors import identifiers
from clipmerge.errors import RecipeError
from clipmerge.weights.coefficient import exact
from clipmerge.weights.recipe import load_named
from clipmerge.weights.weights import Weights

__all__ = ["read_mergekit"]

_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_KEYS = {"merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "name"}
_HINT = """write it as an expression, such as
  clipmerge merge "base + 0.4*ties([a - base, b - base])" base=FILE a=FILE b=FILE -o FILE"""


def read_mergekit(path: Path) -> tuple[Weights, str | None]:
    """Return the merge that a mergekit configuration describes, and its dtype; paths are relative to the file.

    linear, task_arithmetic, slerp, model_stock, and ties with one weight and density for all.

    Raises:
        RecipeError: not such a file, or something in it that we do not have.
    """
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read as YAML: {error}", hint="check the path") from error
    if not isinstance(document, Mapping) or "merge_method" not in document:
        raise RecipeError(f"{path} is no mergekit configuration: it has no merge_method", hint=_HINT)
    method, more = str(document["merge_method"]), sorted(document.keys() - _KEYS)
    if more:
        raise RecipeError(f"{path}: {', '.join(map(str, more))} of mergekit cannot be read here", hint=_HINT)
    entries = [dict(entry) for entry in document.get("models", ())]
    shared = dict(document.get("parameters") or {})
    base_file = document.get("base_model")
    others = [entry for entry in entries if entry["model"] != base_file]
    files = [str(entry["model"]) for entry in others] + ([str(base_file)] if base_file else [])
    local = [str(path.parent / file) if (path.parent / file).exists() else file for file in files]
    names = identifiers([Path(file).stem for file in files])
    opened = list(load_named(dict(zip(names, local, strict=True))).values())
    base = opened.pop() if base_file else None

    def numbers(key: str, default: float | None = None) -> list[Fraction]:
        values: list[Any] = [
            {**shared, **(entry.get("parameters") or {})}.get(key, default) for entry in others
        ]
        if not all(isinstance(value, int | float) for value in values):
            raise RecipeError(f"{path}: {key} must be one number for each model", hint=_HINT)
        return [exact(value) for value in values]

    weights = _merged(method, path, base, opened, shared, numbers)
    dtype = document.get("out_dtype", document.get("dtype"))
    return weights, None if dtype is None else _DTYPES.get(str(dtype), str(dtype))


def _merged(
    method: str,
    path: Path,
    base: Weights | None,
    models: Sequence[Weights],
    shared: Mapping[str, Any],
    numbers: Callable[..., list[Fraction]],
) -> Weights:
    from clipmerge.weights import weights as ours

    if method == "linear":
        shares = numbers("weight")
        whole = sum(shares) if shared.get("normalize", True) else Fraction(1)
        terms = [model * (share / whole) for model, share in zip(models, shares, strict=True)]
        return sum(terms[1:], terms[0])
    if base is None:
        raise RecipeError(f"{path}: {method} needs a base_model", hint=_HINT)
    scale = exact(shared.get("lambda", 1))
    if method == "task_arithmetic" and not shared.get("normalize", False):
        pairs = zip(models, numbers("weight"), strict=True)
        return sum(((model - base) * (share * scale) for model, share in pairs), base)
    if method == "slerp" and len(models) == 1:
        (t,) = numbers("t")
        return ours.slerp(base, models[0], float(t))
    if method == "model_stock":
        return ours.model_stock([base, *models])
    if method == "ties" and shared.get("normalize", True):
        kinds, densities = set(numbers("weight", 1.0)), set(numbers("density", 1.0))
        if len(kinds) == len(densities) == 1:
            vectors = [model - base for model in models]
            return base + ours.ties(vectors, density=float(densities.pop())) * scale
    raise RecipeError(f"{path}: {method} with these parameters is not mergekit's and ours alike", hint=_HINT)
