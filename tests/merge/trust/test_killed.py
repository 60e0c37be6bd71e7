"""SIGKILL and Ctrl-C at any moment: the target is the old file or the new file, whole."""

import fcntl
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipmerge.weights.weights import load

# One process prepares, and forks a child for each kill: no child pays for starting an interpreter.
KILL = """
import hashlib, json, os, random, signal, sys, time
from pathlib import Path
import clipmerge as cm

folder, kills, shard_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) or None
target = folder / "out.safetensors"
a, b = cm.load(folder / "a.safetensors"), cm.load(folder / "b.safetensors")
choices = [cm.interpolate(a, b, 0.25), cm.interpolate(a, b, 0.75)]
options = {"force": True, "digests": False, "shard_size": shard_size}

def digest():
    index = folder / "out.safetensors.index.json"
    if shard_size is None:
        files = [target]
    elif index.exists():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        return "no index"
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

whole = ["no index"] if shard_size else []
for weights in choices:
    weights.save(target, **options, threads=1)
    whole.append(digest())
seen, left = [], []
for turn in range(kills):
    ready, started = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(started, b"x")
        while True:
            for weights in choices:
                weights.save(target, **options, threads=2)
    os.read(ready, 1)
    time.sleep(random.uniform(0, 0.04))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen.append(whole.index(digest()) if digest() in whole else None)
    left.append(sorted(p.name for p in folder.iterdir() if p.suffix == ".clipmerge-tmp"))
choices[0].save(target, **options)
print(json.dumps({"seen": seen, "left": left, "files": sorted(os.listdir(folder))}))
"""


def _kill(
    folder: Path, put: Callable[..., Path], program: Callable[..., Any], times: int, shard_size: int = 0
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        put(
            folder / f"{name}.safetensors",
            **{f"w{i}": rng.standard_normal((512, 512), np.float32) for i in range(2)},
        )
    done = program(KILL, folder, times, shard_size)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("times", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_a_run_killed_while_it_overwrites_leaves_the_old_or_the_new_file_whole(
    tmp_path: Path, put: Callable[..., Path], program: Callable[..., Any], times: int
) -> None:
    found = _kill(tmp_path, put, program, times)
    assert len(found["seen"]) == times
    assert None not in found["seen"]
    assert any(found["left"]), "no kill hit a run that was writing"
    for names in found["left"]:
        assert len(names) <= 1  # each run cleared what the one before had left
        for name in names:
            assert name.startswith(".out.safetensors.")
    assert found["files"] == ["a.safetensors", "b.safetensors", "out.safetensors"]


@pytest.mark.parametrize("times", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_a_run_killed_while_it_overwrites_shards_leaves_those_of_one_run_or_no_index(
    tmp_path: Path, put: Callable[..., Path], program: Callable[..., Any], times: int
) -> None:
    found = _kill(tmp_path, put, program, times, shard_size=1_000_000)
    assert None not in found["seen"]
    assert all(len(names) <= 3 for names in found["left"])
    shards = [f"out-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    assert found["files"] == sorted(["a.safetensors", "b.safetensors", *shards, "out.safetensors.index.json"])


def _interrupted(
    arguments: list[Any], folder: Path, number: signal.Signals
) -> subprocess.CompletedProcess[str]:
    """Start the command, wait until it writes, and send it a signal."""
    running = subprocess.Popen(
        [sys.executable, "-m", "clipmerge", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not any(p.name.endswith(".clipmerge-tmp") for p in folder.iterdir()):
        assert running.poll() is None, running.stderr and running.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    running.send_signal(number)
    said, errors = running.communicate(timeout=60)
    return subprocess.CompletedProcess(running.args, running.returncode, said, errors)


@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")], ids=["INT", "TERM"]
)
def test_a_signal_during_a_merge_is_one_line_and_leaves_target_and_folder_as_they_were(
    tmp_path: Path, put_sparse: Callable[..., Path], number: signal.Signals, word: str
) -> None:
    names = [put_sparse(tmp_path / f"{name}.safetensors", "F16", (60_000_000,)) for name in "ab"]
    target = tmp_path / "out" / "soup.safetensors"
    target.parent.mkdir()
    target.write_bytes(b"the old file")
    done = _interrupted(["soup", *names, "-o", target, "--force"], target.parent, number)
    assert done.returncode == 128 + number
    assert done.stderr.splitlines()[-1] == word
    assert "Traceback" not in done.stderr
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert target.read_bytes() == b"the old file"


def test_leftovers_of_dead_writers_are_cleared_and_those_of_live_writers_are_not(
    tmp_path: Path, put: Callable[..., Path], leftovers: Callable[[Path], list[str]]
) -> None:
    weights = load(put(tmp_path / "a.safetensors", w=np.ones(4, np.float32)))
    dead = tmp_path / ".out.safetensors.0badcafe.clipmerge-tmp"
    live = tmp_path / ".out.safetensors.12345678.clipmerge-tmp"
    other = tmp_path / ".out.safetensors.bak.12345678.clipmerge-tmp"
    for path in (dead, live, other):
        path.write_bytes(b"half a file")
    with live.open("rb+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        weights.save(tmp_path / "out.safetensors")
        assert leftovers(tmp_path) == [live.name, other.name]
    weights.save(tmp_path / "out.safetensors", force=True)
    assert leftovers(tmp_path) == [other.name]
