"""N ranks with batch B are one process with batch N · B: loss, gradients, and the checkpoint that comes out."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

RUN = """
import datetime, os, sys
import open_clip, sklearn.datasets, torch, torch.distributed as dist, torchvision

torch.set_num_threads(1)
folder, base, model = sys.argv[1:]
from clipmerge.data.open import open_split
from clipmerge.finetuning.batches import Sampler, tokenizer_of, training_prompts
from clipmerge.distributed import average_gradients, rank, world
from clipmerge.finetuning.finetune import finetune, starting_model
from clipmerge.finetuning.images import Images
from clipmerge.finetuning.finetune import apply_method
from clipmerge.finetuning.settings import Settings
from clipmerge.finetuning.towers import Towers, is_outside, trained_parameters
from clipmerge.model import resolve_model
from clipmerge.weights.weights import load

cpu = torch.device("cpu")

def gradients(case, name):
    net, spec = starting_model(load(base), model, 0, cpu)
    texts = ["a photo of a {}.", "a drawing of the number {}."]
    tokenizer = tokenizer_of(spec)
    prompts = training_prompts(net, tokenizer, train, texts, cpu)
    more = {"chunk": {"chunk": 3}, "ce": {"method": "ce", "label_smoothing": 0.1}}
    settings = Settings.create(None, {"augment": "none", **more.get(case, {})})
    images = Images(train, None, spec.preprocess, cpu, settings)
    objective = apply_method(Towers(net, spec.preprocess), tokenizer, prompts, images, settings)
    synced = world() > 1 and case != "chunk"
    loader = images.loader()
    (batch, pixels), = loader(Sampler(train.labels, prompts.first, prompts.count, 0, 16).batches(0, 1))
    loss = objective.backward(batch, pixels, lambda x: x)
    if case == "ce" and world() > 1:
        dist.all_reduce(loss)
        loss /= world()
    trained = trained_parameters(net)
    average_gradients([p for n, p in trained.items() if not synced or is_outside(n)])
    if rank() == 0:
        found = {n: p.grad for n, p in trained.items() if p.grad is not None}
        torch.save({"loss": loss, **found}, f"{folder}/{name}.pt")

def tune(case, name, size):
    more = {"method": "ce", "clip_grad": 1.0, "ema": 0.5} if case == "fsdp-ce" else {}
    def run(**also):
        finetune(load(base), train, model=model, out=f"{folder}/{name}.safetensors", lr=1e-3, batch_size=size, steps=4,
                 augment="crop:0.5", accumulate=2, fsdp=case != "plain" and world() > 1, save_every=2, device="cpu",
                 **more, **also)
    def dies(what, done, total):
        if what == "steps" and done == 3:
            raise ZeroDivisionError
    try:
        run(on_progress=dies)
    except ZeroDivisionError:
        run(resume=True)

def everything(name):
    global train
    train = open_split("digits#train", limit=60)
    for case in ("plain", "chunk", "ce"):
        gradients(case, f"{case}-{name}")
    for case in ("plain", "fsdp", "fsdp-ce"):
        tune(case, f"{case}-{name}", 16 // world() // 2)

def child(work):
    number = os.fork()
    if number == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        os._exit(code)
    return number

def ranked(number):
    os.environ.update(RANK=str(number), WORLD_SIZE="2", LOCAL_RANK=str(number))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2,
                            timeout=datetime.timedelta(seconds=30))
    everything("two")
    dist.barrier()

children = [child(lambda: everything("one"))]
children += [child(lambda number=number: ranked(number)) for number in range(2)]
codes = [os.waitpid(child, 0)[1] for child in children]
assert codes == [0, 0, 0], codes
"""


@pytest.fixture(scope="module")
def trained(tiny_checkpoints: Any, tiny_model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), str(tiny_checkpoints["base"]), str(tiny_model_file)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", ["plain", "chunk", "ce"])
def test_two_ranks_have_the_gradient_of_both_batches_in_one(case: str, trained: Path) -> None:
    one, two = (torch.load(trained / f"{case}-{name}.pt", weights_only=True) for name in ("one", "two"))
    close(two, one, 1e-5)


@pytest.mark.parametrize("case", ["plain", "fsdp", "fsdp-ce"])
def test_two_ranks_that_die_and_resume_write_the_checkpoint_of_one_process(case: str, trained: Path) -> None:
    one, two = (load_file(trained / f"{case}-{name}.safetensors") for name in ("one", "two"))
    keys = [name for name in one if name.endswith("in_proj_bias")]
    for name in keys:  # a key's bias has no gradient but rounding, which AdamW makes a whole step of
        del one[name], two[name]
    close(two, one, 1e-2)


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        error = float((ours[name] - value).norm() / value.norm().clamp_min(1e-6))
        assert error < tolerance, (name, error)
