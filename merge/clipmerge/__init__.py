"""clipmerge: merge finetuned CLIP checkpoints into one better model, chosen on held-out images.

Importing this package imports neither torch nor open_clip: each public name is fetched when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipmerge.data.split import open_split as open_split
    from clipmerge.evaluate.evaluator import Evaluator as Evaluator
    from clipmerge.finetuning.methods import finetune as finetune
    from clipmerge.search.patch import patch as patch
    from clipmerge.search.soup import greedy_soup as greedy_soup
    from clipmerge.search.sweep import sweep as sweep
    from clipmerge.weights.expression import Weights as Weights
    from clipmerge.weights.expression import from_state_dict as from_state_dict
    from clipmerge.weights.expression import interpolate as interpolate
    from clipmerge.weights.expression import load as load
    from clipmerge.weights.expression import mean as mean

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

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'clipmerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
