"""`clipmerge soup` on bad input: one clear error with its hint, exit code 1, and nothing written."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipmerge_cli.app import main

Refused = Callable[..., tuple[str, str]]


def _put(path: Path, **tensors: Any) -> Path:
    """A safetensors file, written byte by byte."""
    names = {"float32": "F32", "float16": "F16", "int64": "I64"}
    at, entries = 0, {}
    for name, array in tensors.items():
        entries[name] = {
            "dtype": names[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    head = json.dumps(entries).encode()
    raw = b"".join(array.tobytes() for array in tensors.values())
    path.write_bytes(len(head).to_bytes(8, "little") + head + raw)
    return path


def _ones(*shape: int, dtype: str = "float32") -> np.ndarray[Any, Any]:
    return np.ones(shape, dtype)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return _put(tmp_path / "good.safetensors", **{"visual.proj": _ones(4, 2), "logit_scale": _ones()})


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run `clipmerge soup` in a fresh folder: the error and the hint that it shows, when nothing else happens."""
    folder = tmp_path / "out"
    folder.mkdir()

    def run(*arguments: object, output: Path | None = None) -> tuple[str, str]:
        before = {path: path.read_bytes() for path in folder.iterdir()}
        code = main(["soup", *map(str, arguments), "-o", str(output or folder / "soup.safetensors")])
        said = capsys.readouterr()
        assert code == 1, said.err
        assert said.out == ""
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
        error, blank, hint = said.err.strip().rsplit("\n", 2)
        assert (error[:7], blank, hint[:6]) == ("error: ", "", "hint: ")
        return error[7:], hint[6:]

    return run


def test_a_missing_file(good: Path, refused: Refused) -> None:
    assert refused(good, good.with_name("gone.safetensors")) == (
        f"{good.with_name('gone.safetensors')} does not exist",
        "check the path",
    )


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\x03\x04", bytes(100), b"\x80\x02cos\nsystem\n."], ids=repr
)
def test_a_file_that_is_no_checkpoint(good: Path, refused: Refused, content: bytes) -> None:
    other = good.with_name("other.safetensors")
    other.write_bytes(content)
    error, hint = refused(good, other)
    assert error.startswith(str(other))
    assert hint


