"""Several coefficients at once: families, three searches, budgets."""

import json
import sys
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.merge.search.table import Recipe, Table, point, recipe, table_evaluator

from clipmerge.errors import MissingExtraError, SelectionError
from clipmerge.evaluate.evaluator import Evaluator
from clipmerge.search.coefficients import groups_of, search_coefficients, task_family
from clipmerge.search.rules import keep_control, mean_of
from clipmerge.weights.names import matches

N = 4000
ZS, CARS, DTD = point("zs"), point("cars"), point("dtd")
NAMES = (
    "classification_head.weight",
    "logit_scale",
    "token_embedding.weight",
    "transformer.resblocks.0.ln_1.weight",
    "transformer.resblocks.11.ln_1.weight",
    "visual.conv1.weight",
    "visual.transformer.resblocks.0.ln_1.weight",
    "visual.transformer.resblocks.1.ln_1.weight",
)


def hill(**options: Any) -> tuple[Evaluator, Table]:
    """One peak, at cars = 0.3, dtd = 0.7."""

    def bits(made: Recipe, split: str) -> Any:
        share = {name: float(Fraction(c)) for name, c in made}
        far = (share.get("cars", 0) - 0.3) ** 2 + (share.get("dtd", 0) - 0.7) ** 2
        return np.arange(N) < round(N * (0.9 - 0.8 * min(far, 1)))

    return table_evaluator({"val": N}, bits, **options)


@pytest.mark.parametrize(("method", "near"), [("coordinate", 0.05), ("random", 0.25), ("cmaes", 0.15)])
def test_each_search_climbs_within_its_budget(method: Any, near: float) -> None:
    names, family = task_family(ZS, {"cars": CARS, "dtd": DTD})
    evaluator, table = hill()
    found = search_coefficients(family, names, evaluator, rule=mean_of(["val"]), method=method, budget=60)
    assert len(table.asked) == len(found.history) <= 60
    assert found.coefficients["cars"] == pytest.approx(0.3, abs=near)
    assert found.coefficients["dtd"] == pytest.approx(0.7, abs=near)
    assert recipe(found.weights) == recipe(family(found.chosen.coefficients))
    again = search_coefficients(family, names, hill()[0], rule=mean_of(["val"]), method=method, budget=60)
    assert [p.coefficients for p in again.history] == [p.coefficients for p in found.history]
    assert len(json.loads(json.dumps(found.to_json()))["history"]) == len(found.history)
    assert found.table().headers == ("evaluation", "cars", "dtd", "val", "95 %", "p", "mean", "")
    assert [row[-1] for row in found.table().rows].count("chosen") == 1
    assert len(found.table().headers) == len(found.table().rows[0])


def test_a_killed_search_repeats_its_steps_from_the_journal(tmp_path: Path) -> None:
    names, family = task_family(ZS, {"cars": CARS, "dtd": DTD})
    path = tmp_path / "scores.jsonl"
    rule = mean_of(["val"])
    search_coefficients(family, names, hill(journal=path)[0], budget=10, rule=rule)
    evaluator, table = hill(journal=path)
    search_coefficients(family, names, evaluator, budget=14, rule=rule)
    assert len(table.asked) == 4


def test_a_rule_that_allows_too_little_is_heard() -> None:
    names, family = task_family(ZS, {"cars": CARS})

    def bits(made: Recipe, split: str) -> Any:
        return np.arange(100) < (100 if dict(made) == {"zs": "1"} else 0)

    evaluator, _ = table_evaluator({"target": 100, "control": 100}, bits)
    with pytest.raises(SelectionError, match="nothing that was tried fits the rule keep-control"):
        search_coefficients(family, names, evaluator, rule=keep_control(), budget=3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": 0}, "at least one"),
        ({"low": 1.0, "high": 0.0}, "is empty"),
        ({"start": [0.5]}, "does not give 2"),
        ({"start": 2.0}, "does not give 2"),
        ({"method": "magic"}, "no search 'magic'"),
    ],
)
def test_a_search_that_cannot_run_is_refused(options: Mapping[str, Any], says: str) -> None:
    names, family = task_family(ZS, {"cars": CARS, "dtd": DTD})
    with pytest.raises(SelectionError, match=says):
        search_coefficients(family, names, hill()[0], rule=mean_of(["val"]), **options)


def test_cma_es_without_optuna_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    names, family = task_family(ZS, {"cars": CARS, "dtd": DTD})
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError) as caught:
        search_coefficients(family, names, hill()[0], rule=mean_of(["val"]), method="cmaes")
    assert caught.value.hint == "pip install 'clipmerge[sweep]'"


@pytest.mark.parametrize(
    ("per", "groups"),
    [
        ("tower", ("visual", "text", "head", "*")),
        (
            "block",
            (
                "text.block[0]",
                "text.block[11]",
                "visual.block[0]",
                "visual.block[1]",
                "visual",
                "text",
                "head",
                "*",
            ),
        ),
    ],
)
def test_groups_cover_every_name_and_the_first_match_decides(per: Any, groups: tuple[str, ...]) -> None:
    assert groups_of(NAMES, per) == groups
    assert all(any(matches(group, name) for group in groups) for name in NAMES)


def test_a_family_per_tower_scales_each_tower_by_itself() -> None:
    names, family = task_family(ZS, {"cars": CARS}, per="tower")
    assert names == ("cars:*",)  # the one tensor of these checkpoints lies in no tower
    made = family({"cars:*": Fraction(1, 4)})
    assert made.terms[next(iter(CARS.terms))].at("x") == Fraction(1, 4)
