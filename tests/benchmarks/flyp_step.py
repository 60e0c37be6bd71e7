"""A FLYP step, ours against open_clip's own training step: same model, same batch, in turns, in one run.

    python tests/benchmarks/flyp_step.py                  # this machine's CPU: ViT-B-32, fp32
    python tests/benchmarks/flyp_step.py --device cuda    # a GPU: B/32 and B/16, bf16, largest batch that fits

The plain step is open_clip's: its model called on images and token ids of the whole context, its ClipLoss, its
autocast, torch's AdamW with open_clip's settings, logit_scale clamped. Ours is the finetuner's objective and
optimiser: distinct prompts once, context cut, fused AdamW. Both get pixels that lie on the device. Prints ratios of
medians; asserts nothing.
"""

import argparse
import gc
import io
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

SETTINGS = {"few": (20, 1), "iwildcam": (182, 2), "imagenet": (1000, 80)}
"""Classes and templates a class: the hand measurement's, FLYP's on iWildCam, FLYP's on ImageNet."""

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bf16 tensor-core FLOP/s by the makers' data sheets (H100: SXM)."""

Step = Callable[[], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", help="default: ViT-B-32, on a GPU also ViT-B-16")
    parser.add_argument("--batch", type=int, help="default: 64 on a CPU, the largest that fits on a GPU")
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, help="default: few; on a GPU iwildcam, imagenet"
    )
    parser.add_argument("--rounds", type=int, help="turns of each kind; default 3, on a GPU 20")
    parser.add_argument("--compile", action="store_true", help="also ours with torch.compile")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a CPU that others use")
    parser.add_argument(
        "--no-loader", action="store_true", help="leave out the share of time waiting for data"
    )
    parser.add_argument("--only-loader", action="store_true", help="nothing but that share")
    parser.add_argument("--json", help="also write the figures here")
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    precision = "bf16" if cuda else "fp32"
    found: list[dict[str, Any]] = []
    print(
        f"torch {torch.__version__}, {torch.cuda.get_device_name() if cuda else 'CPU'}, {precision}",
        flush=True,
    )
    models = options.models or (["ViT-B-32", "ViT-B-16"] if cuda else ["ViT-B-32"])
    for model in [] if options.only_loader else models:
        batch = options.batch or (largest_batch(model, options.device, precision) if cuda else 64)
        for setting in options.settings or (["iwildcam", "imagenet"] if cuda else ["few"]):
            found += compare(model, setting, batch, options.device, precision, options.rounds or (20 if cuda else 3),
                             options.compile, time.process_time if options.cpu_time else time.perf_counter)  # fmt: skip
    if not options.no_loader:
        found += waiting(models[0], options.device, precision, cuda)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


def tokens_of(setting: str, model: Any, spec: Any, device: torch.device) -> Any:
    """Every prompt of the setting, and labels for a balanced set of 100 images a class."""
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    from clipmerge.data.split import Split
    from clipmerge.data.stored import LoadedImages
    from clipmerge.finetuning.batches import tokenizer_of, training_prompts

    classes, templates = SETTINGS[setting]
    labels = np.arange(classes * 100) % classes
    names = tuple(map(str, range(len(labels))))
    none = LoadedImages(np.zeros((len(labels), 1, 1), np.uint8))
    split = Split(setting, tuple(IMAGENET_CLASSNAMES[:classes]), labels, names, none, np.arange(len(labels)))
    texts = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES[:templates]]
    return split, training_prompts(model, tokenizer_of(spec), split, texts, device)


def build(name: str, device: str) -> tuple[Any, Any]:
    from clipmerge.model import build_model, resolve_model

    spec = resolve_model(name)
    return build_model(spec, device, seed=0).train(), spec


