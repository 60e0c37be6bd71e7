"""Every file in examples/ runs on the demo's files, with warnings as errors, and prints what it is about."""

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


def test_each_example_is_listed_with_its_idea() -> None:
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert sorted(SAYS) == [path.stem for path in EXAMPLES]
    for path in EXAMPLES:
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
