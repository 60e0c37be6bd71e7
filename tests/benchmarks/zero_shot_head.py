"""ImageNet's zero-shot head: 1000 classes × 80 templates, against open_clip's own builder, in turns.

Both build the rows of the same random subset of classes with ViT-B-32's text tower (random weights, fp32). Run:

    python tests/benchmarks/zero_shot_head.py [--classes 8] [--rounds 3] [--device cpu]
"""

import argparse
import statistics
import time

import numpy as np
import open_clip
import torch

from clipmerge.data.prompts import prompts
from clipmerge.evaluate import heads
from clipmerge.model import build_model, get_tokenizer, resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=8, help="of ImageNet's 1000; costs are per class")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    spec = resolve_model("ViT-B-32")
    model = build_model(spec, options.device, seed=0)
    tokenizer = get_tokenizer(spec)
    templates = [t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]
    names = open_clip.IMAGENET_CLASSNAMES
    chosen = np.random.default_rng(0).choice(len(names), options.classes, replace=False)
    classes = [names[i] for i in chosen]

    def ours() -> torch.Tensor:
        heads._distinct_tokens.cache_clear()
        return heads.zero_shot_head(model, tokenizer, classes, templates)

    def theirs() -> torch.Tensor:
        return open_clip.build_zero_shot_classifier(
            model, tokenizer, classes, templates, num_classes_per_batch=10, device=options.device
        ).T

    times: dict[str, list[float]] = {"ours": [], "open_clip": []}
    rows: dict[str, torch.Tensor] = {}
    for _ in range(options.rounds):
        for name, build in (("ours", ours), ("open_clip", theirs)):
            start = time.perf_counter()
            rows[name] = build().cpu()
            times[name].append(time.perf_counter() - start)

    tokens = tokenizer([text for row in prompts(names, templates) for text in row])
    lengths = heads.text_lengths(model, tokens.to(options.device)).float()
    ratio = statistics.median(t / o for t, o in zip(times["open_clip"], times["ours"], strict=True))
    print(
        f"{options.classes} classes × {len(templates)} templates, ViT-B-32's text tower on {options.device}"
    )
    for name, taken in times.items():
        seconds = statistics.median(taken)
        print(f"  {name:10} {seconds:8.2f} s, 1000 classes {seconds * 1000 / options.classes:8.0f} s")
    print(f"  open_clip ÷ ours: {ratio:.2f}   (at least 4 is the aim)")
    print(f"  largest difference of a row's entry: {(rows['ours'] - rows['open_clip']).abs().max():.1e}")
    print(
        f"  ImageNet's 80,000 prompts: {lengths.mean():.1f} tokens on average, {int(lengths.max())} at most, of 77"
    )


if __name__ == "__main__":
    main()
