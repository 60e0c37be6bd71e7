"""Soups of many ViT-B/32 on one GPU: greedy, as the paper's code goes about it, and learned.

    python tests/benchmarks/gpu_soups.py FOLDER make greedy published learned [--models 72] [--images 26000] [--quick]

`make` writes random weights that are perturbed from one base (the text tower is shared), as fp16 files, and labels
that the base predicts three times in four. `greedy` and `learned` call clipmerge on them. `published` does what the
paper's code does (github.com/mlfoundations/model-soups, main.py: each candidate's file is loaded into a model, a
running mean is tried, each time with a full pass) on a sample, and scales up; it gets decoded pixels that lie on the
device already, which the paper's code does not have. Prints Markdown rows; asserts nothing.
"""

import argparse
import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

DRIFT, NOISE = 0.03, 0.002
"""How far a candidate's image tower is from the base, as a share of each tensor's own spread: up to DRIFT in a
direction that all share, so that a mean with the worse ones is worse and a soup has few ingredients, as real ones do;
and NOISE of its own. 0.003 changes a tenth of the base's predictions."""

QUICK = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--models", type=int, default=72)
    parser.add_argument("--images", type=int, default=26_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--templates", type=int, default=80)
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that every line runs")
    options = parser.parse_args()
    if options.quick:
        options.models, options.images, options.classes, options.templates = 5, 640, 50, 2
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.quick:
        options.model = str(options.folder / "quick.json")
    os.environ["CLIPMERGE_CACHE"] = str(options.folder / "cache")
    for part in options.parts:
        try:
            PARTS[part](options)
        except Exception as error:  # a part that fails does not end the others
            traceback.print_exc()
            row(part, f"did not end well: {type(error).__name__}: {error}")
        gc.collect()
        torch.cuda.empty_cache()


# -- what is scored ----------------------------------------------------------------------------------------


def spec_of(options: argparse.Namespace) -> Any:
    from clipmerge.model import resolve_model

    return resolve_model(options.model)


def split(options: argparse.Namespace, labels: np.ndarray | None = None) -> Any:
    """Random pictures of 16 × 16 coloured squares, in a file; labels are what `make` says."""
    from open_clip import IMAGENET_CLASSNAMES

    import clipmerge as cm

    path = options.folder / "pictures.npz"
    if labels is not None or not path.exists():
        labels = np.arange(options.images) if labels is None else labels
        labels[: options.classes] = np.arange(options.classes)  # each class has an image
        pictures = np.random.default_rng(0).integers(0, 256, (options.images, 16, 16, 3), dtype=np.uint8)
        names = np.array(IMAGENET_CLASSNAMES[: options.classes])
        np.savez(
            path, images=pictures, labels=labels % options.classes, split=np.ones_like(labels), classes=names
        )
    return cm.open_split(f"{path}#val")


def evaluator(options: argparse.Namespace, images: Any = None) -> Any:
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    import clipmerge as cm

    images = split(options) if images is None else images
    texts = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES[: options.templates]]
    return cm.Evaluator({"val": images}, spec_of(options), device=options.device, templates=texts)


def paths_of(options: argparse.Namespace) -> list[Path]:
    return sorted(options.folder.glob("ft*.safetensors"))[: options.models]


