"""`clipmerge inspect`, `verify` and `compare`: what they show, and their exit codes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from clipmerge.weights.record import write_record
from clipmerge_cli.app import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """base and two finetuned models, then two generations of merges."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    base = {
        "visual.conv1.weight": rng.standard_normal((4, 3)),
        "visual.transformer.resblocks.0.x": rng.standard_normal(6),
        "text_projection": rng.standard_normal((2, 2)),
    }
    for name in ("base", "a", "b"):
        moved = {
            k: (v + (name != "base") * 0.1 * rng.standard_normal(v.shape)).astype("f4")
            for k, v in base.items()
        }
        training = {"training": {"method": "flyp", "lr": 1e-05}} if name != "base" else {}
        save_file(moved, f"{name}.safetensors", metadata=write_record({"format": 1, **training}))
    main(["merge", "mean([a, b])", "a=a.safetensors", "b=b.safetensors", "-o", "soup.safetensors", "-q"])
    files = ["base=base.safetensors", "soup=soup.safetensors"]
    main(["merge", "interpolate(base, soup, 0.25)", *files, "-o", "wise.safetensors", "-q"])


def test_inspect_tells_the_whole_story(run: Run) -> None:
    code, out, err = run("inspect", "wise.safetensors", "--tensors")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "holds a model, 3 tensors, 22 parameters" in lines
    assert "not finite none" in lines
    tree = [
        line.split("── ")[1].split("  ")[0]
        for line in out.splitlines()
        if "safetensors  " in line and "──" in line
    ]
    assert tree == [f"{n}: {n}.safetensors" for n in ("base", "soup", "a", "b")]
    assert "wise = 0.75*base + 0.25*soup" in out
    assert "= mean([a, b])" in out
    assert out.count("trained by flyp: lr 1e-05") == 2
    assert "visual.block[0] 1 6 F32 24 bytes 0" in lines
    assert "visual.conv1.weight F32 4×3 0" in lines


def test_inspect_goes_back_to_what_a_training_started_from(run: Run) -> None:
    base = {"file": "base.safetensors", "digest": "ab" * 32}
    for name in ("x", "y"):
        trained = write_record({"format": 1, "training": {"method": "flyp", "base": [base]}})
        save_file({"w": np.float32([1])}, f"{name}.safetensors", metadata=trained)
    assert "── trained from: base.safetensors  abababababab…" in run("inspect", "x.safetensors")[1]
    run("soup", "x.safetensors", "y.safetensors", "-o", "both.safetensors", "-q")
    assert run("inspect", "both.safetensors")[1].count("── trained from: base.safetensors") == 2
    odd = write_record({"format": 1, "training": {"base": [3, {"file": 4}, "x"]}})  # a stranger's file
    save_file({"w": np.float32([1])}, "odd.safetensors", metadata=odd)
    assert "trained from: in memory" in run("inspect", "odd.safetensors")[1]


def test_inspect_as_json(run: Run) -> None:
    found = json.loads(run("inspect", "wise.safetensors", "--json", "--tensors")[1])
    assert found["parameters"] == 22
    assert found["record"]["parents"]["soup"]["made"]["notation"] == "mean([a, b])"
    assert found["all_tensors"][0] == {
        "name": "text_projection",
        "dtype": "F32",
        "shape": [2, 2],
        "nonfinite": 0,
    }
    assert len(found["digest"]) == 64


def test_inspect_finds_what_is_not_finite(run: Run) -> None:
    save_file({"x": np.float32([1, np.nan]), "y": np.float32([np.inf])}, "bad.safetensors")
    assert "not finite  2 values in 2 tensors: x (1), y (1)" in run("inspect", "bad.safetensors")[1]
    assert "not finite  not counted" in run("inspect", "bad.safetensors", "--headers")[1]


