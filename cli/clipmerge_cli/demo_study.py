"""The demo's work, step by step: images, trainings, merges, and what each of them scores."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipmerge.errors import TrainingError
from clipmerge.report.documents import write_json
from clipmerge_cli.demo_setting import (
    ALPHAS,
    BASE,
    COMPARED,
    INGREDIENTS,
    MODEL,
    MODEL_FILE,
    SCALES,
    SPLITS,
    TASKWISE,
    TEMPLATE,
    TRAININGS,
    Training,
)
from clipmerge_cli.options import numbers

if TYPE_CHECKING:
    from clipmerge.evaluate.evaluator import Evaluator
    from clipmerge.types import Progress
    from clipmerge.weights.weights import Weights

Watched = Callable[[str], AbstractContextManager["Progress | None"]]
"""Name of a step → a context that yields `on_progress` for it."""


TASK_ROLES = ("task", "added", "negated", "patched")


@dataclass(frozen=True)
class Row:
    """A model of a table: its role in the figure, its file, its score on each split of that table."""

    name: str
    role: str
    file: str | None
    scores: Mapping[str, Mapping[str, Any]]


@dataclass
class Study:
    """Everything in one folder.

    Attributes:
        pace: a factor on the number of training steps; below 1 only in tests.
        rows: what has been scored so far.
        documents: the JSON of each search.
    """

    folder: Path
    watched: Watched
    pace: float = 1.0
    rows: list[Row] = field(default_factory=list)
    documents: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """All steps in order; trainings whose files are there are not repeated."""
        self.prepare()
        for training in TRAININGS:
            if not (self.folder / training.path).exists():
                self.train(training)
        self.soups()
        self.robust()
        self.tasks()

    # -- the steps ---------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """The model's configuration, and three sets of images made from the digits."""
        for name in ("data", "ft", "tasks", "again"):
            (self.folder / name).mkdir(exist_ok=True, parents=True)
        write_json(MODEL, self.folder / MODEL_FILE)
        with self.watched("images"):
            write_images(self.folder / "data")

    def train(self, training: Training) -> None:
        """One finetuning, or the base from scratch."""
        from clipmerge.finetuning.finetune import finetune

        base = self.base if training.base else None
        state = self.folder / f"{training.name}.state"
        with self.watched(training.path) as on_progress:
            try:
                finetune(
                    base,
                    self.split(training.train, role="train"),
                    out=self.folder / training.path,
                    model=None if training.base else self.folder / MODEL_FILE,
                    resume=state.exists(),
                    on_progress=on_progress,
                    **training.options(self.pace),
                )
            except TrainingError as error:
                hint = "the same command goes on from there" if state.exists() else error.hint
                raise TrainingError(error.message, hint=hint) from error

    def soups(self) -> None:
        """Each ingredient, the best of them, uniform and greedy soups, and the logit ensemble as a yardstick."""
        from clipmerge.search.soup import greedy_soup, uniform_soup

        with self.watched("soups") as on_progress:
            self.add_row("base", "base", self.base, BASE.path)
            for weights, training in zip(self.ingredients, INGREDIENTS, strict=True):
                self.add_row(training.title, "ingredient", weights, training.path)
            best = self.best
            self.rows.append(
                Row(f"best single ({best.name.partition(':')[0]})", "best", best.file, best.scores)
            )
            uniform = uniform_soup(self.ingredients)
            greedy = greedy_soup(self.ingredients, self.evaluator, split="held-out", on_progress=on_progress)
            self.keep("uniform soup", "uniform", uniform.weights, "uniform.safetensors")
            name = f"greedy soup ({len(greedy.ingredients)} of {len(greedy.names)})"
            self.keep(name, "greedy", greedy.weights, "greedy.safetensors")
            self.documents |= {"uniform_soup": uniform.to_json(), "greedy_soup": greedy.to_json()}
            self.rows.append(Row("logit ensemble (all)", "ensemble", None, self.ensemble()))

    def robust(self) -> None:
        """WiSE-FT: from the base to the best single, α by the held-out images and their shift."""
        from clipmerge.search.rules import best_mean
        from clipmerge.search.sweep import sweep
        from clipmerge.weights.weights import interpolate

        best = self.load(str(self.best.file))
        alphas = numbers(ALPHAS, "alphas")
        rule = best_mean("held-out", ["held-out shift"])
        with self.watched("WiSE-FT") as on_progress:
            found = sweep(
                lambda alpha: interpolate(self.base, best, alpha),
                alphas, self.evaluator, rule=rule, splits=rule.splits, on_progress=on_progress,
            )  # fmt: skip
            self.keep(f"WiSE-FT, α = {found.coefficient:g}", "wise-ft", found.weights, "wise-ft.safetensors")
            self.documents["wise_ft"] = found.to_json()
            self.documents["curve"] = [
                {"alpha": alpha, "scores": self.score(interpolate(self.base, best, alpha), "test", "shift")}
                for alpha in alphas
            ]

    def tasks(self) -> None:
        """Task arithmetic on low and high digits, and PAINT on blurred ones."""
        from clipmerge.search.patch import patch
        from clipmerge.search.rules import keep_control, normalised_mean
        from clipmerge.search.sweep import reference_scores, sweep

        low, high, blurred = (self.load(f"tasks/{name}.safetensors") for name in ("low", "high", "blurred"))
        base, judge, scales = self.base, self.evaluator, numbers(SCALES, "scales")
        with self.watched("task arithmetic and patching") as on_progress:
            own = reference_scores({"held-out low": low, "held-out high": high}, judge)
            add = sweep(
                lambda scale: base + scale * ((low - base) + (high - base)), scales, judge,
                rule=(rule := normalised_mean(own)), splits=rule.splits, name="add", on_progress=on_progress,
            )  # fmt: skip
            forget = sweep(
                lambda scale: base - scale * (low - base), scales, judge,
                rule=(rule := keep_control(0.95, "held-out low", "held-out high")), splits=rule.splits,
                name="negate", on_progress=on_progress,
            )  # fmt: skip
            patched = patch(
                base, blurred, judge, patching="held-out blurred", supported="held-out",
                grid=numbers(ALPHAS, "alphas"), on_progress=on_progress,
            )  # fmt: skip
            for name, weights in (("low", low), ("high", high), ("blurred", blurred)):
                self.add_row(f"{name} alone", "task", weights, f"tasks/{name}.safetensors")
            self.keep(f"low + high, scale {add.coefficient:g}", "added", add.weights, "added.safetensors")
            self.keep(
                f"low forgotten, scale {forget.coefficient:g}",
                "negated",
                forget.weights,
                "forgot.safetensors",
            )
            self.keep(
                f"patched, α = {patched.coefficient:g}", "patched", patched.weights, "patched.safetensors"
            )
        self.documents |= {
            "addition": add.to_json(), "negation": forget.to_json(), "patching": patched.to_json(),
        }  # fmt: skip

    # -- what they share ---------------------------------------------------------------------------------

    @cached_property
    def base(self) -> "Weights":
        return self.load(BASE.path)

    @cached_property
    def ingredients(self) -> "list[Weights]":
        from clipmerge.weights.weights import load_all

        return load_all([self.folder / training.path for training in INGREDIENTS])

    @cached_property
    def evaluator(self) -> "Evaluator":
        from clipmerge.evaluate.evaluator import Evaluator

        splits = {name: self.split(data) for name, data in SPLITS.items()}
        return Evaluator(self.folder / MODEL_FILE, splits, templates=TEMPLATE)

    @property
    def best(self) -> Row:
        """The ingredient with the best held-out score, the first of them on a tie."""
        alone = [row for row in self.rows if row.role == "ingredient"]
        return max(alone, key=lambda row: row.scores["held-out"]["value"])

    def load(self, path: str) -> "Weights":
        from clipmerge.weights.weights import load

        return load(self.folder / path)

    def split(self, data: str, role: str = "test") -> Any:
        from clipmerge.data.open import open_split

        return open_split(str(self.folder / data) if data.startswith("data/") else data, role=role)

    def score(self, weights: "Weights", *splits: str) -> dict[str, float]:
        return {split: self.evaluator.score(weights, split).value for split in splits}

    def add_row(self, name: str, role: str, weights: "Weights", file: str) -> None:
        compared = () if role in TASK_ROLES else COMPARED
        taskwise = TASKWISE if role in ("base", *TASK_ROLES) else ()
        scores = {split: self.evaluator.score(weights, split).to_json() for split in (*compared, *taskwise)}
        self.rows.append(Row(name, role, file, scores))

    def keep(self, name: str, role: str, weights: "Weights", file: str) -> None:
        """Write a merged model, and score the file that was written."""
        weights.save(self.folder / file, force=True)
        self.add_row(name, role, self.load(file), file)

    def ensemble(self) -> dict[str, dict[str, Any]]:
        """Scores of the mean of all ingredients' logits, on the splits that the soups are compared on."""
        import torch

        from clipmerge.evaluate.metrics import interval

        found = {}
        for split in COMPARED:
            logits = torch.stack([self.evaluator.logits(weights, split) for weights in self.ingredients])
            right = logits.mean(0).argmax(1).numpy() == self.evaluator.labels(split)
            correct, n = int(right.sum()), len(right)
            found[split] = {
                "value": correct / n, "correct": correct, "n": n, "interval": list(interval(correct, n)),
            }  # fmt: skip
        return found