def make(options: argparse.Namespace) -> None:
    """Write the candidates, and labels."""
    import clipmerge as cm
    from clipmerge.data.pixels import pixels

    recipe = f"{options.models} × {options.model}, {options.dtype}, {options.images} images"
    done = options.folder / "made"
    if done.exists() and done.read_text(encoding="utf-8") == recipe:
        return
    began = time.perf_counter()
    base = {name: value.clone() for name, value in centred(options).state_dict().items()}
    generator = torch.Generator(options.device).manual_seed(0)
    header, ends = safetensors_header(base, options.dtype)
    whole = torch.cat([value.reshape(-1) for value in base.values()]).to(options.device)
    spread = torch.zeros_like(whole)
    for (name, value), end in zip(base.items(), ends, strict=True):
        if name.startswith("visual.") and value.numel() > 1:
            spread[end - value.numel() : end] = value.std()
    drift = spread * torch.randn(whole.shape, device=options.device, generator=generator)
    places = np.random.default_rng(2).permutation(options.models) / options.models
    with ThreadPoolExecutor(8) as pool:
        written = []
        for i in range(options.models):
            noise = torch.randn(whole.shape, device=options.device, generator=generator)
            flat = whole + NOISE * spread * noise + DRIFT * places[i] * drift
            flat = flat.to(getattr(torch, options.dtype)).cpu()
            written.append(pool.submit(write, options.folder / f"ft{i:03}.safetensors", header, flat))
            if len(written) > 16:
                written[-16].result()  # not all in memory at once
        for one in written:
            one.result()
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    pixels(split(options), spec_of(options).preprocess)
    row("images decoded", f"{options.images}, once, {time.perf_counter() - began:.1f} s")
    logits = evaluator(options).logits(cm.from_state_dict(base))
    labels = logits.argmax(dim=1).numpy()
    dice = np.random.default_rng(1)
    wrong = dice.random(len(labels)) < 0.25
    labels[wrong] = dice.integers(0, options.classes, int(wrong.sum()))
    split(options, labels)
    done.write_text(recipe, encoding="utf-8")
    row("candidates made", f"{recipe}, {seconds:.0f} s; {len(np.unique(labels[~wrong]))} classes predicted")


def centred(options: argparse.Namespace) -> Any:
    """Random weights whose image features differ from picture to picture: their mean is taken away."""
    from clipmerge.data.pixels import pixels
    from clipmerge.model import build_model

    spec = spec_of(options)
    model: Any = build_model(spec, options.device, seed=0)
    pictures = torch.from_numpy(pixels(split(options).subset(np.arange(64)), spec.preprocess))
    found: list[torch.Tensor] = []
    hook = model.visual.ln_post.register_forward_hook(lambda module, args, out: found.append(out))
    with torch.no_grad():
        model.encode_image((pictures.to(options.device) / 255 - 0.45) / 0.27)
        hook.remove()
        model.visual.ln_post.bias -= found[0][:, 0].mean(dim=0)
    return model


def safetensors_header(state: dict[str, torch.Tensor], dtype: str) -> tuple[bytes, list[int]]:
    """The header of a file that holds the tensors one after the other, and where each ends."""
    size, kind = {"float16": (2, "F16"), "float32": (4, "F32")}[dtype]
    entries, ends = {}, []
    at = 0
    for name, value in state.items():
        end = at + value.numel()
        entries[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [at * size, end * size]}
        ends.append(at := end)
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ends


def write(path: Path, header: bytes, flat: torch.Tensor) -> None:
    with path.open("wb") as file:
        file.write(header)
        file.write(memoryview(flat.numpy()).cast("B"))


# -- clipmerge ---------------------------------------------------------------------------------------------


def greedy(options: argparse.Namespace) -> None:
    """The whole search, from closed files to the chosen ingredients."""
    import clipmerge as cm

    paths, judge = paths_of(options), evaluator(options)
    phases, began = Phases(), time.perf_counter()
    result = cm.greedy_soup(paths, judge, on_progress=phases)
    seconds = time.perf_counter() - began
    row(f"greedy soup, {len(paths)} × {options.images} images", f"**{seconds:.1f} s** ({phases})")
    scored = result.images or {}
    row("its choice", f"{len(result.ingredients)} ingredients, top-1 {result.score.value:.4f}; "
        f"images through the model {scored.get('scored')}, spared {scored.get('saved')}{memory(options)}")  # fmt: skip


def learned(options: argparse.Namespace) -> None:
    """A few steps of the learned soup; what comes before the first step is told apart."""
    from clipmerge.search.learned import learned_soup

    steps, batch = (3, 64) if options.quick else (8, 256)
    images = split(options).subset(np.arange(min(options.images, steps * batch)))
    at: list[float] = []
    began = time.perf_counter()

    def progress(what: str, done: int, total: int) -> None:
        if what == "learning":
            at.append(time.perf_counter())

    learned_soup(
        paths_of(options), evaluator(options, images), epochs=1, batch_size=batch, on_progress=progress
    )
    gaps = [after - before for before, after in pairwise(at)]
    first = at[0] - began
    said = f"**{statistics.median(gaps):.3f} s a step** (first step done after {first:.1f} s)"
    row(f"learned soup, {len(paths_of(options))} candidates, batch {batch}", said + memory(options))


