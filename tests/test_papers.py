"""Every script in examples/papers/ runs on the demo's files and says whether published orderings appeared."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PAPERS = Path(__file__).resolve().parents[1] / "examples" / "papers"
SCRIPTS = sorted(path for path in PAPERS.glob("*.sh") if path.name != "start.sh")


def test_each_script_and_each_ordering_stands_in_the_table() -> None:
    table = (PAPERS / "README.md").read_text(encoding="utf-8")
    assert SCRIPTS
    for path in SCRIPTS:
        assert f"`{path.name}`" in table
        assert path.read_text(encoding="utf-8").count("\npublished ") >= 2


def test_an_ordering_appeared_was_equal_or_did_not_appear(tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    row = (
        '{{"name": "{0}", "path": "x/{0}", "scores": {{"id": {{"value": {1}}}, "shift": {{"value": {2}}}}}}}'
    )
    scores.write_text(f'{{"checkpoints": [{row.format("a", 0.5, 0.7)}, {row.format("b", 0.6, 0.7)}]}}')

    def look(*words: str) -> str:
        command = [sys.executable, str(PAPERS / "look.py"), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert look("best", str(scores), "id") == "x/b"
    assert look("best", str(scores), "shift") == "x/a"
    order = ["order", str(scores), "a claim"]
    assert look(*order, "b on id+shift", ">", "a on id+shift").endswith(
        "b on id+shift 65.00, a on id+shift 60.00: appeared"
    )
    assert look(*order, "a on id", ">", "b on id").endswith("did not appear")
    assert look(*order, "a on id", "<", "b on id").endswith(": appeared")
    assert look(*order, "a on shift", ">", "b on shift").endswith("equal")


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_script_runs(path: Path, demo_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_folder, tmp_path / "clipmerge-demo")
    done = subprocess.run(
        ["bash", str(path)],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CLIPMERGE_CACHE": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    orderings = path.read_text(encoding="utf-8").count("\npublished ")
    assert done.stdout.count("published: ") == orderings
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "cache"] == ["clipmerge-demo"]
