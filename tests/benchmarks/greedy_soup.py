"""A greedy soup by `clipmerge soup --greedy` against the published procedure, straight line by straight line.

    python tests/benchmarks/greedy_soup.py [--data FILE.npz] [--images 5000] [--checkpoints 8] [--pixels 400]

The data is an `.npz` (labels, split, classes, and images or blob + offsets) or, by default, the embedded digits,
enlarged and jittered; the held-out images are written as a folder of JPEGs. A tiny CLIP is trained on the rest,
and finetuned with different seeds and learning rates. Then, in turns and each in a process of its own:

- *straight line*: as the paper's code does it. For every candidate and every trial the files are read and averaged,
  a model is made from the result, its zero-shot head is built, and a DataLoader decodes every image;
- *cold*: `clipmerge soup --greedy` with an empty cache;
- *warm*: the same with pixels and heads in the cache, and no score remembered (`--fresh`).

All must choose the same ingredients with the same accuracies. Prints ratios, peak memory, and where the time goes.
"""

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

MODEL: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 16, "layers": 3, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2, "mlp_ratio": 2.0},
}  # fmt: skip
MEAN = STD = [0.5, 0.5, 0.5]
TEMPLATES = [
    "a photo of a {}.",
    "a bad photo of the {}.",
    "a {} in the wild.",
    "itap of a {}.",
    "a drawing of a {}.",
]
SPENT: dict[str, float] = {}


@contextmanager
def clock(what: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        SPENT[what] = SPENT.get(what, 0.0) + time.perf_counter() - start


# -- images ------------------------------------------------------------------------------------------------


def digits() -> tuple[list[Any], np.ndarray, list[str], np.ndarray]:
    """(PIL images, labels, class names, whether held out) of scikit-learn's digits."""
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    images = [Image.fromarray((255 - 15.9 * x).astype(np.uint8)).convert("RGB") for x in found.images]
    held_out = np.arange(len(images)) % 3 == 0
    return images, found.target, [str(i) for i in range(10)], held_out


def from_npz(path: Path) -> tuple[list[Any], np.ndarray, list[str], np.ndarray]:
    from PIL import Image

    data = np.load(path)
    if "images" in data:
        images = [Image.fromarray(x).convert("RGB") for x in data["images"]]
    else:
        blob, at = data["blob"], data["offsets"]
        images = [
            Image.open(io.BytesIO(blob[at[i] : at[i + 1]].tobytes())).convert("RGB")
            for i in range(len(at) - 1)
        ]
    return images, data["labels"].astype(np.int64), [str(c) for c in data["classes"]], data["split"] != 0


def jittered(image: Any, size: int, rng: np.random.Generator) -> Any:
    """The image turned, moved, scaled and made noisy, at size × size."""
    from PIL import Image

    side = image.size[0]
    cut = rng.uniform(0, 0.12, 4) * side
    box = (cut[0], cut[1], side - cut[2], side - cut[3])
    made = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    made = made.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, fillcolor=made.getpixel((0, 0)))
    noisy = np.asarray(made, np.float32) + rng.normal(0, 6, (size, size, 1)).astype(np.float32)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def write_jpegs(folder: Path, data: Any, count: int, size: int) -> None:
    images, labels, names, held_out = data
    rng = np.random.default_rng(1)
    source = np.flatnonzero(held_out)
    for i in range(count):
        which = source[i % len(source)]
        place = folder / names[labels[which]]
        place.mkdir(parents=True, exist_ok=True)
        jittered(images[which], size, rng).save(place / f"{i:05}.jpg", quality=90)


# -- checkpoints -------------------------------------------------------------------------------------------


def tokens_of(names: list[str]) -> Any:
    import open_clip

    return open_clip.SimpleTokenizer(context_length=77)([t.format(n) for n in names for t in TEMPLATES])


def head_of(model: Any, tokens: Any, classes: int) -> Any:
    """Zero-shot head: normalise, average over templates, normalise."""
    import torch

    prompts = torch.nn.functional.normalize(model.encode_text(tokens), dim=-1)
    return torch.nn.functional.normalize(prompts.view(classes, len(TEMPLATES), -1).mean(1), dim=-1)


