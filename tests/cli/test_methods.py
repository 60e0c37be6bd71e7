"""Merging methods, as a user types them."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

import clipmerge as cm
from clipmerge.weights.methods import METHODS
from clipmerge_cli.app import main

TIES = "zs + scale*ties([a - zs, b - zs], density=0.5)"


@pytest.fixture
def named(tiny_checkpoints: Mapping[str, Path]) -> list[str]:
    return [f"{n}={tiny_checkpoints[f]}" for n, f in (("zs", "base"), ("a", "ft0"), ("b", "ft1"))]


@pytest.fixture
def scoring(tiny_model_file: Path) -> list[str]:
    return ["--model", str(tiny_model_file), "--limit", "30"]


def run(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> tuple[str, str]:
    found = main(list(args))
    out, err = capsys.readouterr()
    assert found == code, err
    return out, err


def test_every_method_is_listed_with_options_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    out, talk = run(capsys, "methods")
    rows = json.loads(run(capsys, "methods", "--json")[0])["methods"]
    assert [row["name"] for row in rows] == list(METHODS)
    for name in METHODS:
        assert f"\n {name} " in out
    assert "density=0.2, scope=model" in out
    assert "arXiv 2306.01708" in out
    assert "    density: share of entries that each vector keeps" in talk
    assert rows[0]["options"]["equalise"]["default"] is False


def test_a_number_stands_for_scale(
    named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out.safetensors")
    run(capsys, "merge", TIES, *named, "--scale", "0.5", "-o", out)
    assert cm.load(out).record["notation"] == 'zs + 0.5*ties([a - zs, b - zs], density=0.5, scope="model")'
    assert cm.verify(out, [Path(f.partition("=")[2]).parent for f in named]).status == "verified"


def test_shared_options_go_to_every_method_that_has_them(
    named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out.safetensors")
    text = "zs + iso_c([a - zs, b - zs]) + magmax([a - zs, b - zs], equalise=False)"
    run(capsys, "merge", text, *named, "--fused", "--equalise", "-o", out)
    notation = cm.load(out).record["notation"]
    assert notation == "zs + iso_c([a - zs, b - zs], equalise=True, fused=True) + magmax([a - zs, b - zs])"
    text = "zs + ties([a - zs, b - zs]) + svc([a - zs, b - zs]) - tsv([a - zs, b - zs], space='knots')"
    run(capsys, "merge", text, *named, "--space", "core", "-o", out, "--force")
    notation = cm.load(out).record["notation"]
    assert 'ties([a - zs, b - zs], density=0.2, scope="tensor", space="core")' in notation
    assert 'tsv([a - zs, b - zs], space="knots")' in notation
    assert "svc([a - zs, b - zs], alpha=0.1)" in notation
    assert cm.verify(out, [Path(f.partition("=")[2]).parent for f in named]).status == "verified"


@pytest.mark.parametrize("text", [TIES, "zs + ties([a - zs, b - zs], density=0.5)"])
def test_the_free_number_is_chosen_on_images(
    text: str, named: list[str], scoring: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out.safetensors")
    auto = [
        "--scale",
        "auto",
        "--val",
        "a=digits#val",
        "--val",
        "b=digits#val@rotate:20",
        "--scales",
        "0.5,1",
    ]
    table, talk = run(capsys, "merge", text, *named, *auto, *scoring, "-o", out, "--fresh")
    assert "best mean of a and b, each over its finetuned model's" in table
    record = cm.load(out).record
    assert f"chose scale = {'0.5' if '0.5*ties' in record['notation'] else '1'}" in talk
    assert record["selection"]["by"] == "sweep"
    assert cm.verify(out, [Path(f.partition("=")[2]).parent for f in named]).status == "verified"


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["zs + a - zs", "--val", "a=digits"], 2, "--val is for --scale auto"),
        ([TIES, "--scale", "auto"], 2, "--scale auto needs held-out images: --val DATA"),
        ([TIES, "--scale", "auto", "--val", "c=digits"], 2, "'c' is no checkpoint of the expression"),
        ([TIES, "--scale", "much"], 2, "neither a number nor auto"),
        ([TIES], 1, "there is no checkpoint 'scale'"),
        (["ties([a - zs, b - zs])", "--scale", "2"], 1, "write it as scale: zs + scale*ties"),
        (["mean([a, b, zs])", "--scale", "2"], 1, "the expression has no free number"),
    ],
)
def test_what_is_refused(
    args: list[str], code: int, message: str, named: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "200")
    _, talk = run(capsys, "merge", *args, *named, "-o", str(tmp_path / "out.safetensors"), code=code)
    assert message in talk


def test_a_leaderboard(
    tiny_checkpoints: Mapping[str, Path], scoring: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(tiny_checkpoints[name]) for name in ("base", "ft0", "ft1")]
    data = [*("--val", "digits#val"), *("--val", "digits#val@rotate:20")]
    data += [*("--test", "digits"), *("--test", "digits@rotate:20")]
    methods = ["--method", "mean", "--method", "ties(density=0.5)", "--scales", "0.25,0.75"]
    board = json.loads(run(capsys, "leaderboard", *files, *data, *methods, *scoring, "--json")[0])
    assert [entry["name"] for entry in board["entries"][:2]] == ["zero-shot", "finetuned"]
    assert {entry["name"] for entry in board["entries"][2:]} == {"mean", "ties(density=0.5)"}
    assert {entry["scale"] for entry in board["entries"]} <= {None, 0.25, 0.75}
    assert (board["reported"], board["tasks"]) == ("test", ["ft0", "ft1"])
    out, _ = run(capsys, "leaderboard", *files, *data[:4], *methods[:2], *scoring)
    assert "normalised" in out
    _, talk = run(capsys, "leaderboard", *files, "--val", "digits", code=2)
    assert "one --val for each task: 2, not 1" in talk


def test_task_vectors_are_compared_before_a_merge(
    tiny_checkpoints: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(tiny_checkpoints[f"ft{i}"]) for i in range(3)]
    base = ["--base", str(tiny_checkpoints["base"])]
    out, talk = run(capsys, "compare", *files, *base, "--plot", str(tmp_path / "tasks.png"))
    assert "Task vectors, and their cosines" in out
    assert "sign conflicts, %" in out
    assert "visual.block[1]" in out
    assert "warning" not in talk
    assert (tmp_path / "tasks.png").stat().st_size > 10_000
    assert (tmp_path / "tasks.svg").exists()
    found = json.loads(run(capsys, "compare", *files, *base, "--json")[0])["task_vectors"]
    assert found["tasks"] == ["ft0", "ft1", "ft2"]
    assert abs(found["whole"]["conflicts"][0][1] - 0.5) < 0.01  # independent noise


def test_the_barrier_between_two(
    tiny_checkpoints: Mapping[str, Path], scoring: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(tiny_checkpoints[name]) for name in ("ft0", "ft1")]
    found = json.loads(run(capsys, "compare", *files, "--data", "digits#val", *scoring, "--json")[0])[
        "barrier"
    ]
    values = {score["alpha"]: score["value"] for score in found["scores"]}
    assert sorted(values) == [i / 10 for i in range(11)]
    falls = {x: (1 - x) * values[0] + x * values[1] - value for x, value in values.items()}
    assert found["height"] == pytest.approx(max(falls.values()))
    out, _ = run(capsys, "compare", *files, "--data", "digits#val", *scoring)
    assert f"points at alpha {found['alpha']:g}\n" in out


@pytest.mark.parametrize("more", [[], ["--base", "x", "--data", "digits"]])
def test_what_compare_refuses(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "CKPT" in run(capsys, "compare", "a", *([] if more else ["b", "c"]), *more, code=2)[1]
