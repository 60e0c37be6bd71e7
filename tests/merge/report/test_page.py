"""The page of a folder's results: what stands on it, what is refused, and what it does in a real browser."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

import clipmerge as cm
from clipmerge.errors import OutputError
from clipmerge.report.chapters import Chart, Series, chapters_of
from clipmerge.report.page import MOST_ROWS, draw

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the page in")

CHAPTER: dict[str, Any] = {
    "format": "clipmerge-chapter",
    "version": 1,
    "order": 2,
    "title": "Second",
    "text": ["What was done."],
    "tables": [
        {
            "caption": "Scores",
            "columns": ["method", "mean, %", "note"],
            "rows": [
                ["b", 9.5, ""],
                {"cells": ["a", "74.3 ± 1.0", "best"], "details": {"notation": "ties(x)"}},
                ["c", None, ""],
                ["d", -3, ""],
            ],
            "note": "n = 2000",
        }
    ],
    "charts": [
        {
            "caption": "Curves",
            "x": "id",
            "y": "shift",
            "series": [
                {"label": "FLYP", "points": [[60, 50], [70, 61.25, "α = 0.5, chosen"], [80, 40]]},
                {"label": "CE", "points": [[60, 50], [72, 55]]},
            ],
        }
    ],
    "commands": ["clipmerge soup a b"],
    "settings": {"seeds": 3},
}


def page_of(folder: Path, **documents: Any) -> str:
    """Write documents as JSON files into a folder and return its page."""
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    return cm.report_page(folder, force=True).read_text(encoding="utf-8")


def texts(page: str) -> str:
    """The page without its tags."""
    return unescape(re.sub(r"<[^>]+>", " ", page))


def test_chapters_come_in_their_order_with_all_that_they_hold(tmp_path: Path) -> None:
    page = page_of(tmp_path, a=CHAPTER, b={**CHAPTER, "order": 1, "title": "First"})
    assert page.index(">First</h2>") < page.index(">Second</h2>")
    for part in (
        "What was done.",
        "ties(x)",
        "74.3 ± 1.0",
        "n = 2000",
        "clipmerge soup a b",
        "FLYP: 70, 61.25 (α = 0.5, chosen)",
    ):
        assert part in texts(page), part
    assert 'data-key="74.3"' in page
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    pages = []
    for names in ("abc", "cba"):
        folder = tmp_path / names / "same"
        folder.mkdir(parents=True)
        pages.append(page_of(folder, **{name: {**CHAPTER, "title": name} for name in names}))
    assert pages[0] == pages[1]


def test_markup_in_a_document_is_text(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    table = {"caption": evil, "columns": [evil], "rows": [[evil]], "note": evil}
    chart = {
        "caption": evil,
        "x": evil,
        "y": evil,
        "series": [{"label": evil, "points": [[1, 2, f'"{evil}']]}],
    }
    settings, common = {evil: evil}, {"format": "clipmerge-chapter", "version": 1}
    page = page_of(
        tmp_path,
        a={
            **common,
            "title": evil,
            "text": [evil],
            "tables": [table],
            "charts": [chart],
            "commands": [evil],
            "settings": settings,
        },
    )
    assert page.count("<script>") == 1
    assert unescape(page).count(evil) >= 9
    assert evil not in page


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "its version is 2, not 1"),
        ({"title": None}, "title is no text"),
        ({"text": "one"}, "text is no list of its kind"),
        ({"tables": [{"columns": ["a"], "rows": [["x", "y"]]}]}, "a row has 2 cells under 1 columns"),
        ({"tables": [{"columns": ["a"], "rows": [[{}]]}]}, "a cell is no text, number or null"),
        (
            {"tables": [{"columns": ["a"], "rows": [{"cells": [1], "details": []}]}]},
            "a row's details is no object",
        ),
        ({"tables": [{"columns": ["a"], "rows": [{"details": {}}]}]}, "a row has 0 cells under 1 columns"),
        ({"tables": [{"columns": ["a"], "rows": [[1e300]]}]}, "a cell is no text, number or null"),
        ({"charts": [{"series": [{"label": "a", "points": [[1]]}]}]}, "a point is [x, y] or [x, y, text]"),
        ({"charts": [{"kind": "pie"}]}, "a chart's kind is line or points"),
        ({"order": "first"}, "order is no number"),
        ({"settings": []}, "settings is no object"),
    ],
)
def test_a_chapter_of_another_shape_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(OutputError, match=re.escape(f"mine is no chapter: {words}")):
        chapters_of({**CHAPTER, **change}, "mine")


@pytest.mark.parametrize(
    "text",
    [
        "{", '{"kind": "sweep"}', '{"kind": "leaderboard", "tasks": ["a"], "entries": [{}], "reported": "val"}',
        '{"kind": "evaluation", "metric": "top1", "data": {"a": "b"}, "checkpoints": [{"name": 1, "path": "p", '
        '"model": "m", "scores": {"a": {"value": 1e300}}}]}',
        '{"a": NaN}', "[" * 100_000, '{"format": "clipmerge-chapter", "version": 1}', "\udcff",
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_passed_over_with_its_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    (tmp_path / "good.json").write_text(json.dumps(CHAPTER), encoding="utf-8")
    remarks: list[str] = []
    page = cm.report_page(tmp_path, on_remark=remarks.append).read_text(encoding="utf-8")
    assert ">Second</h2>" in page
    assert [remark for remark in remarks if "bad" in remark] == remarks != []


def test_other_json_is_left_alone_and_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_cfg": {"kind": 3}, "list": [1]}')
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(OutputError, match="is a result of clipmerge") as refusal:
        cm.report_page(tmp_path, on_remark=pytest.fail)
    assert "--json" in str(refusal.value.hint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "list.json"]


def test_a_page_that_exists_is_not_replaced_unasked(tmp_path: Path) -> None:
    page_of(tmp_path, a=CHAPTER)
    with pytest.raises(OutputError, match="exists"):
        cm.report_page(tmp_path)


def test_a_long_table_is_cut_and_says_so(tmp_path: Path) -> None:
    table = {"caption": "Long", "columns": ["a"], "rows": [[i] for i in range(MOST_ROWS + 5)]}
    page = page_of(tmp_path, a={**CHAPTER, "tables": [table], "charts": []})
    assert f"The first {MOST_ROWS} of {MOST_ROWS + 5} rows." in page
    assert page.count("<tr>") == MOST_ROWS + 1


def test_points_are_placed_by_their_values() -> None:
    chart = Chart("c", "x", "y", True, (Series("s", ((0.0, 0.0, ""), (5.0, 10.0, ""), (10.0, 20.0, ""))),))
    drawing = draw(chart)
    xs, ys = ([getattr(mark, axis) for mark in drawing.lines[0].marks] for axis in "xy")
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1])
    assert ys[0] > ys[1] > ys[2]  # SVG's y points down
    by_text = {tick.text: tick.at for tick in drawing.x_ticks}
    assert by_text["0"] == pytest.approx(xs[0])
    assert by_text["10"] == pytest.approx(xs[2])
    assert [row.cells for row in drawing.table.rows][1] == ("s", 5.0, 10.0, "")


@pytest.mark.parametrize(
    "points", [(), ((1.0, 1.0, ""),), ((1.0, 0.0, ""), (1.0, 0.0, "")), ((-1e14, 1e-9, ""), (1e14, 0.0, ""))]
)
def test_few_equal_or_far_points_can_be_drawn(points: tuple[tuple[float, float, str], ...]) -> None:
    drawing = draw(Chart("c", "x", "y", True, (Series("s", points),)))
    assert all(54 <= mark.x <= 410 and 10 <= mark.y <= 260 for mark in drawing.lines[0].marks)


# -- in a browser ------------------------------------------------------------------------------------------

PROBE = """
<script>
const told = { errors: [] };
addEventListener("error", event => told.errors.push(event.message));
addEventListener("securitypolicyviolation", event => told.errors.push(event.violatedDirective));
addEventListener("load", () => {
  const region = [...document.querySelectorAll(".table")].at(-1);
  const column = i => [...region.querySelectorAll("tbody tr")].map(row => row.cells[i].textContent);
  const press = i => region.querySelectorAll("thead button")[i].click();
  told.before = column(0);
  press(1); told.down = column(0); told.sort = region.querySelectorAll("th")[1].getAttribute("aria-sort");
  press(1); told.up = column(0);
  press(0); told.names = column(0);
  const mark = document.querySelectorAll(".mark")[1], tip = document.getElementById("tip");
  told.hidden = tip.hidden;
  mark.focus(); told.focus = [tip.hidden, tip.textContent];
  mark.blur(); told.blur = tip.hidden;
  mark.dispatchEvent(new PointerEvent("pointerenter")); told.hover = [tip.hidden, tip.textContent];
  told.width = [document.documentElement.scrollWidth, document.documentElement.clientWidth];
  const named = e => e.hasAttribute("aria-label") || document.getElementById(e.getAttribute("aria-labelledby"));
  told.reachable = [...document.querySelectorAll(".wide, pre")].every(e => e.tabIndex === 0 && named(e));
  parent.postMessage(told, "*");
});
</script></body>"""

FRAME = """<!doctype html><iframe src="page.html" style="width: {width}px; height: 800px; border: 0"></iframe>
<script>
addEventListener("message", event => {{ document.body.dataset.told = JSON.stringify(event.data); }});
</script>"""


def probe(page: str, folder: Path, width: int) -> dict[str, Any]:
    """Open a page in Chromium, in a frame so wide, and return what the probe saw."""
    (folder / "page.html").write_text(page.replace("</body>", PROBE), encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
    command = [
        str(CHROMIUM),
        *flags,
        f"--user-data-dir={folder / 'profile'}",
        (folder / "frame.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    match = re.search(r'data-told="([^"]*)"', done.stdout)
    assert match, done.stdout + done.stderr
    told: dict[str, Any] = json.loads(unescape(match.group(1)))
    return told


@browser
@pytest.mark.parametrize("width", [360, 1280])
def test_in_a_browser_tables_sort_points_speak_and_nothing_is_too_wide(width: int, tmp_path: Path) -> None:
    wide = {"caption": "Wide", "columns": [f"column {i}" for i in range(20)], "rows": [["a value"] * 20]}
    (tmp_path / "results").mkdir()
    page = page_of(
        tmp_path / "results", a={**CHAPTER, "tables": [wide, *CHAPTER["tables"]], "text": ["x" * 300]}
    )
    told = probe(page, tmp_path, width)
    assert told["errors"] == []
    assert told["before"] == ["b", "a", "c", "d"]
    assert told["down"] == ["a", "b", "d", "c"]  # by number, what has none last
    assert told["sort"] == "descending"
    assert told["up"] == ["d", "b", "a", "c"]
    assert told["names"] == ["a", "b", "c", "d"]
    said = "FLYP: 70, 61.25 (α = 0.5, chosen)"
    assert told["hidden"] is True
    assert told["focus"] == told["hover"] == [False, said]
    assert told["blur"] is True
    assert told["width"][0] <= told["width"][1] <= width
    assert told["reachable"] is True
