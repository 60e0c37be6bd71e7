"""The commands that make soups, sweeps and patches, as a user types them."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clipmerge as cm
from clipmerge.data.open import open_split
from clipmerge_cli.app import main

VAL = "digits#val"


@pytest.fixture
def ckpt(tiny_checkpoints: Mapping[str, Path]) -> dict[str, str]:
    return {name: str(path) for name, path in tiny_checkpoints.items()}


@pytest.fixture
def scoring(tiny_model_file: Path) -> list[str]:
    return ["--model", str(tiny_model_file), "--limit", "100"]


def run(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> tuple[str, str]:
    found = main(list(args))
    out, err = capsys.readouterr()
    assert found == code, err
    return out, err


def shares(path: Path) -> dict[str, Any]:
    """The record of a file that clipmerge wrote."""
    record: dict[str, Any] = cm.load(path).record
    return record


def test_no_folder_of_the_images_is_recorded(
    ckpt: dict[str, str],
    scoring: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    digits = open_split(VAL, limit=20)
    images = np.stack([np.asarray(digits.image(i)) for i in range(20)])
    np.savez("mine/val.npz", images=images, labels=digits.labels, classes=digits.classes)
    records = []
    for data in ("mine/val.npz@blur", str(tmp_path / "mine" / "val.npz@blur")):
        run(
            capsys,
            "soup",
            ckpt["ft0"],
            "--greedy",
            "--val",
            data,
            *scoring,
            "-o",
            "out.safetensors",
            "--force",
        )
        records.append(shares(Path("out.safetensors"))["selection"])
    assert records[0]["data"] == "val.npz@blur"
    assert records[0] == records[1]


def test_a_uniform_soup_is_written_without_importing_torch(ckpt: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "soup.safetensors"
    code = (
        "import sys; from clipmerge_cli.app import main; code = main(sys.argv[1:]); "
        "print(sorted(m for m in ('torch', 'open_clip', 'torchvision') if m in sys.modules)); sys.exit(code)"
    )
    args = ["soup", ckpt["ft0"], ckpt["ft1"], ckpt["ft2"], "-o", str(out)]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    assert "mean of 3 checkpoints" in done.stderr
    assert shares(out)["notation"] == "mean([ft0, ft1, ft2])"


def test_a_soup_whose_scores_are_all_remembered_needs_no_model_named(
    ckpt: dict[str, str], tiny_spec: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoints record their model; the second time none of them is loaded."""
    given = [tmp_path / f"ft{i}.safetensors" for i in range(3)]
    for path in given:
        cm.load(ckpt[path.stem]).save(path, metadata={"model": tiny_spec.to_metadata()})
    command = ["soup", *map(str, given), "--greedy", "--val", VAL, "--limit", "60"]
    first, _ = run(capsys, *command, "-o", str(tmp_path / "one.safetensors"))
    second, _ = run(capsys, *command, "-o", str(tmp_path / "two.safetensors"))
    assert first == second
    assert shares(tmp_path / "two.safetensors")["model"]["name"] == "tiny"


