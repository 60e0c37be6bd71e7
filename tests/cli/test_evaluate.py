"""`clipmerge evaluate`, as it is typed."""

import json
import os
import socket
import subprocess
import sys
from typing import Any, get_args

import pytest
from PIL import Image

from clipmerge.evaluate.metrics import METRICS
from clipmerge_cli.app import main
from clipmerge_cli.scoring import Metric


@pytest.fixture
def files(tiny_checkpoints: Any) -> list[str]:
    return [str(tiny_checkpoints["base"]), str(tiny_checkpoints["ft0"])]


def test_a_table_with_intervals_for_each_checkpoint_and_split(files, tiny_model_file, capsys):
    data = ["--data", "id=digits#val", "--data", "digits#val@invert"]
    assert main(["evaluate", *files, "--model", str(tiny_model_file), *data, "--limit", "50"]) == 0
    out, leaderboard = capsys.readouterr().out.split("top-1, best mean first")
    assert "mean" in leaderboard
    rows = [line.split() for line in out.splitlines() if line.split()[:1] in (["base"], ["ft0"])]
    assert [row[:3] for row in rows] == [
        ["base", "id", "50"],
        ["base", "digits#val@invert", "50"],
        ["ft0", "id", "50"],
        ["ft0", "digits#val@invert", "50"],
    ]
    assert "top-1" in out
    assert "95 %" in out


def test_json_holds_what_the_library_says(files, tiny_model_file, tiny_spec, capsys):
    from clipmerge.data.open import open_split
    from clipmerge.evaluate.evaluator import Evaluator
    from clipmerge.weights.weights import load

    arguments = ["--model", str(tiny_model_file), "--data", "digits#val", "--metric", "macro_f1", "--json"]
    assert main(["evaluate", *files, *arguments]) == 0
    document = json.loads(capsys.readouterr().out)
    evaluator = Evaluator(open_split("digits#val"), tiny_spec, metric="macro_f1")
    for row, path in zip(document["checkpoints"], files, strict=True):
        score = evaluator.score(load(path))
        assert row["scores"]["digits#val"] == {
            **score.to_json(),
            "p": pytest.approx(row["scores"]["digits#val"]["p"]),
        }
    assert document["metric"] == "macro_f1"
    assert document["checkpoints"][0]["scores"]["digits#val"]["p"] == 1.0


def test_mistakes_are_told(files, tiny_model_file, capsys):
    assert main(["evaluate", *files, "--data", "digits"]) == 1
    assert "error: no model is named" in capsys.readouterr().err
    assert main(["evaluate", *files, "--model", "ViT-B-23", "--data", "digits"]) == 1
    assert "hint: did you mean ViT-B-32?" in capsys.readouterr().err
    assert main(["evaluate", *files, "--model", "ViT-B-32", "--data", "digits", "--limit", "3"]) == 1
    assert "the weights do not fit the model" in capsys.readouterr().err
    assert main(["evaluate", *files, "--data", "a=digits", "--data", "a=digits#val"]) == 2
    assert "given twice" in capsys.readouterr().err
    assert main(["evaluate", *files, "--data", "digits", "--metric", "acc"]) == 2
    assert "'acc' is not one of top1" in capsys.readouterr().err
    assert main(["evaluate", *files, "--data", "digits", "--precision", "fp8"]) == 2
    assert "'fp8' is not one of" in capsys.readouterr().err


def test_metrics_on_offer_are_those_there_are():
    assert get_args(Metric) == tuple(METRICS)


def test_what_is_left_out_is_said(files, tiny_model_file, tmp_path, capsys):
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "set" / name / "good.png")
    (tmp_path / "set" / "a" / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "set" / "c").mkdir()
    given = ["evaluate", files[0], "--model", str(tiny_model_file), "--data", str(tmp_path / "set")]
    assert main([*given, "--skip-bad"]) == 0
    said = "left out 2 (class 'c': no images … and 1 more); 2 images are used"
    assert said in capsys.readouterr().err
    assert main([*given, "--skip-bad", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_a_process_that_is_lost_is_one_sentence_of_those_that_stay(files, tiny_model_file):
    """Two processes, as torchrun starts them; the second is killed when its first images come to the model."""
    arguments = [
        "evaluate",
        files[0],
        "--model",
        str(tiny_model_file),
        "--data",
        "digits#val",
        "--limit",
        "64",
    ]
    code = (
        "import os, signal, sys\n"
        "import open_clip, sklearn.datasets, torchvision\n"  # once, before the processes part
        "from clipmerge.evaluate.predictor import Predictor\n"
        "from clipmerge_cli import main\n"
        "other = os.fork()\n"
        "os.environ |= {'RANK': str(int(not other)), 'LOCAL_RANK': str(int(not other))}\n"
        "if not other: Predictor._logits = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"sys.argv = ['clipmerge', *{arguments!r}, '--device', 'cpu']\n"
        "sys.exit(main())"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **place, "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.partition("error: ")[2] == (
        "another process of this run stopped\n\n"
        "hint: its own message says why; without one it was killed, perhaps for want of memory\n"
    )
