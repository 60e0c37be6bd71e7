"""The study in examples/study: its setting, its verdicts, and, slowly, every step of it on the embedded digits."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

STUDY = Path(__file__).resolve().parents[1] / "examples" / "study"
CHAPTERS = ("soups", "wiseft", "arithmetic", "methods", "paint", "flyp")


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(STUDY))
    yield importlib.import_module("study")
    sys.modules.pop("study", None)


@pytest.mark.parametrize("quick", [False, True])
def test_every_set_that_a_chapter_names_has_a_source(study: ModuleType, *, quick: bool) -> None:
    setting: dict[str, Any] = study.load_setting(STUDY / "setting.toml", quick=quick)
    paint, wise = setting["paint"], setting["wiseft"]["tasks"]
    named = [
        *setting["tasks"]["names"],
        setting["tasks"]["control"],
        *setting["arithmetic"]["analogy"].values(),
    ]
    named += [
        setting["soups"]["task"],
        setting["flyp"]["task"],
        *paint["patching"],
        *paint["supported"],
        *wise,
    ]
    named += [source for task in wise.values() for source in task["shifts"].values()]
    assert {name.partition("@")[0] for name in [*named, *setting["base"]["shares"]]} <= set(setting["sets"])
    assert len(setting["seeds"]) == (1 if quick else 3)
    assert setting["soups"]["trials"] >= (1 if quick else 16)


def test_quick_changes_what_it_names_and_nothing_else(study: ModuleType) -> None:
    whole = {"a": {"b": 1, "c": 2}, "d": [1, 2], "e": 3}
    assert study.merged(whole, {"a": {"b": 5}, "d": [1]}) == {"a": {"b": 5, "c": 2}, "d": [1], "e": 3}


def test_a_verdict_needs_an_interval_without_zero(study: ModuleType) -> None:
    # Differences 1, 2, 3: mean 2, standard deviation 1, half width 4.303 / √3 = 2.48.
    assert study.claim("x", [11, 12, 13], [10, 10, 10])[1:] == [
        "12.0 ± 2.5",
        "10.0 ± 0.0",
        "2.0 ± 2.5",
        "not told apart",
    ]
    assert study.claim("x", [12, 12.1, 12.2], [10, 10, 10])[-1] == "appeared"
    assert study.claim("x", [10, 10, 10], [12, 12.1, 12.2])[-1] == "the opposite appeared"
    assert study.claim("x", [12], [10])[-1] == "one seed: no verdict"


def test_a_result_counts_once_its_command_stands_beside_it(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        (tmp_path / "w/a.safetensors").touch()
        return subprocess.CompletedProcess(command, 0, stdout='{"n": 1}', stderr="")

    monkeypatch.setattr(study.subprocess, "run", run)
    mine = study.Study(tmp_path, {}, tmp_path, "base", "a base", 2)
    assert mine.run([("a/b", ["soup", "x y", "-o", "w/a.safetensors"])]) == [{"n": 1}]
    assert (tmp_path / "results/a/b.sh").read_text() == "clipmerge soup 'x y' -o w/a.safetensors\n"
    mine.run([("a/b", ["soup", "x y", "-o", "w/a.safetensors"])])
    assert len(ran) == 1
    mine.run([("a/b", ["soup", "z", "-o", "w/a.safetensors"])])  # another command under the same name
    assert len(ran) == 2
    (tmp_path / "w/a.safetensors").unlink()  # what it wrote is gone
    mine.run([("a/b", ["soup", "z", "-o", "w/a.safetensors"])])
    assert len(ran) == 3
    (tmp_path / "results/a/b.sh").unlink()  # stopped before the command was written
    mine.run([("a/b", ["soup", "z", "-o", "w/a.safetensors"])])
    assert len(ran) == 4


def test_the_readme_and_the_command_know_every_chapter() -> None:
    text = (STUDY / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.py`" in text and (STUDY / f"{name}.py").is_file() for name in CHAPTERS)
    assert str(CHAPTERS) in (STUDY / "run.py").read_text(encoding="utf-8").replace("'", '"').replace('"', "'")


def test_nothing_private_is_imported() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in STUDY.glob("*.py"))
    assert not re.findall(r"from clipmerge|import clipmerge\.", code)


@pytest.mark.slow
def test_the_study_runs_on_digits_and_goes_on_where_it_was(demo_folder: Path, tmp_path: Path) -> None:
    setting = (STUDY / "setting.toml").read_text(encoding="utf-8")
    shifts = iter(
        ("", "@invert", "@rotate:-30", "@blur", "@noise", "@rotate:45", "@pixelate", "@gray", "@contrast")
    )
    setting = re.sub(
        r'source = "\w+\.npz#\{part\}"', lambda _: f'source = "digits#{{part}}{next(shifts)}"', setting
    )
    (tmp_path / "setting.toml").write_text(setting, encoding="utf-8")
    command = [sys.executable, str(STUDY / "run.py"), str(tmp_path / "out"), "--quick", "--setting"]
    command += [str(tmp_path / "setting.toml"), "--base", str(demo_folder / "base.safetensors")]
    first = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    chapters = sorted(path.name for path in (tmp_path / "out" / "chapters").iterdir())
    assert chapters == ["0-base.json", *(f"{i}-{name}.json" for i, name in enumerate(CHAPTERS, 1))]
    for name in chapters:
        chapter = json.loads((tmp_path / "out" / "chapters" / name).read_text(encoding="utf-8"))
        assert chapter["commands"]
        assert all(table["rows"] for table in chapter["tables"])
    page = (tmp_path / "out" / "study.html").read_bytes()
    assert len(page) < 2_000_000
    again = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=True, env={**os.environ}
    )
    assert " s  " not in again.stdout  # no command ran
    assert (tmp_path / "out" / "study.html").read_bytes() == page