def test_images_in_a_checkpoints_place(tmp_path: Path, refused: Refused) -> None:
    from PIL import Image

    for name in ("images/cat/a.png", "images/dog/b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    error, hint = refused(tmp_path / "images")
    assert error == f"{tmp_path}/images holds no checkpoint"
    assert hint == "it looks like images: the DATA of an option, such as --val or --data"


def test_a_truncated_file(good: Path, refused: Refused) -> None:
    cut = good.with_name("cut.safetensors")
    cut.write_bytes(good.read_bytes()[:-3])
    error, hint = refused(good, cut)
    assert error.startswith(
        f"{cut} holds {cut.stat().st_size} bytes, its header promises {good.stat().st_size}"
    )
    assert hint == "the file is damaged or was not downloaded whole; fetch or save it again"


def test_another_architecture_lists_every_difference_at_once(good: Path, refused: Refused) -> None:
    other = _put(good.with_name("other.safetensors"), **{"visual.proj": _ones(4, 3), "logit_bias": _ones()})
    error, hint = refused(good, other)
    assert error.splitlines() == [
        "the checkpoints do not fit together:",
        f"  {other} lacks 'logit_scale' (it has 'logit_bias')",
        f"  {other} has 'logit_bias', which {good} lacks",
        f"  'visual.proj' is [4, 2] in {good} and [4, 3] in {other}",
    ]
    assert "one architecture" in hint


def test_many_missing_tensors_are_counted(tmp_path: Path, refused: Refused) -> None:
    a = _put(tmp_path / "a.safetensors", **{f"w{i:02d}": _ones(2) for i in range(30)})
    b = _put(tmp_path / "b.safetensors", w00=_ones(2))
    error, _ = refused(a, b)
    lines = error.splitlines()
    assert len(lines) == 12
    assert lines[1] == f"  {b} lacks 'w01'"
    assert lines[-1] == "  … and 19 more"


def test_the_one_of_another_architecture_is_named_not_the_many(tmp_path: Path, refused: Refused) -> None:
    """It comes first, so that each of the others differs from the one that all are compared with."""
    base = _put(tmp_path / "base.safetensors", **{f"visual.x{i:02d}": _ones(2) for i in range(30)})
    rest = [
        _put(tmp_path / f"{i}.safetensors", **{f"visual.y{j}": _ones(2) for j in range(9)}) for i in range(3)
    ]
    error, _ = refused(base, *rest)
    assert error == (
        "the checkpoints do not fit together:\n"
        f"  {base} has 30 tensors, the other 3 have 9: it is another architecture"
    )


def test_mixed_dtypes_ask_for_one(good: Path, refused: Refused) -> None:
    half = {"visual.proj": _ones(4, 2, dtype="float16"), "logit_scale": _ones(dtype="float16")}
    other = _put(good.with_name("half.safetensors"), **half)
    error, hint = refused(good, other)
    assert f"'visual.proj' is F32 in {good} and F16 in {other}" in error
    assert "--dtype" in hint


def test_not_a_number(good: Path, refused: Refused) -> None:
    broken = {"visual.proj": _ones(4, 2), "logit_scale": _ones()}
    broken["visual.proj"][3, 1] = np.nan
    other = _put(good.with_name("nan.safetensors"), **broken)
    assert refused(good, other) == (
        f"{other}: tensor 'visual.proj' holds 1 value that is not finite, the first at [3, 1]",
        "that checkpoint is damaged or diverged; leave it out, or pass --allow-nonfinite",
    )
    assert main(["soup", str(good), str(other), "--allow-nonfinite", "-o", str(good.with_name("out2"))]) == 0


def test_integers_that_differ(tmp_path: Path, refused: Refused) -> None:
    a, b = (_put(tmp_path / f"{i}.safetensors", ids=np.arange(3) + i, w=_ones(2)) for i in range(2))
    error, hint = refused(a, b)
    assert error == f"'ids' holds integers that differ between {a} and {b}"
    assert "never averaged" in hint


def test_an_output_that_exists(good: Path, refused: Refused) -> None:
    out = good.parent / "out" / "soup.safetensors"
    out.write_bytes(b"old")
    assert refused(good) == (f"{out} already exists", "choose another name, or replace it with --force")
    assert main(["soup", str(good), "-o", str(out), "--force"]) == 0
    assert out.read_bytes() != b"old"


def test_an_output_that_is_an_input_even_with_force(good: Path, refused: Refused) -> None:
    before = good.read_bytes()
    error, hint = refused(good, "--force", output=good)
    assert error == f"{good} is also an input"
    assert hint == "write to another name; inputs are never replaced"
    assert good.read_bytes() == before


def test_an_output_in_a_folder_that_does_not_exist(good: Path, refused: Refused) -> None:
    nowhere = good.parent / "nowhere"
    assert refused(good, output=nowhere / "soup.safetensors") == (
        f"the folder {nowhere} does not exist",
        f"mkdir -p {nowhere}",
    )


def test_an_output_dtype_that_overflows(tmp_path: Path, refused: Refused) -> None:
    a = _put(tmp_path / "a.safetensors", w=np.array([1e6], np.float32))
    assert refused(a, "--dtype", "fp16") == (
        "tensor 'w' reaches 1e+06, more than F16 holds (65504)",
        "write a wider dtype: --dtype fp32",
    )


def test_a_dtype_that_does_not_exist(good: Path, refused: Refused) -> None:
    error, hint = refused(good, "--dtype", "fp61")
    assert "fp61" in error.lower()
    assert "fp16" in hint or "fp64" in hint


@pytest.mark.parametrize(
    "arguments",
    [[], ["FILE"], ["-o", "OUT"], ["FILE", "-o", "OUT", "--shard-size", "big"], ["FILE", "--no-such"]],
)
def test_wrong_usage_exits_2(
    good: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]
) -> None:
    words = [{"FILE": str(good), "OUT": str(tmp_path / "out")}.get(word, word) for word in arguments]
    assert main(["soup", *words]) == 2
    assert capsys.readouterr().err
    assert not (tmp_path / "out").exists()