def test_inspect_shows_selection_and_scores(run: Run) -> None:
    record = {
        "format": 1,
        "notation": "a",
        "selection": {"by": "greedy_soup", "data": "0" * 64, "value": 0.9},
        "scores": {"val": 0.9},
    }
    save_file({"x": np.float32([1])}, "s.safetensors", metadata=write_record(record))
    out = run("inspect", "s.safetensors", "--headers")[1]
    assert f"chosen by greedy soup on {'0' * 64}: score 90.00 %\n" in out  # whole, however narrow
    assert "scores: val=0.9" in out


def test_escape_sequences_in_a_file_do_not_reach_the_terminal(run: Run) -> None:
    record = {
        "format": 1,
        "notation": "\x1b[31mred\x07",
        "parents": {"\x1b[2J": {"file": "\x1b]0;title\x07"}},
    }
    save_file({"x\x1b[31m": np.float32([1])}, "s.safetensors", metadata=write_record(record))
    out = run("inspect", "s.safetensors", "--tensors")[1]
    assert "\x1b" not in out
    assert "\x07" not in out


def test_verify_says_verified(run: Run) -> None:
    code, out, err = run("verify", "wise.safetensors")
    assert (code, out) == (0, "verified: wise.safetensors\n")
    assert "0.75*base + 0.25*soup: every tensor is what the record says, bit for bit" in err
    assert json.loads(run("verify", "soup.safetensors", "--json")[1])["status"] == "verified"


def test_verify_names_the_first_tensor_that_differs(run: Run) -> None:
    content = bytearray(Path("soup.safetensors").read_bytes())
    content[-1] ^= 0x80
    Path("soup.safetensors").write_bytes(content)
    code, out, err = run("verify", "soup.safetensors")
    assert (code, out) == (1, "")
    assert "1 of the 6 elements of 'visual.transformer.resblocks.0.x' differ" in err
    code, out, _ = run("verify", "soup.safetensors", "--json")
    assert code == 1
    assert json.loads(out)["tensor"] == "visual.transformer.resblocks.0.x"


def test_verify_names_missing_parents_with_file_and_digest(run: Run) -> None:
    digest = json.loads(run("inspect", "a.safetensors", "--json")[1])["digest"]
    Path("elsewhere").mkdir()
    Path("a.safetensors").rename("elsewhere/renamed.safetensors")
    code, _, err = run("verify", "soup.safetensors")
    assert code == 1
    assert "1 of 2 parents are missing" in err
    assert f"a: a.safetensors, content digest {digest}" in err
    assert run("verify", "soup.safetensors", "--parents", "elsewhere")[0] == 0


def test_verify_needs_a_record(run: Run) -> None:
    code, _, err = run("verify", "base.safetensors")
    assert code == 1
    assert "does not say how it was made" in err


def test_compare_by_tower_and_block(run: Run) -> None:
    code, out, _ = run("compare", "a.safetensors", "b.safetensors", "--base", "base.safetensors")
    assert code == 0
    parts = [line.split()[0] for line in out.splitlines() if line.startswith((" visual", " text", " all"))]
    assert parts == ["visual", "visual.block[0]", "text", "all"]
    assert "cosine" in out
    assert out.endswith("3 of 3 float tensors differ\n")
    found = json.loads(run("compare", "a.safetensors", "b.safetensors", "--json")[1])
    assert found["whole"]["cosine"] is None
    assert 0 < found["whole"]["relative"] < 1
    assert (found["a"], found["b"]) == ("a.safetensors", "b.safetensors")


def test_compare_equal_files(run: Run) -> None:
    assert run("compare", "a.safetensors", "a.safetensors")[1].endswith("every float tensor is equal\n")


def test_compare_refuses_misfits(run: Run) -> None:
    save_file({"x": np.float32([1])}, "other.safetensors")
    code, _, err = run("compare", "a.safetensors", "other.safetensors")
    assert code == 1
    assert "other.safetensors lacks 'text_projection'" in err
