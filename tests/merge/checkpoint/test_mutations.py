"""Damaged files of every kind: an error of ours or a read that stays inside the file, and nothing else."""

import json
import pickle
import random
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clipmerge.checkpoint.open import open_checkpoint
from clipmerge.checkpoint.read import Reader
from clipmerge.errors import ClipmergeError

INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, *b'(){}[].:",0R\x81bcqhtuXKMQBa\x85\x86\x87\x93\x94\x8c\x8e\x96']


def state() -> dict[str, Any]:
    return {
        "visual.proj": torch.arange(6.0).reshape(2, 3).t(),
        "ln_final.weight": torch.ones(2, dtype=torch.float16),
        "logit_scale": torch.tensor(1.0),
        "steps": torch.arange(3),
    }


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    """One small good file of each container."""
    folder = tmp_path_factory.mktemp("seeds")
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    tensors = {name: value.contiguous() for name, value in state().items()}
    save_file(tensors, folder / "safetensors", metadata={"format": "pt"})
    torch.save(state(), folder / "zip")
    torch.save(state(), folder / "legacy", _use_new_zipfile_serialization=False)
    (folder / "pickle").write_bytes(pickle.dumps(state()))
    torch.save({"state_dict": state(), "epoch": 1}, folder / "training")
    torch.save(model, folder / "module")
    (folder / "bare module").write_bytes(pickle.dumps(model, protocol=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, torch.ones(2, 2)).save(folder / "script")
    with zipfile.ZipFile(folder / "zip") as old, zipfile.ZipFile(folder / "deflated", "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    places = dict.fromkeys(tensors, "safetensors")
    (folder / "index").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A few small damages: bytes set, bits flipped, pieces cut, doubled, moved, the end lost."""
    out = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 3, 8])):
        at, span = chance.randrange(len(out) + 1), chance.choice([1, 2, 4, 8, 30])
        kind = chance.randrange(7)
        if kind == 0 and at < len(out):
            out[at] = chance.choice(INTERESTING)
        elif kind == 1 and at < len(out):
            out[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            del out[at : at + span]
        elif kind == 3:
            out[at:at] = out[at : at + span]
        elif kind == 4:
            other = chance.randrange(len(out) + 1)
            out[at : at + span] = out[other : other + span]
        elif kind == 5:
            out[at : at + span] = bytes([chance.choice([0, 0xFF, 0x7F])]) * span
        elif chance.random() < 0.2:
            del out[at:]
    return bytes(out)


def check(path: Path) -> bool:
    """Open and read everything; True where it worked. What is read lies inside the file and is no larger."""
    size = path.stat().st_size
    with suppress(ClipmergeError):
        checkpoint = open_checkpoint(path)
        for name, tensor in checkpoint.tensors.items():
            assert tensor.nbytes <= 4 * size + (1 << 20)
            assert set(checkpoint.files()) <= {path, path.parent / "safetensors"}
            assert Reader().dense(checkpoint.tensors[name]).nbytes == tensor.nbytes
        return True
    return False


def fuzz(seed: bytes, path: Path, rounds: int, chance: random.Random, put: Callable[[bytes], bytes]) -> None:
    slowest = 0.0
    for _ in range(rounds):
        path.write_bytes(put(mutated(seed, chance)))
        begin = time.process_time()
        check(path)
        slowest = max(slowest, time.process_time() - begin)
    assert slowest < 30


def run(kind: str, seeds: Mapping[str, bytes], folder: Path, rounds: int, seed: int = 0) -> None:
    chance = random.Random(f"{kind} {seed}")
    (folder / "safetensors").write_bytes(seeds["safetensors"])
    fuzz(seeds[kind], folder / "mutant.bin", rounds, chance, bytes)
    if kind in ("zip", "training", "module", "script"):
        fuzz(*inner_pickle(seeds[kind], folder, chance, rounds))


def inner_pickle(archive: bytes, folder: Path, chance: random.Random, rounds: int) -> Any:
    """Mutate the pickle inside a sound archive: the checksum would catch the rest."""
    (folder / "whole").write_bytes(archive)
    with zipfile.ZipFile(folder / "whole") as old:
        parts = {name: old.read(name) for name in old.namelist()}
    root = next(name for name in parts if name.endswith("/data.pkl"))

    def put(data: bytes) -> bytes:
        with zipfile.ZipFile(folder / "packed", "w") as new:
            for name, content in parts.items():
                new.writestr(name, data if name == root else content)
        return (folder / "packed").read_bytes()

    return parts[root], folder / "mutant.bin", rounds, chance, put


KINDS = [
    "safetensors", "index", "zip", "deflated", "legacy", "pickle", "training", "module", "bare module", "script",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_hundred_mutants(kind: str, seeds: Mapping[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "safetensors").write_bytes(seeds["safetensors"])
    (tmp_path / "good").write_bytes(seeds[kind])
    assert check(tmp_path / "good"), "the seed itself is read"
    run(kind, seeds, tmp_path, 60)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(1, 4))
def test_thousands_of_mutants(kind: str, seed: int, seeds: Mapping[str, bytes], tmp_path: Path) -> None:
    run(kind, seeds, tmp_path, 3000, seed)