BOTH = ["base.safetensors", "ft0.safetensors"]
SEARCH = ["soup", *BOTH, "--greedy", "--val", "gone", "--model", "tiny.json"]
TRAIN = ["--base", "base.safetensors", "--train", "digits", "--model", "tiny.json", "--device", "cpu"]


@pytest.mark.parametrize(
    "words",
    [
        ["soup", *BOTH, "-o", "readonly/out.safetensors"],
        ["interpolate", *BOTH, "-o", "readonly/out.safetensors"],
        ["task-vector", *BOTH, "-o", "readonly/out.safetensors"],
        ["convert", "base.safetensors", "-o", "readonly/out.safetensors"],
        [*SEARCH, "-o", "readonly/out.safetensors"],
        [*SEARCH, "--plot", "readonly/curve.png"],
        [*SEARCH, "--journal", "readonly/scores.jsonl"],
        ["finetune", *TRAIN, "-o", "readonly/new/ft.safetensors"],
        ["finetune", *TRAIN, "-o", "ft.safetensors", "--plot", "readonly/curve.png"],
        ["finetune", *TRAIN, "-o", "ft.safetensors", "--tensorboard", "readonly/board"],
        ["sweep", *TRAIN, "--val", "digits", "-o", "readonly/runs", "--trials", "1"],
        ["demo", "--out", "readonly/demo"],
    ],
    ids=lambda words: words[0] + words[-2],
)
def test_a_read_only_folder_is_refused_before_any_work_in_every_command(
    words: list[str],
    tmp_path: Path,
    tiny_checkpoints: Any,
    tiny_model_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No model is built; the held-out images of a search do not exist, as whoever looks at them first would say.

    The system is asked by os.access alone, which answers as it does to a user who may not (the suite may be root's).
    """
    monkeypatch.chdir(tmp_path)
    for name in ("base", "ft0"):
        Path(f"{name}.safetensors").symlink_to(tiny_checkpoints[name])
    Path("tiny.json").symlink_to(tiny_model_file)
    Path("readonly").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "readonly" and access(path, mode))
    monkeypatch.setattr("clipmerge.model.build._construct", lambda *_, **__: pytest.fail("a model was built"))
    assert main(words) == 1
    out, err = capsys.readouterr()
    message = err.partition("error: ")[2].splitlines()[0]
    assert out == ""
    assert "readonly" in message
    assert "cannot be written" in message
    assert list(Path("readonly").iterdir()) == []


WITH_A_DEVICE = {
    "evaluate": ["base.safetensors", "--data", "digits", "--model", "tiny.json"],
    "soup": [*BOTH, "--greedy", "--val", "digits", "--model", "tiny.json"],
    "interpolate": [*BOTH, "--eval", "digits", "--model", "tiny.json"],
    "finetune": [*TRAIN[:-2], "-o", "ft.safetensors"],
    "sweep": [*TRAIN[:-2], "--val", "digits", "-o", "runs", "--trials", "1"],
}


@pytest.mark.parametrize("command", WITH_A_DEVICE)
@pytest.mark.parametrize(
    ("device", "error", "hint"),
    [
        (
            "cuda",
            "no CUDA device can be used here",
            "leave --device out to use the CPU; `nvidia-smi` shows GPUs",
        ),
        ("xpu", "'xpu' cannot be computed on here", "use auto, cpu, cuda, cuda:1 or mps"),
    ],
)
def test_a_device_that_is_not_there_is_refused_in_two_lines_in_every_command(
    command: str,
    device: str,
    error: str,
    hint: str,
    tmp_path: Path,
    tiny_checkpoints: Any,
    tiny_model_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "ft0"):
        Path(f"{name}.safetensors").symlink_to(tiny_checkpoints[name])
    Path("tiny.json").symlink_to(tiny_model_file)
    assert main([command, *WITH_A_DEVICE[command], "--device", device]) == 1
    assert capsys.readouterr() == ("", f"error: {error}\n\nhint: {hint}\n")


@pytest.mark.parametrize("command", WITH_A_DEVICE)
def test_the_device_is_chosen_the_same_way_in_every_command(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main([command, "--help"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ --device ")]
    assert "[default: auto]" in line
