"""Figures: every kind of result has one, both formats are written, and the same numbers give the same bytes."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from clipmerge.errors import OutputError, SelectionError
from clipmerge.figures import draw
from clipmerge.figures.style import targets


def points(x: str, y: str) -> list[dict[str, Any]]:
    return [
        {
            "coefficient": i / 10,
            "value": 0.5,
            "allowed": i < 9,
            "refined": False,
            "chosen": i == 6,
            "scores": {
                x: {"value": 0.6 + 0.3 * math.sin(0.16 * i)},
                y: {"value": 0.4 + 0.2 * math.sin(0.26 * i)},
            },
        }
        for i in range(11)
    ]


def sweep(family: str, rule: str, roles: Mapping[str, list[str]], x: str, y: str) -> dict[str, Any]:
    return {
        "kind": "sweep",
        "family": family,
        "rule": {"name": rule, "says": "", "roles": roles},
        "coefficient": 0.6,
        "metric": "top1",
        "splits": [x, y],
        "history": points(x, y),
    }


def step(number: int, value: float | None, accepted: bool) -> dict[str, Any]:
    best = {"number": number, "name": f"m{number}", "alone": 0.9 - 0.01 * number, "best": 0.9}
    return best | {"value": value, "at_most": None if value else 0.85, "accepted": accepted}


WISE = sweep("interpolate", "best-mean", {"id": ["id"], "shift": ["shift"]}, "id", "shift")
PAINT = sweep("patch", "paint", {"patching": ["new"], "supported": ["old"]}, "old", "new")
SOUP = {
    "kind": "greedy_soup",
    "split": "val",
    "metric": "top1",
    "history": [step(1, 0.9, True), step(2, 0.88, False), step(3, None, False), step(4, 0.91, True)],
}
DOCUMENTS: dict[str, dict[str, Any]] = {
    "wise-ft": WISE,
    "best-id": sweep("interpolate", "best-id", {"id": ["id"]}, "id", "shift"),
    "negation": sweep("negate", "keep-control", {"target": ["a"], "control": ["b"]}, "b", "a"),
    "addition": sweep("add", "normalised-mean", {"task": ["a", "b"]}, "a", "b"),
    "paint": {"kind": "patch", "mode": "single", "coefficient": 0.6, "steps": [PAINT]},
    "paint twice": {"kind": "patch", "mode": "sequential", "steps": [PAINT, PAINT]},
    "greedy soup": SOUP,
    "ensemble": SOUP | {"kind": "greedy_ensemble"},
    "learned": {"kind": "learned_soup", "coefficients": {"m1": 0.3, "m2": 0.7}},
    "learned by group": {
        "kind": "learned_soup",
        "coefficients": {"visual": {"m1": 0.3, "m2": 0.7}, "text": {"m1": 0.4, "m2": 0.6}},
    },
    "coefficients": {
        "kind": "coefficients",
        "rule": {"says": "best mean of a and b"},
        "history": [{"value": 0.5}, {"value": 0.4}, {"value": 0.7}],
    },
    "comparison": {
        "kind": "comparison",
        "x": "test",
        "y": "shift",
        "rows": [
            {"role": role, "scores": {"test": 0.9 + 0.01 * i, "shift": 0.6 + 0.02 * i}}
            for i, role in enumerate(["base", "ingredient", "best", "uniform", "greedy", "ensemble"])
        ],
        "curve": [{"alpha": 0.0, "scores": {"test": 0.8, "shift": 0.9}}],
    },
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_kind_of_result_is_drawn_twice_over(name: str, tmp_path: Path) -> None:
    written = draw.plot(DOCUMENTS[name], tmp_path / "f.png")
    assert written == [tmp_path / "f.png", tmp_path / "f.svg"]
    with Image.open(written[0]) as image:
        assert image.width > 600
    assert ElementTree.parse(written[1]).getroot().tag.endswith("svg")


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    first = [path.read_bytes() for path in draw.plot(WISE, tmp_path / "a")]
    second = [path.read_bytes() for path in draw.plot(WISE, tmp_path / "b")]
    assert first == second


def test_the_chosen_point_and_the_ends_are_named_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert words_of(WISE, tmp_path, monkeypatch) >= {
        "base",
        "finetuned",
        "chosen, α = 0.6",
        "not allowed by the rule",
        "in-distribution (id), top-1 %",
        "shift, top-1 %",
    }


def test_a_soup_says_what_was_accepted_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = words_of(SOUP, tmp_path, monkeypatch)
    assert words >= {"accepted (2)", "refused (1)", "refused early, at most this (1)", "checkpoints tried"}


def test_the_shifts_of_a_rule_that_looks_at_none_are_the_other_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "shift, top-1 %" in words_of(DOCUMENTS["best-id"], tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("name", "title", "x"),
    [
        ("wise-ft", "Interpolation of base and finetuned weights", "in-distribution (id), top-1 %"),
        ("addition", "Adding task vectors to the base", "scaling coefficient of the task vectors"),
        ("negation", "Subtracting a task vector from the base", "control (b), top-1 %"),
        ("learned", "Learned soup: the share of each checkpoint", "coefficient (they sum to 1)"),
        ("coefficients", "Search over several coefficients at once", "evaluations of the held-out splits"),
    ],
)
def test_a_figure_says_what_it_shows(
    name: str, title: str, x: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert words_of(DOCUMENTS[name], tmp_path, monkeypatch) >= {title, x}


def test_a_result_is_drawn_as_its_document_is(tmp_path: Path) -> None:
    class Result:
        def to_json(self) -> dict[str, Any]:
            return WISE

    drawn, expected = draw.plot(Result(), tmp_path / "a"), draw.plot(WISE, tmp_path / "b")
    assert drawn[0].read_bytes() == expected[0].read_bytes()


def test_a_training_log_is_drawn(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = [
        {"event": "step", "step": i, "loss": 3 * math.exp(-i / 40), "lr": 1e-3 * (1 - i / 50)}
        for i in range(50)
    ]
    events.append({"event": "score", "step": 50, "top1": 0.9})
    assert all(path.stat().st_size > 1000 for path in draw.training(events, tmp_path / "log"))


def test_a_kind_without_a_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="results of kind 'uniform_soup' cannot be plotted"):
        draw.plot({"kind": "uniform_soup"}, tmp_path / "f.png")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"the folder .*nowhere does not exist") as caught:
        draw.plot(SOUP, tmp_path / "nowhere" / "f.png")
    assert caught.value.hint == f"mkdir -p {tmp_path / 'nowhere'}"


def test_a_suffix_that_is_none_of_ours_is_kept_in_the_name() -> None:
    assert targets("runs/v1.2") == [Path("runs/v1.2.png"), Path("runs/v1.2.svg")]


def words_of(document: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The texts of the SVG, written as text for this once."""
    from clipmerge.figures import style

    monkeypatch.setitem(style._RC, "svg.fonttype", "none")
    svg = draw.plot(document, tmp_path / "words")[1]
    return {"".join(node.itertext()) for node in ElementTree.parse(svg).iter() if node.tag.endswith("text")}


def test_real_searches_are_drawn(
    tiny_spec: Any, tiny_checkpoints: Mapping[str, Path], tmp_path: Path
) -> None:
    from clipmerge.data.open import open_split
    from clipmerge.evaluate.evaluator import Evaluator
    from clipmerge.search.rules import best_mean
    from clipmerge.search.soup import greedy_soup
    from clipmerge.search.sweep import sweep as run_sweep
    from clipmerge.weights.weights import interpolate, load

    splits = {name: open_split(f"digits#val@{name}", limit=40) for name in ("invert", "blur")}
    evaluator = Evaluator(splits, tiny_spec, device="cpu")
    base, tuned, other = (load(tiny_checkpoints[name]) for name in ("base", "ft0", "ft1"))
    chosen = run_sweep(
        lambda alpha: interpolate(base, tuned, alpha),
        [0, 0.5, 1],
        evaluator,
        rule=best_mean("invert", ["blur"]),
    )
    soup = greedy_soup([tuned, other], evaluator, split="blur")
    for name, result in (("sweep", chosen), ("soup", soup)):
        assert all(path.stat().st_size > 1000 for path in draw.plot(result, tmp_path / name))
