"""`clipmerge merge` and `clipmerge task-vector`: expressions, recipes, plans, refusals, and what is not imported."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from clipmerge_cli.app import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """base, a and b in the working folder: 1, 2 and 4 everywhere."""
    for name, value in (("base", 1), ("a", 2), ("b", 4)):
        shapes = {"visual.proj": (3, 2), "text_projection": (2,)}
        tensors = {key: np.full(shape, value, np.float32) for key, shape in shapes.items()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


FILES = ("base=base.safetensors", "a=a.safetensors", "b=b.safetensors")


def values(path: str) -> dict[str, float]:
    return {name: float(array.reshape(-1)[0]) for name, array in load_file(path).items()}


def test_an_expression(run: Run) -> None:
    code, out, err = run("merge", "base + 0.5*((a - base) + (b - base))", *FILES, "-o", "out.safetensors")
    assert (code, out) == (0, "")
    first, second, last = err.splitlines()
    assert first == "no part of the result, as its coefficients sum to 0: base"
    assert "no input says which model it is for" in second
    assert last == "wrote out.safetensors"
    assert values("out.safetensors") == {"visual.proj": 3.0, "text_projection": 3.0}


def test_the_same_command_twice(run: Run) -> None:
    command = ["merge", "mean([a, b])", *FILES[1:], "-o", "out.safetensors"]
    assert run(*command)[0] == 0
    first = Path("out.safetensors").read_bytes()
    assert run(*command, "--dry-run")[0] == 0
    code, _, err = run(*command)
    assert (code, err.splitlines()[-1]) == (0, "out.safetensors is there already, with the same bytes")
    code, _, err = run("merge", "0.3*a + 0.7*b", *command[2:])
    assert (code, "already exists" in err) == (1, True)
    assert Path("out.safetensors").read_bytes() == first


def test_a_recipe_is_the_same_thing(run: Run, tmp_path: Path) -> None:
    text = 'base + {"visual": 0.5}*(a - base)'
    Path("r.toml").write_text(
        f'expression = \'{text}\'\noutput = "out1.safetensors"\ndtype = "fp16"\n[checkpoints]\n'
        'base = "base.safetensors"\na = "a.safetensors"\n'
    )
    assert run("merge", "r.toml")[0] == 0
    assert run("merge", text, *FILES[:2], "--dtype", "half", "-o", "out2.safetensors")[0] == 0
    assert values("out1.safetensors") == {"visual.proj": 1.5, "text_projection": 1.0}
    assert Path("out1.safetensors").read_bytes() == Path("out2.safetensors").read_bytes()


def test_the_command_line_wins_over_the_recipe(run: Run) -> None:
    Path("r.toml").write_text(
        'expression = "mean([a, b])"\noutput = "x.safetensors"\n[checkpoints]\na = "a.safetensors"\nb = "none.pt"\n'
    )
    assert run("merge", "r.toml", "b=base.safetensors", "-o", "y.safetensors")[0] == 0
    assert values("y.safetensors")["visual.proj"] == 1.5
    assert not Path("x.safetensors").exists()


def test_dry_run_shows_the_plan_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    arguments = (
        "merge",
        'base + {"visual": 0.25}*(a - base)',
        *FILES[:2],
        "-o",
        "out.safetensors",
        "--dry-run",
    )
    code, out, err = run(*arguments)
    assert code == 0
    assert "0.75*base + 0.25*a" in out
    assert "gives a model: reads 56 bytes, writes 32 bytes" in out
    assert err == "dry run: nothing was written\n"
    plan = json.loads(run(*arguments, "--json")[1])
    assert [g["formula"] for g in plan["groups"]] == ["base", "0.75*base + 0.25*a"]
    assert (plan["total"], plan["output"]) == (1, "out.safetensors")
    assert sorted(tmp_path.iterdir()) == before


def test_dry_run_refuses_what_the_run_would(run: Run) -> None:
    code, _, err = run("merge", "mean([a, b])", *FILES[1:], "-o", "a.safetensors", "--dry-run", "--force")
    assert code == 1
    assert "a.safetensors is also an input" in err


def test_all_files_that_cannot_be_read_are_told_at_once(run: Run) -> None:
    Path("half.safetensors").write_bytes(Path("a.safetensors").read_bytes()[:60])
    for command in (
        ["soup", "a.safetensors", "half.safetensors", "gone.safetensors"],
        ["merge", "mean([x, y, z])", "x=half.safetensors", "y=gone.safetensors", "z=a.safetensors"],
    ):
        code, _, err = run(*command, "-o", "out.safetensors")
        assert code == 1
        assert "2 of 3 checkpoints cannot be used" in err
        assert "half.safetensors" in err
        assert "gone.safetensors" in err


def test_extrapolation_is_said(run: Run) -> None:
    files = ["base.safetensors", "a.safetensors"]
    assert "extrapolates" not in run("interpolate", *files, "--alpha", "1", "-o", "one.safetensors")[2]
    code, _, err = run("interpolate", *files, "--alpha", "1.5", "-o", "far.safetensors")
    assert code == 0
    assert "alpha 1.5 lies beyond the two models: this extrapolates" in err


def test_a_folder_is_checked_before_any_work(run: Run, tmp_path: Path) -> None:
    for output, error in (
        ("no/such/", "the folder no does not exist"),
        ("a.safetensors/", "is a file, not a folder"),
    ):
        code, _, err = run("merge", "mean([a, b])", *FILES[1:], "-o", output, "--dry-run")
        assert code == 1
        assert error in err
    for more, error in (([], "no model is named"), (["--shard-size", "1MB"], "not shards")):
        code, _, err = run("merge", "mean([a, b])", *FILES[1:], "-o", "new/", "--dry-run", *more)
        assert code == 1
        assert error in err
    assert not Path("new").exists()


def test_a_dry_run_looks_at_every_file_that_would_be_written(run: Run) -> None:
    arguments = [
        "merge",
        "mean([a, b])",
        *FILES[1:],
        "-o",
        "soup.safetensors",
        "--shard-size",
        "8",
        "--dry-run",
    ]
    assert run(*arguments)[0] == 0
    assert run(*arguments[:-1])[0] == 0
    for there in ("soup.safetensors.index.json", next(p.name for p in Path().glob("soup-00002-of-*"))):
        code, _, err = run(*arguments)
        assert code == 1
        assert "already exists" in err
        Path(there).unlink()


def test_json_says_what_was_written(run: Run, tmp_path: Path) -> None:
    code, out, err = run("merge", "mean([a, b])", *FILES[1:], "-o", "out.safetensors", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "kind": "merge", "notation": "mean([a, b])", "output": str(tmp_path / "out.safetensors"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (("mean([a, bb])", *FILES[1:]), "there is no checkpoint 'bb'", "did you mean b?"),
        (("a + b", *FILES[1:]), "total is 2: neither a model (1)", "did you mean mean([...])?"),
        (("mean([a, b])", *FILES), "'base' is given but", "leave it out"),
        (("mean([a, b]", *FILES[1:]), "'(' was never closed", "an expression is made of"),
        (("a", "a=none.safetensors"), "none.safetensors does not exist", "check the path"),
        (("none.toml",), "none.toml cannot be read", "check the path"),
        (("a", "a=a.safetensors", "--dtype", "fp61"), "'fp61' is not a float dtype", "did you mean fp"),
        (
            ("base + {'visal': 1}*(a - base)", *FILES[:2]),
            "pattern 'visal' matches no",
            "did you mean visual?",
        ),
    ],
)
def test_refusals_name_the_thing_and_the_way_out(
    run: Run, arguments: tuple[str, ...], error: str, hint: str
) -> None:
    code, out, err = run("merge", *arguments, "-o", "out.safetensors")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert error in err
    assert f"\n\nhint: {hint}" in err
    assert not Path("out.safetensors").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("a", "a=a.safetensors"),  # nowhere to write
        ("a", "a.safetensors", "-o", "x.safetensors"),  # no name
        ("a", "a=a.safetensors", "a=b.safetensors", "-o", "x.safetensors"),
        ("a", "a=a.safetensors", "-o", "x.safetensors", "--shard-size", "lots"),
        ("a", "a=a.safetensors", "-o", "x.safetensors", "--push-to-hub", "org/name"),
    ],
)
def test_wrong_usage_is_exit_code_two(run: Run, arguments: tuple[str, ...]) -> None:
    assert run("merge", *arguments)[0] == 2


@pytest.mark.parametrize("scale", ["lots", "0.1,0.2", "0:1:0.5", "nan"])
def test_a_scale_is_one_number(run: Run, scale: str) -> None:
    for command in ("add", "negate"):
        code, _, err = run(
            command, "base.safetensors", "a.safetensors", "--scale", scale, "-o", "x.safetensors"
        )
        assert code == 2
        assert f"'{scale}' is neither a number nor auto" in err


def test_an_output_named_as_torchs_is_refused(run: Run) -> None:
    code, _, err = run("soup", "a.safetensors", "b.safetensors", "-o", "soup.pt")
    assert code == 2
    assert "the output is safetensors: -o soup.safetensors" in " ".join(err.replace("│", " ").split())
    assert not Path("soup.pt").exists()


def test_a_pattern_in_quotes_is_explained(run: Run) -> None:
    _, _, err = run("soup", "*.safetensors", "-o", "out.safetensors")
    assert "error: *.safetensors is a pattern, not a file\n\nhint: leave out the quotes" in err
    _, _, err = run("soup", "none*.safetensors", "-o", "out.safetensors")
    assert "error: no file matches none*.safetensors" in err


def test_a_file_without_a_name_is_explained(run: Run) -> None:
    said = " ".join(run("merge", "a", "a.safetensors")[2].replace("│", " ").split())
    assert "'a.safetensors' is not NAME=FILE, such as a=a.pt" in said


def test_shards(run: Run) -> None:
    assert run("merge", "mean([a, b])", *FILES[1:], "-o", "out.safetensors", "--shard-size", "24")[0] == 0
    assert Path("out.safetensors.index.json").exists()
    code, out, err = run(
        "soup", "a.safetensors", "b.safetensors", "-o", "soup.safetensors", "--shard-size", "24"
    )
    assert (code, out) == (0, "")
    assert err.endswith("wrote soup.safetensors.index.json\n")
    assert run("verify", "out.safetensors.index.json")[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("merge", "mean([a, b])", *FILES[1:]),
        ("soup", "a.safetensors", "b.safetensors"),
        ("interpolate", "a.safetensors", "b.safetensors"),
        ("add", "base.safetensors", "a.safetensors", "b.safetensors"),
        ("negate", "base.safetensors", "a.safetensors"),
        (
            "analogy",
            "base.safetensors",
            "--a",
            "a.safetensors",
            "--b",
            "b.safetensors",
            "--c",
            "b.safetensors",
        ),
        ("task-vector", "base.safetensors", "a.safetensors"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_without_digests_a_file_cannot_be_verified(run: Run, arguments: tuple[str, ...]) -> None:
    assert run(*arguments, "-o", "out.safetensors", "--no-digests", "--fsync")[0] == 0
    code, _, err = run("verify", "out.safetensors")
    assert code == 1
    assert "without its parents' digests" in err


def test_a_task_vector_is_a_file_that_knows_what_it_is(run: Run) -> None:
    assert run("task-vector", "base.safetensors", "b.safetensors", "-o", "b.tv.safetensors")[0] == 0
    assert values("b.tv.safetensors") == {"visual.proj": 3.0, "text_projection": 3.0}
    added = (
        "merge",
        "base + 0.5*tv",
        "base=base.safetensors",
        "tv=b.tv.safetensors",
        "-o",
        "added.safetensors",
    )
    assert run(*added)[0] == 0
    assert values("added.safetensors")["visual.proj"] == 2.5
    assert "holds       a task vector" in run("inspect", "b.tv.safetensors")[1]
    assert run("verify", "b.tv.safetensors")[0] == run("verify", "added.safetensors")[0] == 0


def test_a_task_vector_stands_for_its_model(run: Run) -> None:
    """Beside a base, base + vector; the same numbers as with the checkpoint that the vector was made of."""
    run("task-vector", "base.safetensors", "b.safetensors", "-o", "tv.safetensors", "--dtype", "fp64")
    for command, option, value in (
        ("add", "--scale", "0.4"),
        ("negate", "--scale", "0.6"),
        ("interpolate", "--alpha", "0.3"),
    ):
        made = []
        for ingredient in ("b", "tv"):
            arguments = [command, "base.safetensors", f"{ingredient}.safetensors", option, value]
            code, _, err = run(*arguments, "-o", f"{command}-{ingredient}.safetensors")
            assert code == 0, err
            made.append(load_file(f"{command}-{ingredient}.safetensors"))
        for name, array in made[0].items():
            np.testing.assert_allclose(made[1][name], array, rtol=1e-6)


def test_a_task_vector_is_no_ingredient_and_no_folder(run: Run) -> None:
    run("task-vector", "base.safetensors", "b.safetensors", "-o", "tv.safetensors")
    code, _, err = run(
        "merge", "mean([a, tv])", "a=a.safetensors", "tv=tv.safetensors", "-o", "x.safetensors"
    )
    assert code == 1
    assert "total is 0.5" in err
    code, _, err = run("soup", "a.safetensors", "tv.safetensors", "-o", "x.safetensors")
    assert code == 1
    assert "tv.safetensors is a task vector, not a model\n\nhint: add it to its base" in err
    code, _, err = run("task-vector", "base.safetensors", "b.safetensors", "-o", "folder/")
    assert code == 1
    assert "a task vector is not a model to publish" in err


def test_merging_safetensors_imports_no_model_library(tmp_path: Path) -> None:
    """torch takes longer to import than eight checkpoints to merge."""
    script = """
