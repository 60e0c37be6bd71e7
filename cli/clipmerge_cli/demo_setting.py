"""The demo's setting: its model, its images, and what each finetuning is. Nothing here is heavy to import."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
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

SPLITS = {
    "held-out": "digits#val",
    "test": "digits#test",
    "held-out shift": "digits#val@rotate:25",
    "shift": "digits#test@rotate:25",
    "held-out blurred": "digits#val@blur:1.5",
    "blurred": "digits#test@blur:1.5",
    "held-out low": "data/low.npz#val",
    "low": "data/low.npz#test",
    "held-out high": "data/high.npz#val",
    "high": "data/high.npz#test",
}
"""What is scored: name → DATA. Choices are made on the held-out ones, the others are only reported."""

COMPARED = ("held-out", "test", "shift")
"""What every ingredient, soup and interpolation is scored on."""

TASKWISE = ("low", "high", "test", "blurred")
"""What every task, sum, negation and patch is scored on."""

ALPHAS = "0:1:0.1"
SCALES = "0:1:0.1"


@dataclass(frozen=True)
class Training:
    """One finetuning (or, with `base` False, training from scratch), as a call and as a command."""

    name: str
    train: str
    lr: float
    steps: int
    seed: int
    augment: str = "none"
    towers: str = "both"
    base: bool = True

    @property
    def title(self) -> str:
        """The file's stem and what sets this training apart."""
        augment = "" if self.augment == "none" else f", {self.augment}"
        return f"{self.name.rpartition('/')[2]}: lr {self.lr:g}{augment}"

    @property
    def path(self) -> str:
        return f"{self.name}.safetensors"

    def options(self, pace: float) -> dict[str, Any]:
        """Keyword arguments of `clipmerge.finetune`."""
        return {
            "lr": self.lr, "steps": max(1, round(self.steps * pace)), "seed": self.seed, "batch_size": 64,
            "augment": self.augment, "towers": self.towers, "templates": TEMPLATE,
        }  # fmt: skip

    def command(self, pace: float, out: str) -> list[str]:
        """The words that do the same at a shell."""
        words = ["clipmerge", "finetune", "--train", self.train]
        words += ["--base", "base.safetensors"] if self.base else ["--base", "none", "--model", MODEL_FILE]
        for name, value in self.options(pace).items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        return [*words, "-o", out]


BASE = Training("base", "data/broad.npz", lr=2e-3, steps=70, seed=0, base=False)
"""Trained on digits at every angle within 45°: modest everywhere, and as good at 25° as upright."""

INGREDIENTS = (
    Training("ft/ft1", "digits#train", lr=5e-4, steps=60, seed=1),
    Training("ft/ft2", "digits#train", lr=1e-3, steps=60, seed=2),
    Training("ft/ft3", "digits#train", lr=2e-3, steps=60, seed=3),
    Training("ft/ft4", "digits#train", lr=1e-3, steps=60, seed=4, augment="crop:0.7"),
    Training("ft/ft5", "digits#train", lr=1e-3, steps=60, seed=5, augment="randaugment:1,5"),
    Training("ft/ft6", "digits#train", lr=4e-3, steps=60, seed=6),
)
"""Upright digits only: better there, worse at 25°. The last learning rate is too high on purpose."""

TASKS = (
    Training("tasks/low", "data/low.npz#train", lr=1e-3, steps=60, seed=11, towers="image"),
    Training("tasks/high", "data/high.npz#train", lr=1e-3, steps=60, seed=12, towers="image"),
    Training("tasks/blurred", "digits#train@blur:1.5", lr=1e-3, steps=60, seed=13, towers="image"),
)
"""Task vectors live in the image tower; the text tower stays the base's, as in the papers."""

TRAININGS = (BASE, *INGREDIENTS, *TASKS)


def shell(words: list[str]) -> str:
    """A command line; globs stay globs."""
    return " ".join(word if word == "ft/*.safetensors" else shlex.quote(word) for word in words)
