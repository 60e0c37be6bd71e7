"""The demo's work: images, trainings and merges by clipmerge's own commands, and what each model scores."""

import io
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, chdir, redirect_stdout
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from clipmerge.errors import TrainingError
from clipmerge_cli import demo_steps as steps
from clipmerge_cli.demo_steps import Training

RESULTS = "results.json"
TASK_ROLES = ("task", "added", "negated", "patched")

Watched = Callable[[str], AbstractContextManager[Any]]
"""Name of a step → a context that shows that it runs."""
Scores = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """A model of a table: its role in the figure, its file, its score on each split of that table."""

    name: str
    role: str
    file: str | None
    scores: Scores


@dataclass
class Study:
    """Everything in one folder.

    Attributes:
        pace: a factor on the number of training steps; below 1 only in tests.
        rows: what has been scored so far.
        documents: what each search printed as JSON.
    """

    folder: Path
    watched: Watched
    pace: float = 1.0
    rows: list[Row] = field(default_factory=list)
    documents: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Do all steps in order; trainings whose files are there are not repeated."""
        self.prepare()
        for training in steps.TRAININGS:
            if not (self.folder / training.path).exists():
                self.train(training)
        self.compare()
        with self.watched("figures"):
            self.report()

    def prepare(self) -> None:
        """Write the model's configuration, and three sets of images made from the digits."""
        from clipmerge.report.documents import write_json

        for name in ("data", "ft", "tasks"):
            (self.folder / name).mkdir(exist_ok=True, parents=True)
        write_json(steps.MODEL, self.folder / steps.MODEL_FILE)
        with self.watched("images"):
            write_images(self.folder / "data")

    def train(self, training: Training) -> None:
        """Finetune the base, or train it from scratch; go on from a saved state where there is one."""
        state = self.folder / f"{training.name}.state"
        with self.watched(training.path):
            try:
                self.command(*training.words(self.pace), *(["--resume"] if state.exists() else []))
            except TrainingError as error:
                hint = "the same command goes on from there" if state.exists() else error.hint
                raise TrainingError(error.message, hint=hint) from error

    def compare(self) -> None:
        """Merge in every way that `merges` lists, and score every model on the splits of its table."""
        with self.watched("scores of single models"):
            self.score([("base", "base", steps.BASE.path)], *steps.COMPARED, *steps.TASKWISE)
            self.score([(t.title, "ingredient", t.path) for t in steps.INGREDIENTS], *steps.COMPARED)
        best = self.best
        self.rows.append(Row(f"best single ({best.name.partition(':')[0]})", "best", best.file, best.scores))
        for key, words in steps.merges(str(best.file)).items():
            with self.watched(key.replace("_", " ").replace("wise ft", "WiSE-FT")):
                self.documents[key] = self.command(*words, "--force", "--fresh")
        with self.watched("scores of merged models"):
            greedy, alpha = self.documents["greedy_soup"], self.documents["wise_ft"]["coefficient"]
            name = f"greedy soup ({len(greedy['ingredients'])} of {len(greedy['candidates'])})"
            soups = [
                ("uniform soup", "uniform", "uniform.safetensors"),
                (name, "greedy", "greedy.safetensors"),
            ]
            self.score(soups, *steps.COMPARED)
            self.rows.append(Row("logit ensemble (all)", "ensemble", None, self.ensemble()))
            self.score([(f"WiSE-FT, α = {alpha:g}", "wise-ft", "wise-ft.safetensors")], *steps.COMPARED)
            added, forgot = (self.documents[key]["coefficient"] for key in ("addition", "negation"))
            patched = self.documents["patching"]["alpha"]
            tasks = [(f"{task.name.removeprefix('tasks/')} alone", "task", task.path) for task in steps.TASKS]
            tasks += [
                (f"low + high, scale {added:g}", "added", "added.safetensors"),
                (f"low forgotten, scale {forgot:g}", "negated", "forgot.safetensors"),
                (f"patched, α = {patched:g}", "patched", "patched.safetensors"),
            ]
            self.score(tasks, *steps.TASKWISE)
            self.documents["curve"] = self.curve(str(best.file))

    def report(self) -> None:
        """Write commands.sh, the comparison as a figure, and at last results.json: the demo is finished."""
        from clipmerge.report import figures
        from clipmerge.report.documents import write_json

        best, curve = str(self.best.file), self.documents["curve"]
        (self.folder / "commands.sh").write_text(steps.script(best, self.pace), encoding="utf-8")
        rows = [{"role": r.role, "scores": {s: r.scores[s]["value"] for s in r.scores}} for r in self.rows]
        axes = {"x": "test", "y": "shift", "labels": {"test": "test digits", "shift": "turned by 25°"}}
        figure = {"kind": "comparison", "rows": rows, "curve": curve, **axes}
        figures.plot(figure, self.folder / "comparison.png")
        models = [asdict(row) for row in self.rows]
        write_json(
            {"model": steps.MODEL, "splits": steps.SPLITS, "models": models, **self.documents},
            self.folder / RESULTS,
        )

    # -- what they share ---------------------------------------------------------------------------------

    @property
    def best(self) -> Row:
        """The ingredient with the best held-out score, the first of them on a tie."""
        singles = [row for row in self.rows if row.role == "ingredient"]
        return max(singles, key=lambda row: row.scores["held-out"]["value"])

    def command(self, *words: str) -> Any:
        """Run a command in this folder and this process; return the JSON document that it prints."""
        from clipmerge_cli.app import application

        printed = io.StringIO()
        with chdir(self.folder), redirect_stdout(printed):
            globbed = [sorted(map(str, Path().glob(word))) if "*" in word else [word] for word in words]
            code = application(words[0])(args=[*chain(*globbed), "--json"], standalone_mode=False)
        if code == 130:
            raise KeyboardInterrupt
        document = json.loads(printed.getvalue())
        document.pop("output", None)
        document.pop("figures", None)
        return document

    def score(self, models: Sequence[tuple[str, str, str]], *splits: str) -> None:
        """Score (name, role, file) on the named splits, a row each."""
        data = {steps.SPLITS[split]: split for split in splits}
        options = [word for source in data for word in ("--data", source)]
        document = self.command("evaluate", *(file for _, _, file in models), *options, *steps.SHARED)
        for (name, role, file), model in zip(models, document["checkpoints"], strict=True):
            scores = {data[source]: score for source, score in model["scores"].items()}
            self.rows.append(Row(name, role, file, scores))

    def curve(self, best: str) -> list[dict[str, Any]]:
        """Return test scores along the line from the base to the best single, for the figure alone."""
        words = steps.merges(best)["wise_ft"]
        tests = ["--eval", f"test={steps.SPLITS['test']}", "--eval", f"shift={steps.SPLITS['shift']}"]
        points = self.command(*words[: words.index("--eval")], *tests, *steps.SHARED, "--fresh")["points"]
        return [
            {
                "alpha": point["coefficient"],
                "scores": {split: s["value"] for split, s in point["scores"].items()},
            }
            for point in points
        ]

    def ensemble(self) -> Scores:
        """Score the mean of all ingredients' logits, on the splits that the soups are compared on."""
        import torch

        from clipmerge.data.open import open_split
        from clipmerge.evaluate.evaluator import Evaluator
        from clipmerge.evaluate.metrics import interval
        from clipmerge.weights.weights import load_all

        splits = {name: open_split(steps.SPLITS[name], role="test") for name in steps.COMPARED}
        evaluator = Evaluator(self.folder / steps.MODEL_FILE, splits, templates=steps.TEMPLATE, device="cpu")
        ingredients = load_all([self.folder / training.path for training in steps.INGREDIENTS])
        scores = {}
        for split in steps.COMPARED:
            logits = torch.stack([evaluator.logits(weights, split) for weights in ingredients])
            right = logits.mean(0).argmax(1).numpy() == evaluator.labels(split)
            correct, n = int(right.sum()), len(right)
            bounds = list(interval(correct, n))
            scores[split] = {"value": correct / n, "correct": correct, "n": n, "interval": bounds}
        return scores