def test_a_greedy_soup_writes_what_it_chose_and_says_why(
    ckpt: dict[str, str], scoring: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "soup.safetensors"
    given = [ckpt[f"ft{i}"] for i in range(5)]
    table, talk = run(capsys, "soup", *given, "--greedy", "--val", VAL, *scoring, "-o", str(out), "--fresh")
    assert "greedy soup" in table
    assert "accepted" in table
    assert f"wrote {out}" in talk
    record = shares(out)
    assert record["selection"]["by"] == "greedy_soup"
    assert record["selection"]["data"] == VAL
    assert record["model"]["name"] == "tiny"
    assert sorted(record["parents"]) == sorted(record["selection"]["ingredients"])

    _, talk = run(capsys, "soup", *given, "--val", VAL, *scoring, "-o", str(out), "--force")
    assert "5 of 5 checkpoints" in talk
    assert "held out: top-1" in talk
    document, _ = run(capsys, "soup", *given, "--greedy", "--val", VAL, "--limit", "100", "--json",
                      "--model", scoring[1])  # fmt: skip
    found = json.loads(document)
    assert found["ingredients"] == record["selection"]["ingredients"]
    assert found["images"]["scored"] == 0  # the journal remembers
    assert found["output"] is None


def test_a_soup_of_ours_needs_no_model_named(
    ckpt: dict[str, str], scoring: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soups = []
    for i in range(2):
        soups.append(str(tmp_path / f"soup{i}.safetensors"))
        run(capsys, "soup", ckpt[f"ft{i}"], ckpt["base"], "--model", scoring[1], "-o", soups[-1])
    out, _ = run(capsys, "soup", *soups, "--greedy", "--val", VAL, "--limit", "50", "--json")
    assert json.loads(out)["candidates"] == ["soup0", "soup1"]


@pytest.mark.parametrize("kind", ["--learned", "--ensemble"])
def test_learned_soups_and_ensembles(
    kind: str, ckpt: dict[str, str], scoring: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["soup", ckpt["ft0"], ckpt["ft1"], kind, "--val", VAL, *scoring, "--json"]
    if kind == "--learned":
        args += ["--epochs", "1", "-o", str(tmp_path / "soup.safetensors")]
    document = json.loads(run(capsys, *args)[0])
    assert document["kind"] == {"--learned": "learned_soup", "--ensemble": "greedy_ensemble"}[kind]
    assert (tmp_path / "soup.safetensors").exists() is (kind == "--learned")


def test_a_curve_is_swept_drawn_and_its_best_point_written(
    ckpt: dict[str, str], scoring: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, figure = tmp_path / "wise.safetensors", tmp_path / "curve.png"
    table, talk = run(
        capsys, "interpolate", ckpt["base"], ckpt["ft0"], "--alphas", "0:1:0.5", *scoring,
        "--eval", f"id={VAL}", "--eval", f"shift={VAL}@rotate:20", "--plot", str(figure), "-o", str(out),
    )  # fmt: skip
    assert "best mean of id and shift" in table
    assert table.count("chosen") == 1
    assert figure.exists()
    assert figure.with_suffix(".svg").exists()
    assert "chose" in talk
    assert shares(out)["selection"]["by"] == "sweep"


def test_an_alpha_is_chosen_by_a_rule_that_needs_no_shift(
    ckpt: dict[str, str], scoring: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["interpolate", ckpt["base"], ckpt["ft0"], "--alphas", "0,0.5,1", "--eval", VAL, *scoring]
    for rule, says in (("within:100", "smallest within 100 points of the best id"), ("best-id", "best id")):
        document = json.loads(run(capsys, *command, "--rule", rule, "--json")[0])
        assert document["rule"]["says"] == says
        assert (document["coefficient"] == 0) is (rule == "within:100") or rule == "best-id"
    for rule, wrong in (
        ("within:a", "'a' is not a number"),
        ("best", "neither best-mean"),
        ("best-mean", "a shift"),
    ):
        assert main([*command, "--rule", rule]) == 2
        assert wrong in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_without_images_alpha_is_what_is_given_or_a_half(
    ckpt: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, notation in (([], "0.5*base + 0.5*ft0"), (["--alpha", "0.25"], "0.75*base + 0.25*ft0")):
        out = tmp_path / "wise.safetensors"
        run(capsys, "interpolate", ckpt["base"], ckpt["ft0"], *option, "-o", str(out), "--force")
        expected = cm.interpolate(cm.load(ckpt["base"]), cm.load(ckpt["ft0"]), float((option or [0, 0.5])[1]))
        assert shares(out)["notation"] == repr(expected), notation


def test_addition_negation_and_analogy_are_the_expressions(
    ckpt: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, a, b, c = (cm.load(ckpt[name]) for name in ("base", "ft0", "ft1", "ft2"))
    cases = {
        "add": (["add", ckpt["base"], ckpt["ft0"], ckpt["ft1"], "--scale", "0.4"],
                base + 0.4 * ((a - base) + (b - base))),
        "negate": (["negate", ckpt["base"], ckpt["ft0"], "--scale", "0.6"], base - 0.6 * (a - base)),
        "analogy": (["analogy", ckpt["base"], "--a", ckpt["ft0"], "--b", ckpt["ft1"], "--c", ckpt["ft2"],
                     "--scale", "0.5"], base + 0.5 * (c + b - a - base)),
    }  # fmt: skip
    for name, (args, expected) in cases.items():
        out = tmp_path / f"{name}.safetensors"
        _, talk = run(capsys, *args, "-o", str(out))
        assert f"wrote {out}" in talk
        assert cm.load(out).names == expected.names
        got, want = cm.load(out).state_dict(), expected.state_dict()
        assert all(bool((got[key] == want[key]).all()) for key in want)
        plan = json.loads(run(capsys, *args, "-o", str(out), "--force", "--dry-run", "--json")[0])
        assert plan["kind"] == "plan"
        assert plan["total"] == 1


def test_scales_are_chosen_where_asked(
    ckpt: dict[str, str], scoring: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["--scale", "auto", "--scales", "0,0.5,1", *scoring, "--json"]
    added = json.loads(run(
        capsys, "add", ckpt["base"], ckpt["ft0"], ckpt["ft1"], *grid,
        "--val", VAL, "--val", "digits#train",
    )[0])  # fmt: skip
    assert added["rule"]["name"] == "normalised-mean"
    assert added["splits"] == ["ft0", "ft1"]
    negated = json.loads(run(
        capsys, "negate", ckpt["base"], ckpt["ft0"], *grid, "--target", VAL, "--control", "digits#train",
        "--keep", "0.5",
    )[0])  # fmt: skip
    assert negated["rule"]["name"] == "keep-control"
    allowed = [p["coefficient"] for p in negated["history"] if p["allowed"]]
    assert negated["coefficient"] == max(allowed)
    solved = json.loads(run(
        capsys, "analogy", ckpt["base"], "--a", ckpt["ft0"], "--b", ckpt["ft1"], "--c", ckpt["ft2"], *grid,
        "--val", VAL,
    )[0])  # fmt: skip
    assert [p["coefficient"] for p in solved["history"]] == [0, 0.5, 1]


def test_addition_with_one_scale_a_tower(
    ckpt: dict[str, str], scoring: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "added.safetensors"
    document = json.loads(run(
        capsys, "add", ckpt["base"], ckpt["ft0"], "--scale", "auto", "--val", VAL, "--per", "tower",
        "--search", "random", "--budget", "4", *scoring, "--json", "-o", str(out),
    )[0])  # fmt: skip
    assert set(document["coefficients"]) == {"ft0:visual", "ft0:text", "ft0:*"}
    assert len(document["history"]) == 4
    assert out.exists()


@pytest.mark.parametrize("mode", ["single", "sequential", "joint", "parallel"])
def test_patching_in_four_ways(
    mode: str, ckpt: dict[str, str], scoring: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = mode in ("sequential", "parallel")
    models = [ckpt["ft0"], ckpt["ft1"]] if several else [ckpt["ft0"]]
    tasks = ["--patch", VAL] + (["--patch", f"{VAL}@invert"] if mode != "single" else [])
    out = tmp_path / "patched.safetensors"
    document = json.loads(run(
        capsys, "patch", ckpt["base"], *models, *tasks, "--supported", "digits#train", "--mode", mode,
        *(["--budget", "4"] if mode == "parallel" else ["--alphas", "0,0.5,1"]),
        "--keep", "3", *scoring, "--json", "-o", str(out),
    )[0])  # fmt: skip
    assert document["mode"] == mode
    assert "points at most" in str(document)
    assert list(document["coefficients"]) == (["patch1", "patch2"] if several else ["alpha"])
    assert all(step["history"] for step in document["steps"])
    assert out.exists()


def test_a_search_that_was_killed_goes_on_where_it_was(
    ckpt: dict[str, str], scoring: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL after the third score; the journal's three are not paid for again."""
    journal = tmp_path / "scores.jsonl"
    die = (
        "import os, signal, sys\n"
        "from clipmerge.evaluate.journal import Journal\n"
        "from clipmerge_cli.app import main\n"
        "put, left = Journal.put, [3]\n"
        "def dying(self, key, record):\n"
        "    put(self, key, record)\n"
        "    left[0] -= 1\n"
        "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Journal.put = dying\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    given = [ckpt[f"ft{i}"] for i in range(3)]
    args = ["soup", *given, "--greedy", "--val", VAL, *scoring, "--json", "--journal", str(journal)]
    killed = subprocess.run([sys.executable, "-c", die, *args], capture_output=True, check=False)
    assert killed.returncode == -9
    assert len(journal.read_text().splitlines()) == 3
    with journal.open("a") as torn:
        torn.write('{"key": "torn')
    resumed = json.loads(run(capsys, *args)[0])
    whole = json.loads(run(capsys, *args, "--fresh")[0])
    assert resumed["images"]["scored"] == whole["images"]["scored"] - 300
    assert same(resumed) == same(whole)


def same(document: dict[str, Any]) -> dict[str, Any]:
    """A greedy soup's document without what stopping early may change."""
    steps = [
        {key: step[key] for key in ("name", "alone", "accepted", "size", "best")}
        for step in document["history"]
    ]
    return {**document, "images": None, "output": None, "history": steps}


def together(*args: str) -> dict[str, Any]:
    """What two processes print when they search as one."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "clipmerge"]
    done = subprocess.run([sys.executable, *torchrun, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_two_processes_give_the_answer_of_one(
    ckpt: dict[str, str], scoring: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = open_split(VAL, limit=100)
    images = [np.asarray(split.image(i)) for i in range(len(split))]
    held = tmp_path / "held.npz"  # spares two processes the import of scikit-learn
    np.savez(held, images=images, labels=split.labels, classes=split.classes)
    given = [ckpt[f"ft{i}"] for i in range(3)]
    args = ["soup", *given, "--greedy", "--val", str(held), *scoring, "--json", "--fresh"]
    one, two = (tmp_path / f"{name}.safetensors" for name in ("one", "two"))
    alone = json.loads(run(capsys, *args, "-o", str(one))[0])
    assert same(together(*args, "-o", str(two))) == same(alone)
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_two_processes_learn_the_soup_of_one(
    ckpt: dict[str, str], scoring: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    args = [
        "soup",
        ckpt["ft0"],
        ckpt["ft1"],
        "--learned",
        "--val",
        VAL,
        *scoring,
        "--batch-size",
        "33",
        "--json",
    ]
    alone, found = json.loads(run(capsys, *args)[0]), together(*args)
    assert found["coefficients"] == pytest.approx(alone["coefficients"], abs=1e-5)
    assert found["temperature"] == pytest.approx(alone["temperature"], abs=1e-5)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["soup", "CKPT", "--greedy"], "held-out images: --val"),
        (["soup", "CKPT"], "where to write"),
        (["soup", "CKPT", "--greedy", "--learned", "--val", "digits"], "choose one of"),
        (
            ["soup", "CKPT", "--greedy", "--val", "digits", "--order", "best"],
            "is not one of score, given, random",
        ),
        (["soup", "CKPT", "--ensemble", "--val", "digits", "-o", "x"], "many models, not a file"),
        (
            ["add", "CKPT", "CKPT", "--scale", "auto", "--val", "digits", "--per", "task", "--refine"],
            "for one scale",
        ),
        (["interpolate", "CKPT", "CKPT", "--alpha", "0.5", "--alphas", "0:1:0.1"], "--alpha, or --alphas"),
        (["interpolate", "CKPT", "CKPT", "--alphas", "0:1:0.1"], "--eval"),
        (["interpolate", "CKPT", "CKPT", "--eval", "id=digits", "--rule", "best-mean"], "needs a shift"),
        (["interpolate", "CKPT", "CKPT"], "where to write"),
        (["add", "CKPT", "CKPT", "--scale", "auto"], "one --val for each"),
        (["add", "CKPT", "CKPT", "--scale", "much"], "--scale"),
        (["add", "CKPT", "CKPT", "--val", "digits"], "--scale auto"),
        (["negate", "CKPT", "CKPT", "--scale", "auto"], "--target and --control"),
        (["analogy", "CKPT", "--a", "CKPT", "--b", "CKPT", "--c", "CKPT", "--scale", "auto"], "held-out"),
        (["patch", "CKPT", "CKPT", "--patch", "x", "--supported", "x", "--mode", "twice"], "not one of"),
    ],
)
def test_wrong_usage_ends_with_2(
    args: list[str], says: str, ckpt: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = run(capsys, *(ckpt["ft0"] if a == "CKPT" else a for a in args), code=2)
    assert says in " ".join(err.replace("│", " ").split())


def test_what_would_be_refused_at_the_end_is_refused_at_once(
    ckpt: dict[str, str], scoring: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "soup.safetensors"
    out.write_bytes(b"mine")
    args = ["soup", ckpt["ft0"], ckpt["ft1"], "--greedy", "--val", "nowhere", "-o"]
    _, err = run(capsys, *args, str(out), code=1)
    assert "already exists" in err
    assert "hint:" in err
    assert out.read_bytes() == b"mine"
    _, err = run(capsys, *args, ckpt["ft0"], "--force", code=1)
    assert "is also an input" in err
    _, err = run(capsys, *args, str(tmp_path / "new.safetensors"), *scoring, code=1)
    assert "nowhere" in err
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("command", ["soup", "interpolate", "add", "negate", "analogy", "patch"])
def test_each_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, command, "--help")
    assert f"clipmerge {command} " in out.split("Options")[0].split("Usage")[1].split("\n", 1)[1]
