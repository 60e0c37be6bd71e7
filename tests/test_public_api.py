"""The public names: what is exported, that it exists, that the README shows it, and what importing costs."""

import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import clipmerge
from clipmerge.weights.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]

PUBLIC = [
    "ClipmergeError",
    "Evaluator",
    "Score",
    "Weights",
    "adamerging",
    "best_id",
    "best_mean",
    "build_model",
    "compare",
    "compare_tasks",
    "consensus_thresholds",
    "finetune",
    "from_state_dict",
    "greedy_ensemble",
    "greedy_soup",
    "inspect",
    "interpolate",
    "keep_control",
    "learned_soup",
    "load",
    "load_all",
    "mean",
    "normalised_mean",
    "open_split",
    "paint",
    "patch",
    "plot",
    "progress_bar",
    "recalibrate",
    "report_page",
    "resize_positions",
    "resolve_model",
    "score",
    "statistics",
    "statistics_together",
    "sweep",
    "uniform_soup",
    "verify",
    "with_zero_shot_head",
    "within",
]


def test_exactly_these_names_are_public() -> None:
    assert clipmerge.__all__ == sorted([*PUBLIC, *METHODS])
    assert dir(clipmerge) == sorted([*clipmerge.__all__, "__version__"])


@pytest.mark.parametrize("name", [*PUBLIC, *METHODS])
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    assert (getattr(clipmerge, name).__doc__ or "").strip()


def test_help_shows_every_public_name() -> None:
    shown = pydoc.plain(pydoc.render_doc(clipmerge))
    assert [name for name in PUBLIC if f"{name}(" not in shown and f"class {name}" not in shown] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_the_readme_shows_every_public_name(name: str) -> None:
    assert f"`{name}`" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_names_that_type_checkers_see_are_the_same() -> None:
    source = (ROOT / "merge/clipmerge/__init__.py").read_text(encoding="utf-8")
    seen = sorted(
        line.rpartition(" as ")[2] for line in source.splitlines() if " as " in line and "from" in line
    )
    assert seen == PUBLIC


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'clipmerge' has no attribute 'slurp'"):
        clipmerge.slurp  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, clipmerge; print(sorted(set(sys.modules) & {'torch', 'open_clip', 'numpy', 'rich'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_first_public_names_need_no_torch() -> None:
    code = (
        "import sys, clipmerge\n"
        "clipmerge.load, clipmerge.mean, clipmerge.interpolate, clipmerge.from_state_dict, clipmerge.Weights\n"
        "print(sorted(set(sys.modules) & {'torch', 'open_clip', 'torchvision'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
