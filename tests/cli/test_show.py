"""stdout carries data, stderr carries talk; a table reads well at any width."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from clipmerge_cli import show


def test_a_table_on_a_pipe_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    show.table(("model", "top-1"), [("a", 0.5), ("longer", None)], title="Scores")
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "Scores",
        "",
        " model    top-1",
        " ──────────────",
        " a          0.5",
        " longer       –",
        "",
    ]


def test_square_brackets_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    show.table(("name",), [("visual.block[0:6]",), ("[bold]",)])
    out = capsys.readouterr().out
    assert "visual.block[0:6]" in out
    assert "[bold]" in out


def test_cells_are_never_broken_where_the_terminal_is_narrow(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    show.table(("checkpoint", "mean per class", "95 %"), [("a" * 20, "96.43", "93.9–97.9")])
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    for cell in ("a" * 20, "96.43", "93.9–97.9", "mean", "class"):
        assert cell in out
    assert max(map(len, out.splitlines())) <= 40


def test_json_takes_paths_and_numpy(capsys: pytest.CaptureFixture[str]) -> None:
    show.document({"path": Path("α/b"), "score": np.float64(0.5), "bits": np.array([1, 0])})
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == ({"path": "α/b", "score": 0.5, "bits": [1, 0]}, "")


def test_json_has_null_for_what_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    show.document({"a": [float("nan"), np.float32("inf")], "b": {"c": -float("inf"), "d": "NaN"}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None], "b": {"c": None, "d": "NaN"}}


def test_the_written_file_is_named_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = (tmp_path / "a" / "b.pt", Path("b.pt"), Path("/elsewhere/b.pt"))
    assert [show.short(path) for path in paths] == ["a/b.pt", "b.pt", "/elsewhere/b.pt"]


def test_talk_goes_to_stderr_or_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    show.say("one")
    show.say("two", quiet=True)
    assert capsys.readouterr() == ("", "one\n")


def test_a_duration_as_one_reads_it() -> None:
    assert [show.duration(s) for s in (8.24, 200.2, 7500)] == ["8.2 s", "3 min 20 s", "2 h 5 min"]