def open_clip_step(model: Any, images: torch.Tensor, texts: torch.Tensor, precision: str) -> Step:
    """open_clip_train's train_one_epoch, its body, one process."""
    from open_clip.loss import ClipLoss

    model.output_dict = True
    loss = ClipLoss(cache_labels=True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    device = images.device.type

    def step() -> torch.Tensor:
        optimiser.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            out = model(images, texts)
            total = sum(loss(**out, output_dict=True).values())
        total.backward()
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return total.detach()

    return step


def our_step(
    model: Any, spec: Any, prompts: Any, batch: Any, pixels: torch.Tensor, precision: str, compiled: bool
) -> Step:
    from clipmerge.finetuning.objective import Contrastive
    from clipmerge.finetuning.optimiser import adamw
    from clipmerge.finetuning.settings import Settings
    from clipmerge.finetuning.towers import Towers, trained_parameters, wrap

    towers = Towers(model, spec.preprocess, precision=precision)
    module = wrap(towers, sharded=False, synced=False, compiled=compiled)
    objective = Contrastive(towers, prompts, Settings(compile=compiled))
    objective.module = module
    optimiser = adamw(trained_parameters(model), lr=1e-6, wd=0.1)

    def step() -> torch.Tensor:
        loss = objective.backward(batch, pixels, lambda x: x)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss

    return step


def compare(
    name: str,
    setting: str,
    size: int,
    device: str,
    precision: str,
    rounds: int,
    compiled: bool,
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """Both steps in turns on the same batch; peak memory of each alone."""
    from clipmerge.finetuning.batches import Sampler

    place = torch.device(device)
    theirs, spec = build(name, "cpu")  # as open_clip builds it: ours embeds patches another way on a GPU
    theirs.to(place)
    ours, _ = build(name, device)
    split, prompts = tokens_of(setting, ours, spec, place)
    side = spec.preprocess["size"]
    pixels = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, device=place)
    labels = np.resize(split.labels, max(size, len(split.labels)))
    first = np.resize(prompts.first, len(labels))
    batch = next(Sampler(labels, first, prompts.count, 0, size).batches(0, 1))
    from clipmerge.finetuning.towers import Towers

    images = Towers(theirs, spec.preprocess).prepare(pixels)
    texts = prompts.tokens[torch.from_numpy(batch.prompts).to(place)]
    steps = {
        "open_clip": open_clip_step(theirs, images, texts, precision),
        "ours": our_step(ours, spec, prompts, batch, pixels, precision, False),
    }
    if compiled:
        third, _ = build(name, device)
        steps["ours, compiled"] = our_step(third, spec, prompts, batch, pixels, precision, True)
    losses = {kind: float(step()) for kind, step in steps.items()}  # same start, same batch: the same loss
    models = [theirs, ours, ours if not compiled else third]
    peaks = {
        kind: peak(step, model, place) for (kind, step), model in zip(steps.items(), models, strict=False)
    }
    times = in_turns(steps, rounds, place, clock)
    flops = {kind: step_flops(step) for kind, step in steps.items() if kind != "ours, compiled"}
    distinct = len(np.unique(batch.prompts))
    longest = int(prompts.lengths[np.unique(batch.prompts)].max())
    print(f"\n{name}, batch {size}, {setting}: {distinct} distinct prompts of at most {longest} tokens")
    rows = []
    for kind, seconds in times.items():
        middle = statistics.median(seconds)
        row: dict[str, Any] = {
            "model": name,
            "setting": setting,
            "batch": size,
            "step": kind,
            "seconds": middle,
        }
        row["images_per_second"] = size / middle
        row["ratio"] = statistics.median(times["open_clip"]) / middle
        row |= {"peak_gib": peaks[kind], "loss": losses[kind]}
        row["mfu"] = utilisation(flops.get(kind, flops["ours"]), middle, place)
        rows.append(row)
        memory = f", peak {row['peak_gib']:.1f} GiB" if place.type == "cuda" else ""
        mfu = f", MFU {row['mfu']:.1%}" if row["mfu"] else ""
        print(f"  {kind:15} {middle:8.4f} s  {row['images_per_second']:9.1f} images/s  {row['ratio']:.2f}x"
              f"{memory}{mfu}, first loss {row['loss']:.5f}", flush=True)  # fmt: skip
    rows.append(
        text_towers(theirs, prompts, batch, precision, place, max(3, rounds // 2), name, setting, clock)
    )
    release(place)
    return rows


def text_towers(
    model: Any,
    prompts: Any,
    batch: Any,
    precision: str,
    place: torch.device,
    rounds: int,
    name: str,
    setting: str,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """The text tower alone, forward and backward: every prompt at full context, or each distinct one cut."""
    from clipmerge.evaluate.heads import encode_text
    from clipmerge.finetuning.batches import unique_prompts

    texts = prompts.tokens[torch.from_numpy(batch.prompts).to(place)]
    rows, where = unique_prompts(batch.prompts)
    index = torch.from_numpy(where).to(place)
    few = prompts.tokens[torch.from_numpy(rows).to(place)]
    length = int(prompts.lengths[rows].max())

    def plain() -> torch.Tensor:
        with torch.autocast(place.type, torch.bfloat16, enabled=precision == "bf16"):
            found = model.encode_text(texts, normalize=True)
        found.float().sum().backward()
        return found.detach().sum()

    def cut() -> torch.Tensor:
        with torch.autocast(place.type, torch.bfloat16, enabled=precision == "bf16"):
            found = torch.nn.functional.embedding(index, encode_text(model, few, True, length=length))
        found.float().sum().backward()
        return found.detach().sum()

    times = in_turns({"plain": plain, "ours": cut}, rounds, place, clock)
    model.zero_grad(set_to_none=True)
    middle = {kind: statistics.median(seconds) for kind, seconds in times.items()}
    ratio = middle["plain"] / middle["ours"]
    print(
        f"  text tower alone: {middle['plain']:.4f} s against {middle['ours']:.4f} s, {ratio:.1f}x",
        flush=True,
    )
    return {"model": name, "setting": setting, "step": "text tower", "ratio": ratio, **middle}


def in_turns(
    steps: dict[str, Step], rounds: int, place: torch.device, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each step, one after the other, `rounds` times after a warm-up.

    On a GPU a turn is five steps that follow one another without waiting for the device, as in a training loop.
    """
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    burst = 5 if place.type == "cuda" else 1
    for turn in range(rounds + 1):
        for kind, step in steps.items():
            wait(place)
            began = clock()
            for _ in range(burst):
                step()
            wait(place)
            if turn:
                times[kind].append((clock() - began) / burst)
    return times


def wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize()


def peak(step: Step, model: Any, place: torch.device) -> float:
    """GiB that the step adds at its peak to weights, optimiser and pixels: activations and gradients."""
    if place.type != "cuda":
        return 0.0
    model.zero_grad(set_to_none=True)
    release(place)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    wait(place)
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def release(place: torch.device) -> None:
    gc.collect()
    if place.type == "cuda":
        torch.cuda.empty_cache()


def step_flops(step: Step) -> float:
    """FLOPs that the step really does in matrix products, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def utilisation(flops: float, seconds: float, place: torch.device) -> float | None:
    """Share of the GPU's peak; None where the peak is not known."""
    if place.type != "cuda":
        return None
    name = torch.cuda.get_device_name(place)
    peak_rate = next((rate for key, rate in PEAKS.items() if key in name), None)
    return None if peak_rate is None else flops / seconds / peak_rate


def largest_batch(name: str, device: str, precision: str) -> int:
    """The largest batch (a multiple of 256) at which open_clip's step fits beside our model and its optimiser."""
    low, high = 256, 256

    def fits(size: int) -> bool:
        try:
            compare_memory(name, size, device, precision)
        except torch.OutOfMemoryError:
            return False
        finally:
            release(torch.device(device))
        return True

    while fits(high):
        low, high = high, high * 2
    while high - low > max(256, low // 8):
        middle = (low + high) // 2 // 256 * 256
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def compare_memory(name: str, size: int, device: str, precision: str) -> None:
    """One plain step, with room taken for what `compare` has beside it."""
    model, spec = build(name, device)
    side = spec.preprocess["size"]
    beside = sum(p.numel() for p in model.parameters()) * 4 * 8 + size * 3 * side * side * 2
    room = torch.empty(beside, dtype=torch.uint8, device=device)
    images = torch.zeros(size, 3, side, side, device=device)
    texts = torch.randint(1, 40000, (size, model.context_length), device=device)
    step = open_clip_step(model, images, texts, precision)
    step()
    step()
    del room


def waiting(model: str, device: str, precision: str, cuda: bool) -> list[dict[str, Any]]:
    """Share of a run's time that its loop waits for pixels, by where they come from."""
    import os
    import tempfile

    from PIL import Image

    from clipmerge.data.split import Split
    from clipmerge.data.stored import LoadedImages
    from clipmerge.finetuning.finetune import finetune

    count, side, size = (4096, 320, 512) if cuda else (64, 320, 16)
    generator = np.random.default_rng(0)
    jpegs = []
    for _ in range(64):
        buffer = io.BytesIO()
        coarse = generator.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side)).save(buffer, "JPEG", quality=90)
        jpegs.append(buffer.getvalue())
    names = tuple(f"{i}.jpg" for i in range(count))
    stored = LoadedImages(jpegs)
    split = Split("jpegs", ("cat", "dog"), np.arange(count) % 2, names, stored, np.arange(count) % 64)
    found = []
    print(f"\nwaiting for data: {count} JPEGs of {side} x {side}, batch {size}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        sources: dict[str, dict[str, Any]] = {
            "decoded and cropped": {"augment": "crop"},
            "kept, cropped on the device": {"augment": "crop", "augment_on": "device"},
            "cached pixels": {"augment": "none"},
        }
        for i, (said, how) in enumerate(sources.items()):
            events: list[Any] = []
            finetune(None, split, model=model, out=Path(folder) / f"{i}.safetensors", batch_size=size,
                     steps=40 if cuda else 3, device=device, precision=precision, lr=1e-6, save_every=0,
                     on_event=events.append, **how)  # fmt: skip
            lines = [event for event in events if event["event"] == "step"]
            lines = lines[len(lines) // 2 :]
            share = statistics.mean(line["waiting"] for line in lines)
            speed = statistics.mean(line["images_per_second"] for line in lines)
            print(f"  {said:28} {share:6.1%} of the time, {speed:.0f} images/s", flush=True)
            found.append({"step": "waiting", "source": said, "share": share, "images_per_second": speed})
    return found


if __name__ == "__main__":
    main()
