"""Every file in examples/ runs on the demo's files, with warnings as errors, and prints what it is about."""

import ast
import json
import os
import runpy
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

SAYS = {
    "finetune_variants": "mean([example_lr0_0003, example_lr0_001, example_lr0_003])",
    "greedy_soup": "on test",
    "into_a_model": "mean([base, here]): 62 tensors",
    "model_recycling": "mean of all three",
    "part_by_part": "image tower only",
    "patching": "chosen",
    "provenance": "mean([ft1, ft2, ft3, ft4, ft5, ft6, ft7, ft8])",
    "task_arithmetic": "1.5*base - 0.5*low",
    "wise_ft": "0.75",
}


NOTEBOOK = ROOT / "examples" / "first_soup.ipynb"


def test_the_notebook_runs_and_each_cell_shows_what_its_text_says(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cells are run in order in one namespace, and what the last line of each is worth is what a notebook shows."""
    shutil.copytree(demo_folder, tmp_path / "clipmerge-demo", copy_function=os.link)
    monkeypatch.chdir(tmp_path)
    cells = [c for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    names: dict[str, object] = {"__name__": "__main__"}
    values = []
    for cell in cells:
        *lines, last = ast.parse("".join(cell["source"])).body
        exec(compile(ast.Module(lines, []), NOTEBOOK.name, "exec"), names)
        if isinstance(last, ast.Expr):
            values.append(eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names))
        else:
            exec(compile(ast.Module([last], []), NOTEBOOK.name, "exec"), names)
    evaluator, score, soup, figure, printed, status = values
    assert repr(evaluator) == "Evaluator(val: 400 images, test: 200 images)"
    assert repr(score).startswith("Score(top1 ")
    assert "<table><caption>greedy soup: " in soup._repr_html_()
    assert figure.axes[0].get_title(loc="left").startswith("Greedy soup")
    assert figure._repr_png_().startswith(b"\x89PNG")  # matplotlib's own figures show nothing without pyplot
    assert (printed, status) == (None, "verified")
    assert "p = " in capsys.readouterr().out
    assert all(not cell["outputs"] for cell in cells)


def test_each_example_is_listed_with_its_idea() -> None:
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert sorted(SAYS) == [path.stem for path in EXAMPLES]
    for path in (*EXAMPLES, NOTEBOOK):
        assert f"`{path.name}`" in listed


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_runs(
    path: Path,
    demo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(demo_folder, tmp_path / "clipmerge-demo", copy_function=os.link)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert SAYS[path.stem] in capsys.readouterr().out
    assert [entry.name for entry in tmp_path.iterdir()] == ["clipmerge-demo"]