import sys
from clipmerge_cli.app import main
files = ["base=base.safetensors", "a=a.safetensors"]
assert main(["merge", "base + 0.4*(a - base)", *files, "-o", "out.safetensors", "--quiet"]) == 0
assert main(["merge", "base + 0.4*(a - base)", *files, "--dry-run", "--json"]) == 0
assert main(["task-vector", "base.safetensors", "a.safetensors", "-o", "tv.safetensors", "--quiet"]) == 0
assert main(["verify", "out.safetensors", "--quiet"]) == 0
assert main(["inspect", "out.safetensors"]) == 0
assert main(["compare", "a.safetensors", "out.safetensors"]) == 0
heavy = {"torch", "torchvision", "open_clip", "sklearn", "matplotlib", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def record_of(path: str) -> dict[str, Any]:
    from clipmerge.weights.weights import load

    return load(path).record


def test_the_model_can_be_named(
    run: Run, tiny_model_file: Path, tiny_checkpoints: Mapping[str, Path]
) -> None:
    named = ("-o", "out.safetensors", "--model", str(tiny_model_file))
    files = [f"{name}={tiny_checkpoints[name]}" for name in ("base", "ft0")]
    code, _, err = run("merge", "mean([base, ft0])", *files, *named)
    assert code == 0
    assert "no input says" not in err
    record = record_of("out.safetensors")["model"]
    assert record["config"]["embed_dim"] == 16
    assert record["preprocess"] == {
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
    }  # what is stated, not what open_clip adds
    for more in ((), ("--dry-run",)):
        code, _, err = run("merge", "mean([a, b])", *FILES[1:], *named, "--force", *more)
        assert code == 1
        assert "the weights do not fit the model" in err


def test_a_checkpoint_given_twice_is_remarked_once_whatever_it_is_called(
    tiny_checkpoints: Any, tiny_model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (str(tiny_checkpoints[name]) for name in ("ft0", "ft1"))
    copy = shutil.copy(a, tmp_path / "copy.safetensors")
    out = str(tmp_path / "out.safetensors")
    for words, said in (
        (["soup", a, b, str(copy)], "copy and ft0 are the same checkpoint"),
        (["soup", a, a], "ft0 and ft0_2 are the same checkpoint"),
        (["interpolate", a, str(copy)], "copy and ft0 are the same checkpoint"),
        (["add", a, a, b], "ft0 and ft0_2 are the same checkpoint"),
        (["task-vector", a, str(copy)], "copy and ft0 are the same checkpoint"),
        (["merge", "x + 0.5*(y - x)", f"x={a}", f"y={copy}"], "x and y are the same checkpoint"),
    ):
        assert main([*words, "-o", out, "--force"]) == 0
        assert [line for line in capsys.readouterr().err.splitlines() if "same checkpoint" in line] == [said]
    searched = ["soup", a, str(copy), b, "--greedy", "--val", "digits#val", "--limit", "20"]
    for written in ([], ["-o", str(tmp_path / "greedy.safetensors")]):
        assert main([*searched, "--model", str(tiny_model_file), *written]) == 0
        remarks = [line for line in capsys.readouterr().err.splitlines() if "same checkpoint" in line]
        assert remarks == ["copy and ft0 are the same checkpoint"]


def test_what_adds_nothing_is_remarked(
    tiny_checkpoints: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (str(tiny_checkpoints[name]) for name in ("ft0", "ft1"))
    for i, (words, said) in enumerate((
        (["merge", "x + 0*(y - x)", f"x={a}", f"y={b}"], "no part of the result, as its coefficients sum to 0: y"),
        (["merge", "x + (y - y)", f"x={a}", f"y={b}"], "no part of the result, as its coefficients sum to 0: y"),
        (["interpolate", a, b, "--alpha", "0"], "alpha 0 changes nothing: this is the base"),
        (["add", a, b, "--scale", "0"], "scale 0 changes nothing: this is the base"),
        (["soup", a], "uniform soup of one checkpoint: a copy of it"),
    )):  # fmt: skip
        assert main([*words, "-o", str(tmp_path / f"{i}.safetensors")]) == 0
        assert capsys.readouterr().err.splitlines()[0] == said