def train(model: Any, pixels: Any, labels: Any, names: list[str], lr: float, steps: int, seed: int) -> None:
    """Cross-entropy against the class prompts, both towers."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    tokens = tokens_of(names)[:: len(TEMPLATES), :16]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    padded = torch.nn.functional.pad(tokens, (0, 61))
    for _ in range(steps):
        pick = torch.randint(len(pixels), (128,), generator=draw)
        head = torch.nn.functional.normalize(model.encode_text(padded), dim=-1)
        features = torch.nn.functional.normalize(model.encode_image(pixels[pick]), dim=-1)
        loss = torch.nn.functional.cross_entropy(model.logit_scale.exp() * features @ head.T, labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()


def make_checkpoints(folder: Path, data: Any, count: int) -> list[Path]:
    import open_clip
    import torch
    from safetensors.torch import save_file

    images, labels, names, held_out = data
    rng = np.random.default_rng(2)
    pick = rng.permutation(np.flatnonzero(~held_out))[:6000]
    pixels = np.stack([np.asarray(jittered(images[i], 32, rng)) for i in pick])
    ready = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    targets = torch.from_numpy(labels[pick].astype(np.int64))
    torch.manual_seed(0)
    base = open_clip.CLIP(**MODEL)
    train(base, ready, targets, names, 1e-3, 200, 0)
    start = {k: v.clone() for k, v in base.state_dict().items()}
    paths = []
    for i in range(count):
        base.load_state_dict(start)
        train(base, ready, targets, names, float(10 ** rng.uniform(-4, -3)), 150, i + 1)
        paths.append(folder / f"ft{i}.safetensors")
        save_file({k: v.contiguous() for k, v in base.state_dict().items()}, paths[-1])
    return paths


def make(folder: Path, source: str, images: int, size: int, checkpoints: int) -> None:
    """Everything that the turns need, in `folder`; the configuration is written last."""
    data = digits() if source == "digits" else from_npz(Path(source))
    (folder / "ckpts").mkdir(parents=True, exist_ok=True)
    write_jpegs(folder / "images", data, images, size)
    make_checkpoints(folder / "ckpts", data, checkpoints)
    (folder / "templates.txt").write_text("\n".join(TEMPLATES))
    cfg = {"size": 32, "mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "tiny.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": cfg}))


# -- the published procedure -------------------------------------------------------------------------------


def straight_line(paths: list[Path], jpegs: Path, workers: int) -> dict[str, Any]:
    """Recipe 1 of arXiv 2203.05482 (≥), the way its code goes about it."""
    with clock("imports"):
        import open_clip
        import torch
        from open_clip.transform import PreprocessCfg, image_transform_v2
        from safetensors.torch import load_file
        from torchvision.datasets import ImageFolder

    cfg = PreprocessCfg(size=32, mean=MEAN, std=STD, interpolation="bicubic", resize_mode="shortest")
    transform = image_transform_v2(cfg, is_train=False)

    def accuracy(members: list[int]) -> float:
        with clock("files to model"):
            states = [load_file(paths[i]) for i in members]
            mean = {k: sum(s[k] for s in states) / len(states) for k in states[0]}
            model = open_clip.CLIP(**MODEL)
            model.load_state_dict(mean)
            model.eval()
        dataset = ImageFolder(str(jpegs), transform)
        with clock("head"), torch.no_grad():
            head = head_of(model, tokens_of(dataset.classes), len(dataset.classes))
        loader = iter(torch.utils.data.DataLoader(dataset, batch_size=256, num_workers=workers))
        right = 0
        while True:
            with clock("waiting for the DataLoader"):
                batch = next(loader, None)
            if batch is None:
                return right / len(dataset)
            with clock("forward"), torch.no_grad():
                features = model.encode_image(batch[0])
                features = features / features.norm(dim=-1, keepdim=True)
                logits = model.logit_scale.exp() * features @ head.T
                right += int((logits.argmax(1) == batch[1]).sum())

    alone = [accuracy([i]) for i in range(len(paths))]
    order = sorted(range(len(paths)), key=lambda i: (-alone[i], i))
    chosen, best = order[:1], alone[order[0]]
    for i in order[1:]:
        new = accuracy([*chosen, i])
        if new >= best:
            chosen, best = [*chosen, i], new
    return {
        "order": [paths[i].stem for i in order],
        "alone": {paths[i].stem: alone[i] for i in order},
        "ingredients": [paths[i].stem for i in chosen],
        "accuracy": best,
    }


# -- clipmerge, with clocks around its rooms ---------------------------------------------------------------


def clipmerge(args: list[str]) -> None:
    """`clipmerge …` in this process; the clocks only read the time."""
    with clock("imports"):
        import open_clip  # noqa: F401

        from clipmerge.data import open as opening
        from clipmerge.evaluate import predictor, resident
        from clipmerge_cli.app import main

    def timed(owner: Any, name: str, what: str) -> None:
        plain: Callable[..., Any] = getattr(owner, name)

        def call(*given: Any, **options: Any) -> Any:
            with clock(what):
                return plain(*given, **options)

        setattr(owner, name, call)

    timed(predictor, "pixels", "pixels")
    timed(predictor, "zero_shot_head", "head")
    timed(predictor, "get_tokenizer", "tokenizer")
    timed(opening, "open_split", "opening the data")
    timed(resident.Resident, "__init__", "building the model")
    timed(resident.Resident, "load", "weights into the model")
    timed(resident.Resident, "lerp", "weights into the model")
    timed(predictor.Predictor, "_logits", "forward")
    code = main(args)
    if code:
        sys.exit(code)


# -- turns -------------------------------------------------------------------------------------------------


def in_a_process(args: list[str], env: dict[str, str]) -> dict[str, Any]:
    """Run this file's `args` elsewhere: {wall, peak (MB), spent, answer}."""
    with tempfile.TemporaryDirectory() as folder:
        out, spent = Path(folder) / "out", Path(folder) / "spent"
        start = time.perf_counter()
        command = [sys.executable, __file__, "--inner", str(spent), *args]
        with out.open("w") as stdout:
            process = subprocess.Popen(command, stdout=stdout, env=os.environ | env)
            _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        if status:
            sys.exit(f"failed: {' '.join(command)}")
        answer = json.loads(out.read_text())
        return {
            "wall": wall,
            "cpu": usage.ru_utime + usage.ru_stime,  # workers included: they were waited for
            "peak": usage.ru_maxrss / 1024,
            "spent": json.loads(spent.read_text()),
            "answer": answer,
        }