def write_images(folder: Path) -> None:
    """Write broad.npz (each training digit turned by its own angle), low.npz (0 to 4) and high.npz (5 to 9)."""
    import numpy as np
    from PIL import Image

    from clipmerge.data.open import open_split

    parts = [open_split(f"digits#{part}") for part in ("train", "val", "test")]
    digits = [part.image(i).convert("L") for part in parts for i in range(len(part))]
    labels = np.concatenate([part.labels for part in parts]).astype(np.int16)
    split = np.repeat(np.arange(3, dtype=np.uint8), [len(part) for part in parts])
    classes = np.array(parts[0].classes)
    angles = np.random.default_rng(0).uniform(-45, 45, len(parts[0]))
    turned = [
        digit.rotate(angle, Image.Resampling.BICUBIC) for digit, angle in zip(digits, angles, strict=False)
    ]
    train, pixels = split == 0, np.stack([np.asarray(digit) for digit in digits])
    np.savez(
        folder / "broad.npz",
        images=np.stack([np.asarray(image) for image in turned]),
        labels=labels[train],
        split=split[train],
        classes=classes,
    )
    for name, first in (("low", 0), ("high", 5)):
        rows, stop = (labels >= first) & (labels < first + 5), first + 5
        np.savez(
            folder / f"{name}.npz", images=pixels[rows], labels=labels[rows] - first, split=split[rows],
            classes=classes[first:stop],
        )  # fmt: skip
