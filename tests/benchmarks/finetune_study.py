"""FLYP, CE, LP-FT and CAR-FT from one base, each with its WiSE-FT curve: held-out, test and a shift of the test.

    python tests/benchmarks/finetune_study.py --set mnist.npz usps.npz#test --set cifar10.npz cifar10.npz#test@blur:1

The base is a small CLIP trained from scratch on strongly augmented images of the set: it knows the classes a little and
keeps its footing under a shift. Every method then has the same images, steps, learning rates to choose from (by
held-out accuracy) and augmentation. α is chosen on the held-out split, never on test or shift.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import clipmerge as cm

MODEL = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 32,
        "layers": 4,
        "width": 96,
        "head_width": 32,
        "patch_size": 8,
        "mlp_ratio": 2.0,
    },
    "text_cfg": {
        "context_length": 24,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 2,
        "mlp_ratio": 2.0,
    },
}
METHODS = ("flyp", "ce", "lp-ft", "car-ft")
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--set", dest="sets", nargs=2, action="append", required=True, metavar=("DATA", "SHIFT")
    )
    parser.add_argument("--out", type=Path, default=Path("finetune-study"))
    parser.add_argument("--images", type=int, default=2000, help="training images")
    parser.add_argument("--base-epochs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-4, 3e-4])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "tiny.json").write_text(json.dumps(MODEL))
    found = []
    for data, shift in options.sets:
        found += study(
            data, shift, options.out, options.images, options.base_epochs, options.epochs, options.lrs
        )
    (options.out / "study.json").write_text(json.dumps(found, indent=1))


def study(
    data: str, shift: str, out: Path, images: int, base_epochs: int, epochs: int, lrs: list[float]
) -> list[dict[str, Any]]:
    name = Path(data).stem
    train, val = cm.open_split(f"{data}#train", limit=images), cm.open_split(f"{data}#val", limit=1000)
    splits = {
        "val": val,
        "test": cm.open_split(f"{data}#test", limit=2000),
        "shift": cm.open_split(shift, limit=2000),
    }
    began = time.perf_counter()
    base = cm.finetune(
        None, train, model=out / "tiny.json", out=out / f"{name}-base.safetensors", lr=1e-3, batch_size=100,
        epochs=base_epochs, augment="crop:0.4+randaugment:2,9", force=True, save_every=0,
    )  # fmt: skip
    judge = cm.Evaluator(splits)
    print(
        f"\n{name}, shift {Path(shift).name}: {len(train)} images, base {accuracies(judge, base)}", flush=True
    )
    rows = [{"set": name, "method": "base", **accuracies(judge, base)}]
    for method in METHODS:
        start, tuned, lr = best_of(method, base, train, judge, lrs, out / f"{name}-{method}", epochs)
        curve = [{"alpha": a, **accuracies(judge, cm.interpolate(start, tuned, a))} for a in ALPHAS]
        chosen = max(curve, key=lambda point: point["val"])
        rows += [{"set": name, "method": method, "lr": lr, **point} for point in curve]
        print(
            f"  {method:7} lr {lr:g}: {show(curve[-1])}   WiSE-FT at α = {chosen['alpha']:.2f}: {show(chosen)}"
        )
        print("          curve (test/shift): " + "  ".join(
            f"{p['alpha']:.2f} {p['test']:.1%}/{p['shift']:.1%}" for p in curve), flush=True)  # fmt: skip
    print(f"  {time.perf_counter() - began:.0f} s")
    return rows


def best_of(
    method: str, base: Any, train: Any, judge: Any, lrs: list[float], stem: Path, epochs: int
) -> tuple[Any, Any, float]:
    """The run with the best held-out accuracy, and where it started (base, with its first head)."""
    runs = []
    for lr in lrs:
        path = stem.with_name(f"{stem.name}-{lr:g}.safetensors")
        tuned = cm.finetune(
            base, train, method=method, out=path, lr=lr, batch_size=100, epochs=epochs, augment="crop", start=True,
            force=True, save_every=0,
        )  # fmt: skip
        runs.append((accuracies(judge, tuned)["val"], path, tuned, lr))
    _, path, tuned, lr = max(runs, key=lambda run: run[0])
    return cm.load(path.with_suffix(".run") / f"{path.stem}.start.safetensors"), tuned, lr


def accuracies(judge: Any, weights: Any) -> dict[str, float]:
    return {name: score.value for name, score in judge.scores(weights).items()}


def show(point: dict[str, Any]) -> str:
    return f"held-out {point['val']:.1%}, test {point['test']:.1%}, shift {point['shift']:.1%}"


if __name__ == "__main__":
    main()