def write_images(folder: Path) -> None:
    """broad.npz (each training digit turned by its own angle), low.npz (0 to 4) and high.npz (5 to 9)."""
    import numpy as np

    from clipmerge.data.open import open_split

    parts = [open_split(f"digits#{part}") for part in ("train", "val", "test")]
    train = parts[0]
    angles = np.random.default_rng(0).uniform(-45, 45, len(train))
    turned = np.stack(list(_pixels(train, angles)))
    write_npz(folder / "broad.npz", turned, train.labels, np.zeros(len(train), np.uint8), train.classes)
    pixels = np.concatenate([np.stack(list(_pixels(part, np.zeros(len(part))))) for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    split = np.repeat(np.arange(3, dtype=np.uint8), [len(part) for part in parts])
    for name, first in (("low", 0), ("high", 5)):
        mine = (labels >= first) & (labels < first + 5)
        classes = train.classes[first : first + 5]
        write_npz(folder / f"{name}.npz", pixels[mine], labels[mine] - first, split[mine], classes)


def _pixels(split: Any, angles: Any) -> Iterator[Any]:
    import numpy as np
    from PIL import Image

    for i, angle in enumerate(angles):
        yield np.asarray(split.image(i).convert("L").rotate(float(angle), Image.Resampling.BICUBIC))


def write_npz(path: Path, images: Any, labels: Any, split: Any, classes: Sequence[str]) -> None:
    """An .npz as `DATA` reads it."""
    import numpy as np

    np.savez(path, images=images, labels=labels.astype(np.int16), split=split, classes=np.array(classes))
