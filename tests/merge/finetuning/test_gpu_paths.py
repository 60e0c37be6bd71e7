"""What a GPU or several ranks will meet, shown without one: meta and fake tensors, gloo processes, patched clocks."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipmerge.errors import DeviceError, TrainingError
from clipmerge.finetuning.finetune import starting_model
from clipmerge.finetuning.head import attach_head, held_out_scores, linear_probe
from clipmerge.finetuning.state import generators, restore_generators
from clipmerge.finetuning.towers import HEAD, Towers, freeze, set_modes

CPU = torch.device("cpu")


def test_a_given_head_lies_where_the_model_does(tiny_spec: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from clipmerge.model import build_model

    meta = build_model(tiny_spec, "meta")
    attach_head(meta, torch.zeros(10, 16))
    assert {p.device.type for p in meta.get_submodule(HEAD).parameters()} == {"meta"}
    with FakeTensorMode():
        model = torch.nn.ModuleDict({"visual": torch.nn.Linear(4, 4, device="cuda:0")})
        attach_head(model, torch.zeros(10, 16), torch.zeros(10))
        assert {str(p.device) for p in model.get_submodule(HEAD).parameters()} == {"cuda:0"}


def test_a_head_in_half_precision_becomes_fp32(tiny_spec: Any) -> None:
    from clipmerge.model import build_model

    model = build_model(tiny_spec, seed=0)
    attach_head(model, torch.ones(3, 16, dtype=torch.bfloat16), torch.ones(3, dtype=torch.float16))
    assert {p.dtype for p in model.get_submodule(HEAD).parameters()} == {torch.float32}


def test_what_coca_never_uses_does_not_train() -> None:
    """Its text decoder gets no gradient, which DDP takes for an error in the second step."""
    from clipmerge.model import build_model, resolve_model

    spec = resolve_model("coca_ViT-B-32")
    with torch.device("meta"):
        model = build_model(spec, "meta")
    freeze(model, image=True, text=True, scale=True)
    towers = Towers(model, spec.preprocess)
    image, text = towers(
        torch.zeros(2, 3, 224, 224, device="meta"), torch.zeros(2, 76, dtype=torch.long, device="meta")
    )
    used = torch.autograd.grad(
        image.sum() + text.sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
    )
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert [n for n, g in zip(names, used, strict=True) if g is None and n != "logit_scale"] == []


def test_a_frozen_tower_is_in_eval_mode_and_stays_there(base: Any, val: Any, tiny_spec: Any) -> None:
    from clipmerge.finetuning.batches import tokenizer_of, training_prompts

    model, spec = starting_model(base, tiny_spec, 0, CPU)
    towers = Towers(model, spec.preprocess)
    prompts = training_prompts(model, tokenizer_of(spec), val, None, CPU)
    pixels = np.zeros((len(val), 3, 16, 16), np.uint8)
    for image, text in ((True, False), (False, True)):
        set_modes(model, image=image, text=text)
        held_out_scores(towers, val, pixels, prompts, 16)
        assert model.visual.training is model.visual.transformer.training is image
        assert model.transformer.training is text


def test_a_probe_minimises_scikit_learns_objective() -> None:
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(0)
    for classes in (2, 7):
        labels = generator.integers(0, classes, 300)
        x = generator.normal(size=(classes, 16))[labels] + generator.normal(size=(300, 16)) * 2
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        weight, bias = linear_probe(torch.tensor(x, dtype=torch.float32), labels, classes, strength=0.5)
        referee = LogisticRegression(C=0.5, max_iter=2000, tol=1e-5).fit(x * 10, labels)
        ours = (torch.tensor(x, dtype=torch.float32) @ weight.T + bias).argmax(1).numpy()
        assert (ours == referee.predict(x * 10)).mean() > 0.99


def test_a_state_of_a_gpu_is_restored_without_one() -> None:
    """The state of one rank holds its own GPU's generator only; a machine without that GPU takes the CPU's."""
    saved = generators(CPU)[0], torch.zeros(16, dtype=torch.uint8)
    expected = torch.rand(3)
    restore_generators(saved)
    assert torch.equal(torch.rand(3), expected)


def test_a_run_seeds_dropout_and_leaves_the_generator_alone(tune: Callable[..., Any], tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    drawn: dict[str, list[float]] = {"warm": [], "a": [], "b": []}
    for name, values in drawn.items():

        def draw(what: str, *_: Any, values: list[float] = values) -> None:
            if what == "steps":
                values.append(torch.rand(1).item())

        tune(name, on_progress=draw)
        assert torch.equal(torch.get_rng_state(), before)
        before = torch.manual_seed(6).get_state()
    assert drawn["a"] == drawn["b"] == drawn["warm"]


def test_deterministic_algorithms_are_asked_for_while_it_trains(tune: Callable[..., Any]) -> None:
    asked: dict[bool, set[bool]] = {False: set(), True: set()}
    for wanted, seen in asked.items():

        def look(*_: Any, seen: set[bool] = seen) -> None:
            seen.add(torch.are_deterministic_algorithms_enabled())

        tune(str(wanted), deterministic=wanted, on_progress=look)
        assert not torch.are_deterministic_algorithms_enabled()
    assert asked == {False: {False}, True: {True}}


def test_what_is_sharded_is_laid_out_plainly_and_on_the_towers_own_device(
    tiny_model_config: Any, tiny_spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 refuses a ResNet's parameters laid out channels last (A7); its default mesh is the machine's GPU (A8)."""
    import torch.distributed.device_mesh as meshes
    import torch.distributed.fsdp as fsdp

    from clipmerge.finetuning.towers import wrap
    from clipmerge.model import ModelSpec, build_model

    resnet = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    spec = ModelSpec(
        "resnet", {**tiny_model_config, "embed_dim": 32, "vision_cfg": resnet}, tiny_spec.preprocess
    )
    towers = Towers(build_model(spec, seed=0), spec.preprocess, channels_last=True)
    asked, contiguous = [], []
    mesh = type("Mesh", (), {"device_type": "cpu"})()
    monkeypatch.setattr(meshes, "init_device_mesh", lambda kind, shape: asked.append(kind) or mesh)

    def shard(module: torch.nn.Module, **_: Any) -> None:
        contiguous.extend(p.is_contiguous() for p in module.parameters())

    monkeypatch.setattr(fsdp, "fully_shard", shard)
    assert wrap(towers, sharded=True, synced=False, compiled=False) is towers
    assert asked == ["cpu"]
    assert contiguous
    assert all(contiguous)


