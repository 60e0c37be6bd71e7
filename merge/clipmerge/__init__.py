"""clipmerge: merge finetuned CLIP checkpoints into one better model, chosen on held-out images.

Importing this package imports neither torch nor open_clip: each public name is fetched when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clipmerge.version import __version__  # noqa: F401

if TYPE_CHECKING:
    from clipmerge.data.open import open_split as open_split
    from clipmerge.evaluate.evaluator import Evaluator as Evaluator
    from clipmerge.finetuning.finetune import finetune as finetune
    from clipmerge.search.patch import patch as patch
    from clipmerge.search.soup import greedy_soup as greedy_soup
    from clipmerge.search.sweep import sweep as sweep
    from clipmerge.weights.weights import Weights as Weights
    from clipmerge.weights.weights import from_state_dict as from_state_dict
    from clipmerge.weights.weights import interpolate as interpolate
    from clipmerge.weights.weights import load as load
    from clipmerge.weights.weights import mean as mean


_HOME = {
    "Evaluator": "clipmerge.evaluate.evaluator",
    "Weights": "clipmerge.weights.weights",
    "finetune": "clipmerge.finetuning.finetune",
    "from_state_dict": "clipmerge.weights.weights",
    "greedy_soup": "clipmerge.search.soup",
    "interpolate": "clipmerge.weights.weights",
    "load": "clipmerge.weights.weights",
    "mean": "clipmerge.weights.weights",
    "open_split": "clipmerge.data.open",
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
