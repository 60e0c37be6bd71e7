"""The demo as commands: its model, its images, what is trained and what is merged. Nothing here is heavy to import."""

import shlex
from collections.abc import Iterator, Mapping
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
SHARED = ["--templates", TEMPLATE, "--device", "cpu"]
"""The same numbers everywhere: on the CPU, in fp32."""

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

INGREDIENT_FILES = "ft/*.safetensors"
GRID = "0:1:0.1"


@dataclass(frozen=True)
class Training:
    """One finetuning of the base, or the base's own training from scratch."""

    name: str
    train: str
    lr: float
    steps: int
    seed: int
    augment: str = "none"
    towers: str = "both"

    @property
    def title(self) -> str:
        """The file's stem and what sets this training apart."""
        augment = "" if self.augment == "none" else f", {self.augment}"
        return f"{self.name.rpartition('/')[2]}: lr {self.lr:g}{augment}"

    @property
    def path(self) -> str:
        return f"{self.name}.safetensors"

    def words(self, pace: float) -> list[str]:
        """Return the command, with `pace` times the steps."""
        scratch = ["--base", "none", "--model", MODEL_FILE, "--plot", "base-training.png"]
        options = {
            "--lr": self.lr, "--steps": max(1, round(self.steps * pace)), "--seed": self.seed,
            "--batch-size": 64, "--augment": self.augment, "--towers": self.towers, "-o": self.path,
        }  # fmt: skip
        start = scratch if self is BASE else ["--base", BASE.path]
        given = [word for option, value in options.items() for word in (option, str(value))]
        return ["finetune", "--train", self.train, *start, *SHARED, *given]


BASE = Training("base", "data/broad.npz", lr=2e-3, steps=70, seed=0)
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


def merges(best: str) -> dict[str, list[str]]:
    """Return the commands that merge and choose, by their keys in results.json.

    Args:
        best: the file of the best single finetuning.
    """
    held, shift, low, high, blurred = (
        SPLITS[f"held-out{s}"] for s in ("", " shift", " low", " high", " blurred")
    )
    low_file, high_file, blurred_file = (task.path for task in TASKS)
    grid = ["--scale", "auto", "--scales", GRID]
    steps = {
        "uniform_soup": ["soup", INGREDIENT_FILES, "-o", "uniform.safetensors"],
        "greedy_soup": ["soup", INGREDIENT_FILES, "--greedy", "--val", held, "--plot", "greedy-soup.png",
                        "-o", "greedy.safetensors"],
        "wise_ft": ["interpolate", BASE.path, best, "--alphas", GRID, "--eval", f"id={held}",
                    "--eval", f"shift={shift}", "--plot", "wise-ft.png", "-o", "wise-ft.safetensors"],
        "addition": ["add", BASE.path, low_file, high_file, *grid, "--val", low, "--val", high,
                     "--plot", "added.png", "-o", "added.safetensors"],
        "negation": ["negate", BASE.path, low_file, *grid, "--target", low, "--control", high,
                     "--plot", "forgot.png", "-o", "forgot.safetensors"],
        "patching": ["patch", BASE.path, blurred_file, "--patch", blurred, "--supported", held, "--alphas", GRID,
                     "--plot", "patched.png", "-o", "patched.safetensors"],
    }  # fmt: skip
    return {name: [*words, *SHARED] for name, words in steps.items()}


def script(best: str, pace: float) -> str:
    """Return a shell script that repeats every step on the demo's files; what it writes goes to again/."""
    sections = {
        "The base, from scratch, on digits at every angle": [BASE.words(pace)],
        "Six finetunings of it on upright digits, three on tasks": [t.words(pace) for t in TRAININGS[1:]],
        "Each of them on test digits, and turned by 25 degrees": [
            ["evaluate", BASE.path, INGREDIENT_FILES, "--data", SPLITS[name], *SHARED]
            for name in ("test", "shift")
        ],
        "Soups, WiSE-FT, task arithmetic (add two tasks, forget one), PAINT": list(merges(best).values()),
        "What was written, and whether it is what it says": [
            ["inspect", "greedy.safetensors"],
            ["verify", "greedy.safetensors", "--parents", "ft"],
            ["compare", "uniform.safetensors", "greedy.safetensors", "--base", BASE.path],
        ],
    }
    lines = [
        "#!/usr/bin/env bash",
        "# Every step of the demo as a command. Results go to again/, beside what the demo made.",
        "set -euo pipefail",
        "export OMP_NUM_THREADS=1  # as the demo: one thread, the same bytes",
        'cd "$(dirname "$0")"',
        "rm -rf again && mkdir -p again/ft again/tasks",
    ]
    for title, steps in sections.items():
        lines += ["", f"# {title}", *(" ".join(("clipmerge", *_elsewhere(words))) for words in steps)]
    return "\n".join(lines) + "\n"


def _elsewhere(words: list[str]) -> Iterator[str]:
    """Quote the words of a command that writes to again/; globs stay globs."""
    for before, word in zip(["", *words], words, strict=False):
        if before in ("-o", "--plot"):
            word = f"again/{word}"
        yield word if word == INGREDIENT_FILES else shlex.quote(word)
