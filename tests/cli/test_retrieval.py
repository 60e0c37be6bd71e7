"""Captions at the command: scored by recall, which also chooses a soup's ingredients and an alpha."""

import json
from pathlib import Path
from typing import Any

import pytest

import clipmerge as cm
from clipmerge_cli.app import main


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twenty digits with two captions each."""
    root, digits = tmp_path_factory.mktemp("captions"), cm.open_split("digits#val", limit=20)
    rows = ["image;comment"]
    for i, label in enumerate(digits.labels):
        digits.image(i).save(root / f"{i}.png")
        rows += [f"{i}.png;number {label}, drawn by {i}", f"{i}.png;a {label}"]
    (root / "t.csv").write_text("\n".join(rows))
    return str(root / "t.csv")


@pytest.fixture
def ckpt(tiny_checkpoints: Any) -> list[str]:
    return [str(tiny_checkpoints[name]) for name in ("base", "ft0", "ft1")]


def test_captions_are_scored_by_recall(
    ckpt: list[str], tiny_model_file: Path, table: str, capsys: Any
) -> None:
    common = ["evaluate", *ckpt[:2], "--model", str(tiny_model_file), "--data", table]
    assert main([*common, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["metric"] == "recall@1"
    score = next(iter(document["checkpoints"][0]["scores"].values()))
    metrics = score["metrics"]
    assert score["value"] == metrics["recall@1"] == (metrics["text_recall@1"] + metrics["image_recall@1"]) / 2
    assert main([*common, "--metric", "text_recall@5"]) == 0
    out, err = capsys.readouterr()
    assert "20 images of" in err
    assert "40 captions" in err
    assert "queries" in out
    assert [out.count(f"recall@{k}") for k in (5, 10)] == [3, 3], "every recall has a column"
    assert main([*common, "--metric", "top1"]) == 1
    assert "captions by --metric recall@1" in capsys.readouterr().err
    assert main([*common[:-1], "digits#val", "--metric", "recall@1"]) == 1
    assert "recall@1 needs images with captions" in capsys.readouterr().err


def test_recall_decides_a_soup_and_an_alpha(
    ckpt: list[str], tiny_model_file: Path, table: str, tmp_path: Path, capsys: Any
) -> None:
    common = [
        "--model",
        str(tiny_model_file),
        "--metric",
        "image_recall@5",
        "--journal",
        str(tmp_path / "j"),
        "--json",
    ]
    soup = ["soup", *ckpt, "--greedy", "--val", table, "-o", str(tmp_path / "soup.safetensors")]
    assert main([*soup, *common]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["metric"] == "image_recall@5"
    best = max([document["history"][0]["alone"], *(step["best"] for step in document["history"])])
    assert document["score"]["value"] == best
    assert cm.load(tmp_path / "soup.safetensors").record["selection"]["metric"] == "image_recall@5"
    assert main([*soup[:-2], *common[:-1]]) == 0
    assert "p (recall@1)" in capsys.readouterr().out  # what the paired test compares
    wise = ["interpolate", *ckpt[:2], "--alphas", "0:1:0.25", "--eval", table]
    assert main([*wise, *common]) == 0
    points = json.loads(capsys.readouterr().out)["history"]
    assert len(points) == 5
    (chosen,) = [point for point in points if point["chosen"]]
    assert chosen["value"] == max(point["value"] for point in points)
    assert len({point["value"] for point in points}) > 1


def test_data_with_classes_and_data_with_captions_in_one_table(
    ckpt: list[str], tiny_model_file: Path, table: str, capsys: Any
) -> None:
    data = ["--data", "id=digits#val", "--data", f"captions={table}", "--limit", "20"]
    assert main(["evaluate", *ckpt[:2], "--model", str(tiny_model_file), *data]) == 0
    out, err = capsys.readouterr()
    assert "top-1 or recall@1, best mean first" in out
    assert "captions: captions, by retrieval" in err
    rows = [line.split()[:3] for line in out.splitlines() if line.split()[:1] == ["base"]]
    assert rows[:2] == [["base", "id", "20"], ["base", "captions", "60"]]
