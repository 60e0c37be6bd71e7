"""Every result draws itself, through the report room."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tests.merge.search.table import point, random_bits, table_evaluator

from clipmerge.errors import SelectionError
from clipmerge.figures.draw import plot
from clipmerge.search.coefficients import search_coefficients, task_family
from clipmerge.search.ensemble import greedy_ensemble
from clipmerge.search.learned import learned_soup
from clipmerge.search.patch import patch
from clipmerge.search.rules import best_mean, keep_control, mean_of
from clipmerge.search.soup import greedy_soup, uniform_soup
from clipmerge.search.sweep import sweep
from clipmerge.weights.weights import interpolate

A, B, C = point("a"), point("b"), point("c")
TABLE, _ = table_evaluator({"id": 50, "shift": 50}, random_bits(1, 50))
GRID = (0, 0.5, 1)

RESULTS: dict[str, Callable[[], Any]] = {
    "greedy": lambda: greedy_soup([A, B, C], TABLE, split="id"),
    "sweep": lambda: sweep(
        lambda at: interpolate(A, B, at), GRID, TABLE, rule=best_mean("id", ["shift"]), refine=True
    ),
    "negate": lambda: sweep(
        lambda at: A - (B - A) * at, GRID, TABLE, rule=keep_control(0.5, "id", "shift"), name="negate"
    ),
    "patch": lambda: patch(A, B, TABLE, patching="id", supported="shift", grid=GRID),
    "sequential": lambda: patch(
        A, [B, C], TABLE, patching=["id", "shift"], supported="id", grid=GRID, mode="sequential"
    ),
    "parallel": lambda: patch(
        A, [B, C], TABLE, patching=["id", "shift"], supported="id", mode="parallel", budget=5
    ),
    "coefficients": lambda: search_coefficients(
        task_family(A, {"b": B})[1], ["b"], TABLE, rule=mean_of(["id"]), budget=5
    ),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_a_result_draws_itself(kind: str, tmp_path: Path) -> None:
    drawn = plot(RESULTS[kind]().to_json(), tmp_path / "figure.png")
    assert {path.suffix for path in drawn} == {".png", ".svg"}
    assert all(path.stat().st_size > 1000 for path in drawn)


def test_ensembles_and_learned_soups_draw_themselves(spread: Any, evaluator: Any, tmp_path: Path) -> None:
    for result in (greedy_ensemble(spread[:2], evaluator), learned_soup(spread[:2], evaluator, epochs=1)):
        assert all(path.exists() for path in plot(result.to_json(), tmp_path / f"{result.kind}.png"))


@pytest.mark.parametrize("kind", RESULTS)
def test_a_result_shows_itself_as_its_table_as_text_and_as_html(kind: str) -> None:
    result = RESULTS[kind]()
    table = result.table()
    lines = repr(result).splitlines()
    assert lines[0] == table.title
    assert [line.split() for line in lines[1:]] == [
        " ".join(row).split() for row in (table.headers, *table.rows)
    ]
    parsed = ElementTree.fromstring(result._repr_html_())
    assert [[cell.text or "" for cell in row] for row in parsed.iter("tr")] == [
        list(row) for row in (table.headers, *table.rows)
    ]
    assert parsed.findtext("caption") == table.title


def test_a_result_plots_itself_and_saves_where_a_path_is_given(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    result = RESULTS["sweep"]()
    page = result.plot()
    assert isinstance(page, Figure)
    assert page.axes[0].get_title(loc="left") == "Interpolation of base and finetuned weights"
    assert list(tmp_path.iterdir()) == []
    result.plot(tmp_path / "curve.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.png", "curve.svg"]
    with pytest.raises(SelectionError, match="results of kind 'uniform_soup' cannot be plotted"):
        uniform_soup([A, B]).plot()


def test_a_score_shows_its_value_its_interval_and_its_images() -> None:
    shown = repr(TABLE.score(A, "id"))
    score = TABLE.score(A, "id")
    assert shown.startswith(f"Score(top1 {100 * score.value:.2f} %, 95 %: ")
    assert shown.endswith(", 50 images)")
