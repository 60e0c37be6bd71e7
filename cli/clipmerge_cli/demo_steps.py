"""The demo as commands: its model, its images, what is trained and what is merged. Nothing here is heavy to import."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

MODEL_FILE = "digits-clip.json"
MODEL: Mapping[str, Any] = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 16, "layers": 3, "width": 96, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.3, 0.3, 0.3], "std": [0.35, 0.35, 0.35]},
}
"""An open_clip configuration of 2.0 M parameters, most of them the vocabulary's."""

TEMPLATE = 'a photo of the number: "{}".'

DIGITS = "data/digits.npz"
SHIFTS = {"turned": "rotate:25", "blurred": "blur:1", "noisy": "noise:0.3", "pixelated": "pixelate:2"}
"""Column → distribution shift, of digits that no finetuning but one task's has seen changed like that."""

SPLITS = {
    "held-out": f"{DIGITS}#val",
    "test": f"{DIGITS}#test",
    **{name: f"{DIGITS}#test@{shift}" for name, shift in SHIFTS.items()},
    "low": "data/low.npz#test",
    "high": "data/high.npz#test",
}
"""What models are scored on: name → DATA. Choices are made on held-out images; tests and shifts are only reported."""

COMPARED = ("held-out", "test", *SHIFTS)
"""What every ingredient, soup and interpolation is scored on."""

TASKWISE = ("low", "high", "test", "blurred")
"""What every task, sum, negation and patch is scored on."""

MERGED = {
    "uniform": ("uniform_soup", "uniform", "uniform soup"),
    "greedy": ("greedy_soup", "greedy", "greedy soup ({} of {})"),
    "wise-ft": ("wise_ft", "wise-ft", "WiSE-FT, α = {:g}"),
    "added": ("addition", "added", "low + high, scale {:g}"),
    "forgot": ("negation", "negated", "low forgotten, scale {:g}"),
    "patched": ("patching", "patched", "patched, α = {:g}"),
}
"""File → key in results.json, role in the figure, name in the tables."""

_SCRIPT = """#!/usr/bin/env bash
# Every step of the demo as a command. Results go to again/, beside what the demo made.
set -euo pipefail
export OMP_NUM_THREADS=1  # as the demo: one thread and the CPU, for the same bytes everywhere
cd "$(dirname "$0")"
rm -rf again && mkdir -p again/ft again/tasks

# The base, from scratch, on digits at every angle within 45°: modest everywhere, and as good at 25° as upright
clipmerge finetune --base none --model digits-clip.json --train data/broad.npz --plot base-training.png \\
  --lr 0.002 --seed 0 --steps 100 --augment none {training} -o base.safetensors

# Eight finetunings of it on half as many upright digits; the last learning rate is too high on purpose
clipmerge finetune {ft} --lr 0.0005 --seed 1 --steps 60 {training} --augment none -o ft/ft1.safetensors
clipmerge finetune {ft} --lr 0.001 --seed 2 --steps 60 {training} --augment none -o ft/ft2.safetensors
clipmerge finetune {ft} --lr 0.002 --seed 3 --steps 60 {training} --augment none -o ft/ft3.safetensors
clipmerge finetune {ft} --lr 0.0005 --seed 4 --steps 60 {training} --augment crop:0.7 -o ft/ft4.safetensors
clipmerge finetune {ft} --lr 0.001 --seed 5 --steps 60 {training} --augment crop:0.7 -o ft/ft5.safetensors
clipmerge finetune {ft} --lr 0.001 --seed 6 --steps 60 {training} --augment randaugment:1,5 -o ft/ft6.safetensors
clipmerge finetune {ft} --lr 0.002 --seed 7 --steps 60 {training} --augment randaugment:1,5 -o ft/ft7.safetensors
clipmerge finetune {ft} --lr 0.004 --seed 8 --steps 60 {training} --augment none -o ft/ft8.safetensors

# Three finetunings on tasks; task vectors live in the image tower, as in the papers
clipmerge finetune {task} --train data/low.npz#train --seed 11 --steps 60 {training} -o tasks/low.safetensors
clipmerge finetune {task} --train data/high.npz#train --seed 12 --steps 60 {training} -o tasks/high.safetensors
clipmerge finetune {task} --train {digits}#train@blur:1 --seed 13 --steps 60 {training} -o tasks/blurred.safetensors

# Each of them on test digits, and under four shifts
clipmerge evaluate base.safetensors ft/*.safetensors --data test={digits}#test \\
  {shifts} {scoring}

# Soups
clipmerge soup ft/*.safetensors -o uniform.safetensors
clipmerge soup ft/*.safetensors --greedy --val {digits}#val {scoring} --plot greedy-soup.png -o greedy.safetensors

# WiSE-FT: from the base to the best single; alpha has the best mean of held-out digits and shifts of them
clipmerge interpolate base.safetensors {best} --alphas 0:1:0.1 --eval id={digits}#val \\
  {held_out_shifts} {scoring} --plot wise-ft.png -o wise-ft.safetensors

# Task arithmetic: add two tasks, forget one
clipmerge add base.safetensors tasks/low.safetensors tasks/high.safetensors --scale auto --scales 0:1:0.1 \\
  --val data/low.npz#val --val data/high.npz#val {scoring} --plot added.png -o added.safetensors
clipmerge negate base.safetensors tasks/low.safetensors --scale auto --scales 0:1:0.1 \\
  --target data/low.npz#val --control data/high.npz#val {scoring} --plot forgot.png -o forgot.safetensors

# PAINT: learn blurred digits, keep upright ones
clipmerge patch base.safetensors tasks/blurred.safetensors --patch {digits}#val@blur:1 --supported {digits}#val \\
  --alphas 0:1:0.1 {scoring} --plot patched.png -o patched.safetensors

# What was written, and whether it is what it says
clipmerge inspect greedy.safetensors
clipmerge verify greedy.safetensors --parents ft
clipmerge compare uniform.safetensors greedy.safetensors --base base.safetensors
"""

SCORING = f"--device cpu --templates {shlex.quote(TEMPLATE)}"
_SHARED = {
    "digits": DIGITS,
    "shifts": " ".join(f"--data {name}={SPLITS[name]}" for name in SHIFTS),
    "held_out_shifts": " ".join(f"--eval {name}={DIGITS}#val@{shift}" for name, shift in SHIFTS.items()),
    "scoring": f"\\\n  {SCORING}",
    "training": f"\\\n  --batch-size 64 {SCORING}",
    "ft": f"--base base.safetensors --train {DIGITS}#train",
    "task": "--base base.safetensors --towers image --augment none --lr 0.001",
}


def script(best: str, pace: float = 1.0, folder: str = "again/") -> str:
    """Return all steps as a shell script.

    Args:
        best: the file of the best single finetuning.
        pace: a factor on the number of training steps.
        folder: where results go.
    """
    text = re.sub(r"--steps (\d+)", lambda steps: f"--steps {max(1, round(int(steps[1]) * pace))}", _SCRIPT)
    return re.sub(r"(-o|--plot) ", rf"\1 {folder}", text.format(best=best, **_SHARED))


def commands(name: str, best: str = "", pace: float = 1.0) -> dict[str, list[str]]:
    """Return the words of each command called `name` by the file that it writes, which is its last word."""
    lines = script(best, pace, folder="").replace("\\\n", " ").splitlines()
    words = [shlex.split(line)[1:] for line in lines if line.startswith(f"clipmerge {name}")]
    return {command[-1]: command for command in words}
