"""PAINT's four ways of patching, on score tables."""

import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from tests.merge.search.table import Recipe, point, recipe, table_evaluator

from clipmerge.errors import SelectionError
from clipmerge.evaluate.evaluator import Evaluator
from clipmerge.search.patch import patch
from clipmerge.weights.weights import Weights, interpolate

N = 400
ZS, CARS, DTD = point("zs"), point("cars"), point("dtd")


def evaluator() -> Evaluator:
    """Each task gains with its own coefficient; the old task loses with every one of them, ever faster."""

    def bits(made: Recipe, split: str) -> Any:
        share = {name: float(Fraction(c)) for name, c in made}
        cars, dtd = share.get("cars", 0.0), share.get("dtd", 0.0)
        curves = {"cars": 0.2 + 0.6 * cars, "dtd": 0.3 + 0.6 * dtd, "old": 0.9 - 0.6 * (cars + dtd) ** 2}
        return np.arange(N) < round(N * min(max(curves[split], 0), 1))

    return table_evaluator({"cars": N, "dtd": N, "old": N}, bits)[0]


def test_single_patching_is_one_sweep() -> None:
    found = patch(ZS, CARS, evaluator(), patching="cars", supported="old", grid=(0, 0.25, 0.5, 0.75, 1))
    assert found.coefficient == 0.5
    assert recipe(found.weights) == recipe(interpolate(ZS, CARS, 0.5))
    assert found.steps[0].name == "patch"
    assert {split for point in found.history for split in point.scores} == {"old", "cars"}


def test_joint_patching_looks_at_all_its_tasks() -> None:
    found = patch(ZS, CARS, evaluator(), patching=["cars", "dtd"], supported="old", mode="joint")
    assert found.coefficient == 0.25
    assert set(found.steps[0].chosen.scores) == {"old", "cars", "dtd"}


def test_sequential_patching_starts_each_task_from_what_is_patched_so_far() -> None:
    seen: list[Weights] = []

    def then_dtd(patched: Weights) -> Weights:
        seen.append(patched)
        return DTD

    found = patch(
        ZS, [CARS, then_dtd], evaluator(), patching=["cars", "dtd"], supported="old", mode="sequential"
    )
    alphas = found.coefficients
    assert list(alphas) == ["cars", "dtd"]
    assert [step.coefficient for step in found.steps] == list(alphas.values())
    assert recipe(seen[0]) == recipe(interpolate(ZS, CARS, alphas["cars"]))
    assert recipe(found.weights) == recipe(interpolate(seen[0], DTD, alphas["dtd"]))
    assert set(found.steps[1].chosen.scores) == {"old", "cars", "dtd"}
    assert len(found.table().rows) == 42


def test_what_patching_may_cost_is_measured_from_the_base_at_every_step() -> None:
    """Two points at each step would be four; the second step has nothing left to lose."""
    free, kept = (
        patch(
            ZS,
            [CARS, DTD],
            evaluator(),
            patching=["cars", "dtd"],
            supported="old",
            mode="sequential",
            keep=keep,
        )
        for keep in (None, 2)
    )
    lost = [0.9 - step.chosen.scores["old"].value for step in kept.steps]
    assert free.steps[0].chosen.scores["old"].value < 0.87
    assert all(points <= 0.02 + 1e-9 for points in lost)
    assert kept.coefficients["cars"] == 0.15
    together = patch(
        ZS, [CARS, DTD], evaluator(), patching=["cars", "dtd"], supported="old", mode="parallel", keep=2
    )
    assert together.chosen.scores["old"].value >= 0.88 - 1e-9


def test_parallel_patching_searches_all_coefficients_together() -> None:
    found = patch(
        ZS, [CARS, DTD], evaluator(), patching=["cars", "dtd"], supported="old", mode="parallel", budget=40
    )
    assert [step.kind for step in found.steps] == ["coefficients"]
    assert len(found.history) <= 40
    assert sum(found.coefficients.values()) == pytest.approx(0.25, abs=0.07)
    document = json.loads(json.dumps(found.to_json()))
    (search,) = document["steps"]
    assert search["coefficients"] == document["coefficients"] == dict(found.coefficients)
    assert list(document["coefficients"]) == ["cars", "dtd"]
    assert len(search["history"]) == len(found.history)


@pytest.mark.parametrize(
    ("mode", "models", "tasks", "says"),
    [
        ("single", [CARS, DTD], ["cars"], "takes one finetuned checkpoint, not 2"),
        ("single", [CARS], ["cars", "dtd"], "takes one patching task, not 2"),
        ("sequential", [CARS], ["cars", "dtd"], "1 against 2"),
        ("parallel", [CARS, DTD], ["cars"], "2 against 1"),
        ("twice", [CARS], ["cars"], "no patching mode 'twice'"),
    ],
)
def test_numbers_that_do_not_fit_the_mode_are_refused(
    mode: Any, models: list[Weights], tasks: list[str], says: str
) -> None:
    with pytest.raises(SelectionError, match=says):
        patch(ZS, models, evaluator(), patching=tasks, supported="old", mode=mode)