class Phases:
    """Seconds by what is reported as going on."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.now, self.since = "opening", time.perf_counter()

    def __call__(self, what: str, done: int, total: int) -> None:
        moment = time.perf_counter()
        self.spent[self.now] = self.spent.get(self.now, 0.0) + moment - self.since
        # A pass over images belongs to the phase that asked for it.
        self.now = self.now if what.startswith("scoring") and self.now in ("ranking", "trying") else what
        self.since = moment

    def __str__(self) -> str:
        return ", ".join(f"{what} {seconds:.1f}" for what, seconds in self.spent.items() if seconds >= 0.05)


# -- the paper's code --------------------------------------------------------------------------------------


def published(options: argparse.Namespace) -> None:
    """Seconds of one candidate and of one trial, times as many as there are."""
    from safetensors.torch import load_file

    from clipmerge.data.pixels import pixels

    paths, device, spec = paths_of(options), torch.device(options.device), spec_of(options)
    sample = min(options.images, 1024)
    images = torch.from_numpy(pixels(split(options).subset(np.arange(sample)), spec.preprocess)).to(device)
    head = torch.randn(options.classes, spec.config["embed_dim"], device=device)
    mean = [torch.tensor(spec.preprocess[key], device=device).view(1, 3, 1, 1) for key in ("mean", "std")]

    def score(state: dict[str, torch.Tensor], kind: torch.dtype) -> tuple[float, float]:
        """(seconds to a model on the device, seconds of a pass over the sample)."""
        import open_clip

        began = time.perf_counter()
        model = open_clip.CLIP(**{key: value for key, value in spec.config.items() if key != "custom_text"})
        model.load_state_dict(state)
        model = model.to(device).eval()
        wait(device)
        loaded = time.perf_counter()
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=kind == torch.bfloat16):
            for start in range(0, sample, 256):
                ready = (images[start : start + 256].float() / 255 - mean[0]) / mean[1]
                (model.encode_image(ready, normalize=True).float() @ head.T).argmax(1).cpu()
        wait(device)
        return loaded - began, time.perf_counter() - loaded

    files, trials, builds = [], [], []
    passes: dict[str, list[float]] = {"fp32": [], "bf16": []}
    running = {key: value.float() for key, value in load_file(paths[0]).items()}
    for i, path in enumerate(paths[: 2 if options.quick else 3]):
        began = time.perf_counter()
        new = load_file(path)
        files.append(time.perf_counter() - began)
        new = {key: value.float() for key, value in new.items()}
        loaded = time.perf_counter()
        running = {k: running[k].clone() * (i / (i + 1)) + new[k].clone() * (1 / (i + 1)) for k in running}
        trials.append(time.perf_counter() - loaded)
        for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            build, seconds = score(running, kind)
            if i:  # the first one warms up
                builds.append(build)
                passes[name].append(seconds)
    once = statistics.median(files) + statistics.median(builds)
    count = len(paths)
    for name, seconds in passes.items():
        whole = statistics.median(seconds) * options.images / sample
        total = count * (once + whole) + (count - 1) * (once + statistics.median(trials) + whole)
        row(f"the paper's code, {name}, scaled up from {sample} images",
            f"**{total:.0f} s** (a file into a model {once:.2f}, averaging {statistics.median(trials):.2f}, "
            f"a pass {whole:.2f}; decoding not counted)")  # fmt: skip


# -- small things ------------------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory(options: argparse.Namespace) -> str:
    """Peak memory so far, and start anew."""
    if not options.device.startswith("cuda"):
        return ""
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return f"; peak {peak:.1f} GiB"


def row(what: str, said: str) -> None:
    print(f"| {what} | {said} |", flush=True)


def model(options: argparse.Namespace) -> None:
    """Write the configuration that --quick takes."""
    Path(options.model).write_text(json.dumps({"model_cfg": QUICK, "preprocess_cfg": {}}))


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "model": model,
    "make": make,
    "greedy": greedy,
    "published": published,
    "learned": learned,
}

if __name__ == "__main__":
    main()