def inner(args: list[str]) -> None:
    spent, kind, *rest = args
    start = time.perf_counter()
    if kind == "straight":
        workers, jpegs, *paths = rest
        print(json.dumps(straight_line([Path(p) for p in paths], Path(jpegs), int(workers))))
    else:
        clipmerge(rest)
    SPENT["everything else"] = time.perf_counter() - start - sum(SPENT.values())
    Path(spent).write_text(json.dumps(SPENT))


def answer_of(document: dict[str, Any]) -> dict[str, Any]:
    return {
        "order": document["order"],
        "alone": {step["name"]: step["alone"] for step in document["history"]},
        "ingredients": document["ingredients"],
        "accuracy": document["score"]["value"],
    }


def main() -> None:
    if sys.argv[1:2] == ["--inner"]:
        inner(sys.argv[2:])
        return
    if sys.argv[1:2] == ["--make"]:
        make(Path(sys.argv[2]), sys.argv[3], *(int(n) for n in sys.argv[4:]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="an .npz; default: the embedded digits")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--pixels", type=int, default=400, help="width and height of the JPEGs")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of the DataLoader")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep images and checkpoints here, and use them again")
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="greedy-soup-"))
    if not (folder / "tiny.json").exists():  # in a process of its own, so that this one stays small
        source = str(asked.data or "digits")
        sizes = [str(n) for n in (asked.images, asked.pixels, asked.checkpoints)]
        subprocess.run([sys.executable, __file__, "--make", str(folder), source, *sizes], check=True)
    jpegs, config = folder / "images", folder / "tiny.json"
    paths = [str(p) for p in sorted((folder / "ckpts").glob("*.safetensors"))]
    soup = ["clipmerge", "soup", *paths, "--greedy", "--val", str(jpegs), "--model", str(config)]
    soup += ["--templates", str(folder / "templates.txt"), "--json", "--quiet", "--fresh", "--force"]
    soup += ["--output", str(folder / "soup.safetensors")]
    runs: dict[str, list[dict[str, Any]]] = {"straight line": [], "cold": [], "warm": []}
    for _ in range(asked.rounds):
        cache = {"CLIPMERGE_CACHE": str(folder / "cache")}
        shutil.rmtree(folder / "cache", ignore_errors=True)
        runs["straight line"].append(
            in_a_process(["straight", str(asked.workers), str(jpegs), *paths], cache)
        )
        runs["cold"].append(in_a_process(soup, cache))
        runs["warm"].append(in_a_process(soup, cache))
    show(runs, len(list(jpegs.rglob("*.jpg"))), len(paths), asked.pixels)
    if not asked.folder:
        shutil.rmtree(folder)


def show(runs: dict[str, list[dict[str, Any]]], images: int, checkpoints: int, size: int) -> None:
    expected = runs["straight line"][0]["answer"]
    same = all(answer_of(run["answer"]) == expected for kind in ("cold", "warm") for run in runs[kind])
    wall = {kind: statistics.median(run["wall"] for run in found) for kind, found in runs.items()}
    cpu = {kind: statistics.median(run["cpu"] for run in found) for kind, found in runs.items()}
    print(f"{checkpoints} checkpoints, {images} JPEGs of {size} × {size}, {os.cpu_count()} cores")
    print(f"ingredients {', '.join(expected['ingredients'])}; accuracy {expected['accuracy']:.4f}")
    print(f"same order, accuracies and ingredients: {'yes' if same else 'NO'}")
    for kind, found in runs.items():
        ratio, work = wall["straight line"] / wall[kind], cpu["straight line"] / cpu[kind]
        peak = statistics.median(run["peak"] for run in found)
        spent = sorted(found[0]["spent"].items(), key=lambda item: -item[1])
        where = ", ".join(f"{what} {seconds:.1f}" for what, seconds in spent if seconds >= 0.05)
        figures = (
            f"{wall[kind]:7.1f} s {ratio:5.1f}×, CPU {cpu[kind]:6.1f} s {work:5.1f}×, peak {peak:5.0f} MB"
        )
        print(f"{kind:>13}: {figures}  ({where})")
    saved = runs["warm"][0]["answer"]["images"]
    print(f"images through the model: {saved['scored']}, spared by stopping early: {saved['saved']}")
    if not same:
        for kind in ("cold", "warm"):
            print(kind, json.dumps(answer_of(runs[kind][0]["answer"])))
        sys.exit(f"expected {json.dumps(expected)}")


if __name__ == "__main__":
    main()
