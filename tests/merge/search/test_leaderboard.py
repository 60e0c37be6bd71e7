"""Methods against each other, and the free number of an expression, on a tiny model and the digits."""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import clipmerge as cm
from clipmerge.errors import SelectionError
from clipmerge.search.leaderboard import default_methods, family_of, leaderboard, means, search_scale
from clipmerge.weights.weights import Weights


@pytest.fixture(scope="module")
def models(tiny_checkpoints: Mapping[str, Path]) -> list[Weights]:
    return cm.load_all([tiny_checkpoints[name] for name in ("base", "ft0", "ft1")])


@pytest.fixture(scope="module")
def evaluator(tiny_spec: Any) -> cm.Evaluator:
    splits = {
        "a": cm.open_split("digits#val", limit=30),
        "b": cm.open_split("digits#val@rotate:20", limit=30),
    }
    return cm.Evaluator({**splits, "a_test": cm.open_split("digits#test", limit=30)}, tiny_spec, device="cpu")


OWN = [0.78187, 0.97979, 0.98926, 0.99145, 0.9969, 0.95794, 0.75345, 0.97568]
PUBLISHED = {
    "mean": ([0.63176, 0.55532, 0.72051, 0.52937, 0.8681, 0.71921, 0.65108, 0.63149], 72.1),
    "task arithmetic": ([0.62181, 0.59043, 0.78167, 0.64434, 0.9353, 0.72619, 0.63567, 0.7278], 76.5),
    "consensus": ([0.61846, 0.64415, 0.82954, 0.73127, 0.9803, 0.76063, 0.63093, 0.80747], 80.8),
    "TSV-M": ([0.70464, 0.85213, 0.95125, 0.92122, 0.9928, 0.85889, 0.67214, 0.91618], 92.3),
}
"""Accuracies on Cars, DTD, EuroSAT, GTSRB, MNIST, RESISC45, SUN397, SVHN; the published normalised mean in percent."""


def test_means_are_the_published_ones() -> None:
    """Per-task accuracies of task arithmetic, Consensus and TSV-M on 8 tasks, ViT-B/32, and each finetuned model's own.

    Source: github.com/AntoAndGar/task_singular_vectors, results at commit a6c97188 (Gargiulo et al. 2025).
    """
    own = {str(i): _Figure(value) for i, value in enumerate(OWN)}
    for name, (row, normalised) in PUBLISHED.items():
        found = means({str(i): _Figure(value) for i, value in enumerate(row)}, own)  # type: ignore[arg-type,arg-type]
        assert round(100 * found[1], 1) == normalised, name


class _Figure:
    def __init__(self, value: float) -> None:
        self.figure = Fraction(repr(value))


def test_a_finetuned_model_that_knows_nothing_is_no_yardstick() -> None:
    with pytest.raises(SelectionError, match="scores 0 on its own task"):
        means({"a": _Figure(0.5)}, {"a": _Figure(0.0)})  # type: ignore[dict-item]


