"""Two processes score together and say what one says."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clipmerge import distributed

TASK = """
import json, sys, torch
from clipmerge.data.open import open_split
from clipmerge import distributed
from clipmerge.evaluate.evaluator import Evaluator
from clipmerge.evaluate.score import is_better
from clipmerge.weights.weights import load

def said(model, *paths):
    evaluator = Evaluator(open_split("digits#val", limit=101), model, batch_size=16)
    weights = [load(path) for path in paths]
    scores = [evaluator.score(w).to_json(mask=True) for w in weights]
    first = evaluator.score(weights[0])
    tried = [evaluator.score_with(weights[:1], w, incumbent=first, strict=True) for w in weights[1:]]
    accepted = [is_better(result, first, strict=True) for result in tried]
    return {"scores": scores, "accepted": accepted, "logits": evaluator.logits(weights[1]).double().sum(0).tolist()}

if __name__ == "__main__":
    import open_clip, os, sklearn.datasets, torchvision  # once, before the processes part
    world = int(os.environ["WORLD_SIZE"])
    rank = next((r for r in range(1, world) if os.fork() == 0), 0)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    distributed.start(torch.device("cpu"))
    place = {"rank": distributed.rank(), "writer": distributed.is_first(), "world": distributed.world()}
    answer = json.dumps({**place, "said": said(*sys.argv[1:])})
    os.write(1, f"{answer}\\n".encode())
    distributed.finish()
    assert rank or all(os.wait()[1] == 0 for _ in range(1, world))
"""


def run(task: Path, arguments: list[str], world: int) -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, str(task), *arguments], env=shared, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return sorted(map(json.loads, done.stdout.splitlines()), key=lambda answer: answer["rank"])


def test_two_processes_give_the_answer_of_one(tmp_path, tiny_model_file, tiny_checkpoints):
    task = tmp_path / "task.py"
    task.write_text(TASK)
    arguments = [str(tiny_model_file), *(str(tiny_checkpoints[name]) for name in ("ft0", "ft1", "ft2"))]
    here: dict = {"__name__": "task"}
    exec(TASK, here)
    alone = here["said"](*arguments)
    first, second = run(task, arguments, 2)
    assert (first["world"], second["world"]) == (2, 2)
    assert (first["writer"], second["writer"]) == (True, False)
    assert first["said"] == second["said"]
    assert first["said"].pop("logits") == pytest.approx(alone.pop("logits"), rel=1e-6)
    assert _rounded(first["said"]) == _rounded(alone)


def _rounded(said: dict) -> dict:
    """Calibration error is a sum of rounded confidences; everything else is a count."""
    for score in said["scores"]:
        score["metrics"]["ece"] = round(score["metrics"]["ece"], 6)
    return said


BROKEN = TASK.replace(
    "def said(model, *paths):",
    """def said(model, *paths):
    from clipmerge.errors import NonFiniteError
    from clipmerge.evaluate.predictor import Predictor
    decoded, real = [], Predictor._logits
    def logits(self, images, batch, head):
        return real(self, images, batch, head) * (float("nan") if distributed.rank() else 1.0)
    Predictor._logits = logits
    note = lambda what, done, total: decoded.append(done) if what == "decoding images" else None
    evaluator = Evaluator(open_split("digits#val", limit=103), model, batch_size=16, on_progress=note)
    try:
        evaluator.score(load(paths[0]))
    except NonFiniteError as error:
        return {"raised": error.message, "decoded": bool(decoded)}

def unused(model, *paths):""",
)


def test_what_one_process_sees_all_raise_and_images_are_decoded_once(
    tmp_path, tiny_model_file, tiny_checkpoints, monkeypatch
):
    """NaN in one process's share; a cold cache."""
    monkeypatch.setenv("CLIPMERGE_CACHE", str(tmp_path / "cache"))
    task = tmp_path / "task.py"
    task.write_text(BROKEN)
    first, second = run(task, [str(tiny_model_file), str(tiny_checkpoints["ft0"])], 2)
    says = "with ft0, the model's logits for val are not finite"
    assert first["said"] == {"raised": says, "decoded": True}
    assert second["said"] == {"raised": says, "decoded": False}


HEADS = TASK.replace(
    "def said(model, *paths):",
    """def said(model, folder):
    from pathlib import Path
    from clipmerge.evaluate import heads
    from clipmerge.model import build_model, get_tokenizer, resolve_model
    spec = resolve_model(model)
    net, rows, real = build_model(spec, seed=0), [], heads.encode_text
    def counted(model, tokens, **options):
        rows.append(len(tokens))
        return real(model, tokens, **options)
    cache = Path(folder) / str(distributed.rank())
    def build():
        names = [f"{'long ' * (i % 3)}thing {i}" for i in range(7)]
        heads.encode_text = counted
        try:
            head = heads.zero_shot_head(net, get_tokenizer(spec), names, ["a {}.", "{}"], cache=cache)
        finally:
            heads.encode_text = real
        return sum(rows), head.tolist()
    first = build()
    if distributed.rank() == 0:  # a machine whose cache has it, beside one whose cache does not
        assert len(list(cache.glob("heads/*"))) == 1
    return {"first": first, "again": build()}

def unused(model, *paths):""",
)


def test_prompts_are_shared_between_processes(tmp_path, tiny_model_file):
    """Each encodes half (C7), also where one of them has the head in its own cache already."""
    task = tmp_path / "task.py"
    task.write_text(HEADS)
    here: dict = {"__name__": "task"}
    exec(HEADS, here)
    (alone, head), _ = here["said"](str(tiny_model_file), str(tmp_path / "alone")).values()
    answers = run(task, [str(tiny_model_file), str(tmp_path)], 2)
    assert alone == 14
    for answer in answers:
        assert answer["said"]["first"][0] == 7
        assert (
            answer["said"]["again"][0] == 14
        )  # the second process keeps no heads: its machine's first one does
        assert answer["said"]["first"][1] == answers[0]["said"]["first"][1]
        assert torch.tensor(answer["said"]["first"][1]).numpy() == pytest.approx(
            torch.tensor(head).numpy(), abs=1e-6
        )


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 100])
def test_overlapping_shares_are_equal_and_count_each_row_once(n, world, monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: world)
    counted, lengths = [], set()
    for rank in range(world):
        own, twice = distributed.overlapping_share(n, rank)
        lengths.add(len(range(n)[own]))
        counted += list(range(n)[own])[twice:]
    assert counted == list(range(n))
    assert lengths == {-(-n // world)}


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    distributed.start(torch.device("cpu"))
    assert (distributed.rank(), distributed.world(), distributed.is_first()) == (0, 1, True)
    distributed.barrier()
    distributed.finish()
