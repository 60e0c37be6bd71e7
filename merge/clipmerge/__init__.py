"""clipmerge: merge finetuned CLIP checkpoints into one better model, chosen on held-out images.

Importing this package imports neither torch nor open_clip: each public name is fetched when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipmerge.weights.expression import Weights, from_state_dict, interpolate, load, mean

__version__ = "0.1.0"

_HOME = {
    "Evaluator": "clipmerge.evaluate.evaluator",
    "Weights": "clipmerge.weights.expression",
    "finetune": "clipmerge.finetuning.methods",
    "from_state_dict": "clipmerge.weights.expression",
    "greedy_soup": "clipmerge.search.soup",
    "interpolate": "clipmerge.weights.expression",
    "load": "clipmerge.weights.expression",
    "mean": "clipmerge.weights.expression",
    "open_split": "clipmerge.data.split",
    "patch": "clipmerge.search.patch",
    "sweep": "clipmerge.search.sweep",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'clipmerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
