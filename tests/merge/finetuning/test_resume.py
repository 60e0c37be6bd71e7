"""Killed at any step, resumed to the same bytes; stopped with a word; never overwritten by what is not finite."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipmerge.errors import OutputError, TrainingError
from clipmerge.finetuning.log import read
from clipmerge.finetuning.loop import StoppedBySignalError

KILLED = """
import os, random, signal, sys
import open_clip, sklearn.datasets, torch, torchvision
from clipmerge.data.open import open_split
from clipmerge.finetuning.finetune import finetune
import clipmerge.device, clipmerge.distributed
from clipmerge.weights.weights import load

torch.set_num_threads(1)
folder, base, model, method, kills = sys.argv[1:]
more = {"ce": {"mixup": 0.4}, "flyp": {"accumulate": 2}}[method]

def run(name, resume, on_progress=None):  # only children hash: the hasher's threads do not survive a fork
    train, val = open_split("digits#train", limit=60), open_split("digits#val", limit=40)
    finetune(load(base), train, val=val, out=f"{folder}/{name}.safetensors", model=model, method=method, lr=1e-3,
             batch_size=8, steps=12, ema=0.9, clip_grad=1.0, augment="crop:0.5+flip+jitter:0.4", save_every=1,
             score_every=4, trajectory=3, resume=resume, on_progress=on_progress, **more)

if os.fork() == 0:
    run("whole", False)
    os._exit(0)
assert os.wait()[1] == 0
dice = random.Random(7)
for attempt in range(int(kills) + 1):
    child = os.fork()
    if child == 0:
        left = dice.randint(1, 2) if attempt < int(kills) else 99
        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)
        def step(what, done, total):
            global left
            if what != "steps":
                return
            left -= 1
            if left == 0 and attempt % 2:
                die()                   # after a step, before its state is written
            if left == 0:
                os.fsync = die          # while the state is being written
        run("killed", os.path.exists(f"{folder}/killed.state"), step)
        os._exit(0)
    dice.random()
    _, status = os.waitpid(child, 0)
    died = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert died == (attempt < int(kills)), (attempt, status)
"""


@pytest.mark.parametrize(("method", "kills"), [("flyp", 10), ("ce", 2)])
def test_killed_at_random_steps_equals_the_uninterrupted_run(
    method: str, kills: int, tiny_checkpoints: Any, tiny_model_file: Path, tmp_path: Path
) -> None:
    arguments = [str(tmp_path), str(tiny_checkpoints["base"]), str(tiny_model_file), method, str(kills)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    for suffix in (".safetensors", ".run/{}.step000004.safetensors", ".run/{}.step000008.safetensors"):
        whole, killed = (tmp_path / f"{name}{suffix.format(name)}" for name in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes(), suffix
    steps = [
        [e["step"] for e in read(tmp_path / f"{n}.log.jsonl") if e["event"] == "step"]
        for n in ("whole", "killed")
    ]
    assert steps[0] == steps[1] == list(range(1, 13))
    assert not list(tmp_path.glob("*.state"))


def at(step: int, act: Callable[[], object]) -> Callable[[str, int, int], None]:
    def on_progress(what: str, done: int, total: int) -> None:
        if what == "steps" and done == step:
            act()

    return on_progress


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_resume(
    tune: Callable[..., Any], tmp_path: Path, number: signal.Signals
) -> None:
    whole = tune("whole")
    with pytest.raises(StoppedBySignalError) as stopped:
        tune("ft", on_progress=at(3, lambda: os.kill(os.getpid(), number)))
    assert f"stopped by {number.name} after step 3 of 6" in stopped.value.message
    assert "ft.state" in stopped.value.message
    assert "--resume" in str(stopped.value.hint)
    assert stopped.value.exit_code == 128 + number
    assert not (tmp_path / "ft.safetensors").exists()
    with pytest.raises(TrainingError, match="unfinished run"):
        tune("ft")
    resumed = tune("ft", resume=True)
    for name, value in whole.state_dict().items():
        assert value.equal(resumed.state_dict()[name]), name
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_a_loss_that_is_not_finite_stops_before_the_state_is_overwritten(
    tune: Callable[..., Any], train: Any, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError) as stopped:
        tune("ft", lr=1e25, wd=0.0, warmup=0, save_every=1)
    said = stopped.value.message
    assert "the loss is nan at step 2 with learning rate" in said
    assert any(name in said for name in train.names)
    assert not (tmp_path / "ft.safetensors").exists()
    import torch

    state = torch.load(tmp_path / "ft.state", weights_only=True)
    assert state["step"] == 1
    last = read(tmp_path / "ft.log.jsonl")[-1]
    assert (last["event"], last["step"], len(last["items"])) == ("stopped", 2, 16)


def test_a_state_of_other_settings_is_refused(tune: Callable[..., Any]) -> None:
    with pytest.raises(TrainingError):
        tune("ft", on_progress=at(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(TrainingError, match=r"other settings: lr was 0\.001, is 0\.01"):
        tune("ft", resume=True, lr=0.01)


def test_nothing_to_resume_and_nothing_overwritten(tune: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nothing to resume"):
        tune("ft", resume=True)
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        tune("there")
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"
    (tmp_path / "bad.state").write_bytes(b"not a state")
    with pytest.raises(TrainingError, match="no training state"):
        tune("bad", resume=True)


def test_the_state_before_survives_a_write_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipmerge.finetuning.state import read_state, write_state

    path = tmp_path / "ft.state"
    write_state(path, {"settings": {}, "step": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        write_state(path, {"settings": {}, "step": 2})
    assert read_state(path, {})["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["ft.state"]


def test_the_log_is_one_json_object_a_line(tune: Callable[..., Any], tmp_path: Path, val: Any) -> None:
    events: list[Any] = []
    tune("ft", val=val, score_every=3, on_event=events.append)
    lines = [json.loads(line) for line in (tmp_path / "ft.log.jsonl").read_text().splitlines()]
    assert lines == events
    assert [e["step"] for e in events if e["event"] == "score"] == [3, 6]
    assert {"loss", "lr", "images_per_second", "seconds_left", "waiting"} <= events[0].keys()
