"""clipmerge: merge finetuned CLIP checkpoints into one better model, chosen on held-out images.

Importing this package imports neither torch nor open_clip: each public name is fetched when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clipmerge.version import __version__  # noqa: F401

if TYPE_CHECKING:
    from clipmerge.data.open import open_split as open_split
    from clipmerge.errors import ClipmergeError as ClipmergeError
    from clipmerge.evaluate.evaluator import Evaluator as Evaluator
    from clipmerge.evaluate.evaluator import score as score
    from clipmerge.evaluate.recalibrate import recalibrate as recalibrate
    from clipmerge.evaluate.regmean_plus import statistics_together as statistics_together
    from clipmerge.evaluate.score import Score as Score
    from clipmerge.evaluate.statistics import statistics as statistics
    from clipmerge.evaluate.verify import verify as verify
    from clipmerge.evaluate.zero_shot import with_zero_shot_head as with_zero_shot_head
    from clipmerge.figures.draw import plot as plot
    from clipmerge.finetuning.finetune import finetune as finetune
    from clipmerge.model import build_model as build_model
    from clipmerge.model import resolve_model as resolve_model
    from clipmerge.progress import progress_bar as progress_bar
    from clipmerge.report.page import report_page as report_page
    from clipmerge.search.adamerging import adamerging as adamerging
    from clipmerge.search.consensus import consensus_thresholds as consensus_thresholds
    from clipmerge.search.ensemble import greedy_ensemble as greedy_ensemble
    from clipmerge.search.learned import learned_soup as learned_soup
    from clipmerge.search.patch import patch as patch
    from clipmerge.search.rules import best_id as best_id
    from clipmerge.search.rules import best_mean as best_mean
    from clipmerge.search.rules import keep_control as keep_control
    from clipmerge.search.rules import normalised_mean as normalised_mean
    from clipmerge.search.rules import paint as paint
    from clipmerge.search.rules import within as within
    from clipmerge.search.soup import greedy_soup as greedy_soup
    from clipmerge.search.soup import uniform_soup as uniform_soup
    from clipmerge.search.sweep import sweep as sweep
    from clipmerge.weights.look import compare as compare
    from clipmerge.weights.look import inspect as inspect
    from clipmerge.weights.positions import resize_positions as resize_positions
    from clipmerge.weights.task_vectors import compare_tasks as compare_tasks
    from clipmerge.weights.weights import Weights as Weights
    from clipmerge.weights.weights import from_state_dict as from_state_dict
    from clipmerge.weights.weights import interpolate as interpolate
    from clipmerge.weights.weights import load as load
    from clipmerge.weights.weights import load_all as load_all
    from clipmerge.weights.weights import mean as mean

_NAMES = {
    "data.open": "open_split",
    "errors": "ClipmergeError",
    "evaluate.evaluator": "Evaluator score",
    "evaluate.recalibrate": "recalibrate",
    "evaluate.regmean_plus": "statistics_together",
    "evaluate.score": "Score",
    "evaluate.statistics": "statistics",
    "evaluate.verify": "verify",
    "evaluate.zero_shot": "with_zero_shot_head",
    "figures.draw": "plot",
    "finetuning.finetune": "finetune",
    "model": "build_model resolve_model",
    "progress": "progress_bar",
    "report.page": "report_page",
    "search.adamerging": "adamerging",
    "search.consensus": "consensus_thresholds",
    "search.ensemble": "greedy_ensemble",
    "search.learned": "learned_soup",
    "search.patch": "patch",
    "search.rules": "best_id best_mean keep_control normalised_mean paint within",
    "search.soup": "greedy_soup uniform_soup",
    "search.sweep": "sweep",
    "weights.look": "compare inspect",
    "weights.positions": "resize_positions",
    "weights.task_vectors": "compare_tasks",
    "weights.weights": "Weights from_state_dict interpolate load load_all mean",
}
"""The public names by the file that holds them."""

_HOME = {name: f"clipmerge.{home}" for home, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name == "__all__":
        return sorted([*_HOME, *_methods()])
    if not name.startswith("_") and name in _methods():
        return getattr(import_module("clipmerge.weights.weights"), name)
    raise AttributeError(f"module 'clipmerge' has no attribute {name!r}")


def _methods() -> Any:
    """The table of methods, whose names are public too: `cm.ties`, `cm.slerp` …"""
    return import_module("clipmerge.weights.methods").METHODS


def __dir__() -> list[str]:
    return [*__getattr__("__all__"), "__version__"]
