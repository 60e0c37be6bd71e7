"""`clipmerge report` on what the other commands print and write."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from clipmerge_cli.app import main


def run(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> tuple[str, str]:
    found = main(list(args))
    out, err = capsys.readouterr()
    assert found == code, err
    return out, err


def test_what_commands_leave_stands_on_the_page(
    tiny_checkpoints: Mapping[str, Path],
    tiny_model_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scoring = ["--model", str(tiny_model_file)]
    base, first, second = (str(tiny_checkpoints[name]) for name in ("base", "ft0", "ft1"))
    images = ["--val", "digits#val[:40]"]
    two = ["--val", "digits#val[:40]", "--val", "digits#val[:40]@rotate:20"]
    patch = ["--patch", "digits#val[:40]", "--supported", "digits#val[:40]@rotate:20", "--alphas", "0,0.5,1"]
    several = [*("--patch", "a=digits#val[:40]"), *("--patch", "b=digits#val[:40]@noise")]
    several += ["--supported", "digits#val[:40]@rotate:20"]
    commands = {
        "uniform": ["soup", first, second, "-o", str(tmp_path / "uniform.safetensors")],
        "greedy": ["soup", first, second, "--greedy", *images, *scoring],
        "ensemble": ["soup", first, second, "--ensemble", *images, *scoring],
        "learned": ["soup", first, second, "--learned", "--epochs", "1", *images, *scoring],
        "wise": ["interpolate", base, first, "--alphas", "0,0.5,1", "--eval", "id=digits#val[:40]", *scoring],
        "patched": ["patch", base, first, *patch, *scoring],
        "parallel": ["patch", base, first, second, "--mode", "parallel", *several, "--budget", "4", *scoring],
        "board": ["leaderboard", base, first, second, *two, "--method", "mean", "--method", "ties", *scoring],
        "scores": ["evaluate", base, "uniform.safetensors", "--data", "test=digits#test[:40]", *scoring],
    }
    documents: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    for name, command in commands.items():
        out, _ = run(capsys, *command, "--json", "--quiet")
        documents[name] = json.loads(out)
        (tmp_path / f"{name}.json").write_text(out, encoding="utf-8")
    (tmp_path / "commands.sh").write_text("clipmerge soup 'a b'\n", encoding="utf-8")

    _, talk = run(capsys, "report", str(tmp_path), "--title", "Mine & yours")
    assert "passed over" not in talk
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = {name for name in commands if f">{name}</h2>" in page}
    assert shown == set(commands)
    assert "<h1>Mine &amp; yours</h1>" in page
    assert "clipmerge soup &#39;a b&#39;" in page
    assert page.count("<dd>mean([ft0, ft1])</dd>") == 3  # of the file, its scores, and the board's mean
    (value,) = documents["scores"]["checkpoints"][1]["scores"].values()
    assert f">{100 * value['value']:.10g}</td>" in page
    best = documents["board"]["entries"][2]
    assert f">{round(100 * best['normalised'], 2):.10g}</td>" in page
    point = documents["wise"]["history"][1]
    assert f"id: 0.5, {100 * point['scores']['id']['value']:.4g}" in page


def test_what_is_no_folder_or_holds_no_result_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, talk = run(capsys, "report", str(tmp_path / "none"), code=1)
    assert "is no folder" in talk
    _, talk = run(capsys, "report", str(tmp_path), code=1)
    assert "is a result of clipmerge" in talk
    assert list(tmp_path.iterdir()) == []