def test_the_first_ranks_score_says_which_is_the_best(
    tune: Callable[..., Any], val: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks whose scores differ by an image would part, and wait for each other (A13)."""
    from clipmerge.finetuning import checkpointing

    said = iter([0.1, 0.9, 0.2])
    monkeypatch.setattr(checkpointing, "broadcast_object", lambda own: {**own, "top1": next(said)})
    scored: list[float] = []

    def take(event: Any) -> None:
        if event["event"] == "score":
            scored.append(event["top1"])

    best = tune(val=val, steps=6, score_every=2, select="best", on_event=take)
    assert scored == [0.1, 0.9, 0.2]
    assert best.record["training"]["step"] == 4


def test_sharding_one_process_is_refused(tune: Callable[..., Any]) -> None:
    with pytest.raises(DeviceError, match="--fsdp needs several processes"):
        tune(fsdp=True)


def test_out_of_memory_names_options(tune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("clipmerge.finetuning.objective.losses.contrastive", full)
    with pytest.raises(DeviceError, match="ran out of memory") as stopped:
        tune()
    assert "--batch-size" in str(stopped.value.hint)
    assert "--checkpointing" in str(stopped.value.hint)


def test_worker_errors_are_raised_as_they_are(
    tune: Callable[..., Any], train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, i: int, **_: Any) -> Any:
        raise TrainingError("image 7 cannot be read")

    monkeypatch.setattr(type(train), "image", broken)
    with pytest.raises(TrainingError, match=r"^image 7 cannot be read$"):
        tune(augment="crop", workers=2)


RANKS = """
import open_clip, sklearn.datasets, torch, torchvision
torch.set_num_threads(1)
import os, sys, time
folder, base, model = sys.argv[1:]
from pathlib import Path
from clipmerge.data.open import open_split
from clipmerge.errors import ClipmergeError
from clipmerge.finetuning.finetune import finetune
from clipmerge.weights.weights import load
train, val = open_split("digits#train", limit=60), open_split("digits#val", limit=41)

def tune(name="ft", **more):
    settings = {"lr": 1e-3, "batch_size": 8, "steps": 6, "augment": "none", "device": "cpu", **more}
    try:
        return finetune(load(base), train, val=val, model=model, out=f"{folder}/{name}.safetensors", **settings)
    except ClipmergeError as error:
        print("refused:", error.message, round(time.time()))
        sys.exit(1)

rank = int(os.environ["RANK"])
"""


def run_ranks(body: str, arguments: list[str], tmp_path: Path) -> list[tuple[int, str]]:
    """Run the code in two processes as torchrun starts them; return code and all output of each."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        torchrun = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        environment = {**os.environ, **{name: str(value) for name, value in torchrun.items()}}
        environment |= {"OMP_NUM_THREADS": "1", "CLIPMERGE_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-c", RANKS + textwrap.dedent(body), *arguments]
        processes.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


@pytest.fixture
def arguments(tiny_checkpoints: Any, tiny_model_file: Path, tmp_path: Path) -> list[str]:
    return [str(tmp_path), str(tiny_checkpoints["base"]), str(tiny_model_file)]


def test_images_are_decoded_once_on_a_machine(arguments: list[str], tmp_path: Path) -> None:
    done = run_ranks(
        """
        decoded = []
        tune(on_progress=lambda what, done, n: decoded.append(n) if what == "decoding images" and done == n else None)
        print("decoded", len(decoded))
        """,
        arguments,
        tmp_path,
    )
    assert [code for code, _ in done] == [0, 0], done
    assert ["decoded 2" in output for _, output in done] == [True, False]
    assert "decoded 0" in done[1][1]


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_with_one_sentence(
    arguments: list[str], tmp_path: Path
) -> None:
    done = run_ranks(
        """
        from clipmerge.finetuning import losses
        plain, calls = losses.cross_entropy, []
        def planted(*a, **k):
            calls.append(1)
            return plain(*a, **k) * (float("nan") if rank == 1 and len(calls) == 3 else 1)
        losses.cross_entropy = planted
        tune(method="ce")
        """,
        arguments,
        tmp_path,
    )
    for code, output in done:
        assert code == 1
        assert "refused: the loss is nan at step 3" in output, output


def test_an_error_on_one_rank_ends_the_other_within_seconds(arguments: list[str], tmp_path: Path) -> None:
    done = run_ranks(
        """
        def broken(what, done, total):
            if rank == 1 and what == "steps" and done == 2:
                raise ValueError(f"planted {time.time():.0f}")
        tune(on_progress=broken)
        """,
        arguments,
        tmp_path,
    )
    assert [code for code, _ in done] == [1, 1], done
    raised = int(done[1][1].rpartition("ValueError: planted ")[2])
    message, _, ended = done[0][1].strip().rpartition(" ")
    assert message.endswith("refused: another process of this run stopped")
    assert int(ended) - raised < 30


def test_ranks_hear_of_a_signal_one_step_later_all_at_once(arguments: list[str], tmp_path: Path) -> None:
    """Nobody waits for the slowest host at each step; the state of one and the same step is saved."""
    done = run_ranks(
        """
        import signal
        def interrupt(what, done, total):
            if rank == 1 and what == "steps" and done == 2:
                signal.raise_signal(signal.SIGTERM)
        tune(on_progress=interrupt)
        """,
        arguments,
        tmp_path,
    )
    for (code, output), who in zip(done, ("another rank", "SIGTERM"), strict=True):
        assert code == 1
        assert f"refused: stopped by {who} after step 3 of 6; everything is saved" in output, output


def test_fixed_features_are_shared_between_ranks(arguments: list[str], tmp_path: Path) -> None:
    """Each rank's image tower sees half the images once (C9), and both have the features of all."""
    done = run_ranks(
        """
        import clipmerge.finetuning.images as images
        seen, real = [], images.image_features
        def counted(towers, pixels, *a, **k):
            seen.append(len(pixels))
            return real(towers, pixels, *a, **k)
        images.image_features = counted
        tune(method="lp-ft")
        print("features of", sorted(seen))
        """,
        arguments,
        tmp_path,
    )
    assert [code for code, _ in done] == [0, 0], done
    assert all("features of [21, 30]" in output for _, output in done), done


def test_ranks_of_torchrun_are_workers_of_a_sweep(arguments: list[str], tmp_path: Path) -> None:
    """Each trains trials of its own: the files are those of one process, and nobody joins anybody."""
    pytest.importorskip("optuna")
    body = """
        from clipmerge.finetuning.sweep import Range, Space
        from clipmerge.finetuning.sweep import finetune_sweep
        from clipmerge.distributed import world
        space = Space({"lr": Range(1e-4, 1e-2, log=True)}, {"method": "lp-ft", "steps": 2})
        done = finetune_sweep(load(base), train, val, folder + "/" + name, trials=3, space=space, model=model,
                              batch_size=16, augment="none", save_every=0, device="cpu")
        print("trials", sorted(t.number for t in done), "world", world())
        """
    done = run_ranks('name = "two"' + textwrap.dedent(body), arguments, tmp_path)
    assert [code for code, _ in done] == [0, 0], done
    assert all("trials [0, 1, 2] world 1" in output for _, output in done), done
    alone = [sys.executable, "-c", RANKS + 'name = "one"' + textwrap.dedent(body), *arguments]
    environment = {**os.environ, "RANK": "0", "OMP_NUM_THREADS": "1"}
    subprocess.run(alone, env=environment, check=True, capture_output=True, timeout=300)
    one, two = (
        sorted(p.name for p in (tmp_path / name).glob("trial-*.safetensors")) for name in ("one", "two")
    )
    assert one == two == [f"trial-000{i}.safetensors" for i in range(3)]
    for name in one:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_rank_that_waits_for_a_dead_one_obeys_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun sends SIGTERM to survivors, whose collectives never return: nobody asks for the signal then."""
    from clipmerge.finetuning import loop

    monkeypatch.setattr(loop, "world", lambda: 2)
    monkeypatch.setattr(loop, "PATIENCE", 0.2)
    died: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: died.append(number))
    with loop.interruptions() as interrupted:
        signal.raise_signal(signal.SIGTERM)
        assert interrupted() == "SIGTERM"  # asked in time: the run saves and stops by itself
        time.sleep(0.4)
        assert died == []
    with loop.interruptions():
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.6)
    assert died == [signal.SIGTERM]