def test_methods_are_computed_once_and_chosen_by_the_rule(
    models: list[Weights], evaluator: cm.Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, a, b = models
    computed: list[str] = []
    original = Weights.state_dict
    monkeypatch.setattr(
        Weights, "state_dict", lambda self, *o, **k: computed.append(repr(self)) or original(self, *o, **k)
    )
    family = family_of("ties(density=0.5)", base, [a, b])
    result = search_scale(family, {"a": a, "b": b}, evaluator, grid=(0, 0.5, 1))
    assert len([text for text in computed if text.startswith("ties")]) == 1
    assert [float(p.coefficients["scale"]) for p in result.history] == [0, 0.5, 1]
    own = {"a": evaluator.score(a, "a"), "b": evaluator.score(b, "b")}
    exact = {x: means(evaluator.scores(family(Fraction(x)), ["a", "b"]), own)[1] for x in (0, 0.5, 1)}
    assert [float(point.value) for point in result.history] == list(exact.values())
    assert result.coefficient == max(exact, key=lambda x: (exact[x], -x))
    assert repr(result.weights) == repr(family(Fraction(result.coefficient)))


def test_the_grid_is_the_methods_own(models: list[Weights], evaluator: cm.Evaluator) -> None:
    base, a, _ = models
    result = search_scale(family_of("iso_c", base, [a]), {"a": a}, evaluator)
    assert [float(p.coefficients["scale"]) for p in result.history] == [i / 10 for i in range(31)]


def test_a_leaderboard(models: list[Weights], evaluator: cm.Evaluator) -> None:
    base, a, b = models
    board = leaderboard(base, {"a": a, "b": b}, evaluator, ["mean", "task_arithmetic", "slerp", "tsv"])
    names = [entry.name for entry in board.entries]
    assert names[:2] == ["zero-shot", "finetuned"]
    assert sorted(names[2:]) == ["mean", "slerp", "task_arithmetic", "tsv"]
    entries = {entry.name: entry for entry in board.entries}
    assert entries["finetuned"].normalised == 1
    assert entries["finetuned"].scores["b"].value == evaluator.score(b, "b").value
    assert entries["zero-shot"].scores["a"].value == evaluator.score(base, "a").value
    assert (entries["mean"].scale, repr(entries["mean"].weights)) == (None, "mean([ft0, ft1])")
    for name in names[2:]:
        entry = entries[name]
        assert entry.weights is not None
        exact = evaluator.scores(entry.weights, ["a", "b"])
        assert {k: s.value for k, s in entry.scores.items()} == {k: s.value for k, s in exact.items()}
        assert entry.mean == pytest.approx(sum(s.value for s in entry.scores.values()) / 2)
    ranks = [entry.normalised for entry in board.entries[2:]]
    assert ranks == sorted(ranks, reverse=True)
    assert board.table().headers == ("method", "scale", "a", "b", "mean", "normalised")
    assert "a little too high" in board.table().title
    assert board.to_json()["entries"][0]["notation"] == "base"


def test_scales_are_chosen_on_other_images_than_are_reported(
    models: list[Weights], evaluator: cm.Evaluator
) -> None:
    base, a, _ = models
    board = leaderboard(base, {"a": a}, evaluator, ["task_arithmetic"], test={"a": "a_test"})
    (chosen,) = board.entries[2:]
    result = search_scale(family_of("task_arithmetic", base, [a]), {"a": a}, evaluator)
    assert chosen.scale == result.coefficient
    assert chosen.scores["a"].value == evaluator.score(result.weights, "a_test").value
    assert (board.reported, board.table().title[:14]) == ("test", "on test images")


def test_a_grid_is_that_of_every_method_of_task_vectors(
    models: list[Weights], evaluator: cm.Evaluator
) -> None:
    base, a, b = models
    board = leaderboard(base, {"a": a, "b": b}, evaluator, ["mean", "ties", "iso_c"], grid=(0.125, 0.375))
    scales = {entry.name: entry.scale for entry in board.entries[2:]}
    assert scales.pop("mean") is None
    assert set(scales.values()) <= {0.125, 0.375}


def test_what_runs_by_default_takes_so_many_models(models: list[Weights]) -> None:
    assert default_methods(1)[:3] == ("mean", "task_arithmetic", "ties")
    assert ("slerp" in default_methods(2), "slerp" in default_methods(3)) == (True, False)
    assert ("model_stock" in default_methods(1), "model_stock" in default_methods(2)) == (False, True)
    for tasks in (1, 2):
        for name in default_methods(tasks):
            assert family_of(name, models[0], models[1 : tasks + 1])(Fraction(1)).kind() == 1


def test_unknown_methods_are_named(models: list[Weights]) -> None:
    with pytest.raises(SelectionError, match="there is no method 'tis'") as refused:
        family_of("tis", models[0], models[1:])
    assert "task_arithmetic, ties" in str(refused.value.hint)
