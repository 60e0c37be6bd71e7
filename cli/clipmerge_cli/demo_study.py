"""The demo's work: images, trainings and merges by clipmerge's own commands, and what each model scores."""

import io
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

from clipmerge.errors import TrainingError
from clipmerge.report.documents import write_json
from clipmerge_cli import demo_steps as steps
from clipmerge_cli.options import Talk

RESULTS = "results.json"
TASK_ROLES = ("task", "added", "negated", "patched")

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
    """The demo in one folder: rows scored so far, and what each search printed as JSON.

    Attributes:
        pace: a factor on the number of training steps; below 1 only in tests.
    """

    folder: Path
    talk: Talk
    pace: float = 1.0
    rows: list[Row] = field(default_factory=list)
    documents: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Do all steps in order; trainings whose files are there are not repeated."""
        for name in ("data", "ft", "tasks"):
            (self.folder / name).mkdir(exist_ok=True, parents=True)
        write_json(steps.MODEL, self.folder / steps.MODEL_FILE)
        with self.step("images"):
            write_images(self.folder / "data")
        for file, words in steps.commands("finetune", pace=self.pace).items():
            if not (self.folder / file).exists():
                self.train(file, words)
        self.compare()
        with self.step("figures"):
            self.report()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Show that a step runs, and how long it took."""
        start = perf_counter()
        with self.talk.progress(name):
            yield
        self.talk.say(f"  {name:<32} {perf_counter() - start:5.1f} s")

    def train(self, file: str, words: Sequence[str]) -> None:
        """Train one model; go on from a saved state where there is one."""
        state = (self.folder / file).with_suffix(".state")
        with self.step(file):
            try:
                self.command(*words, *(["--resume"] if state.exists() else []))
            except TrainingError as error:
                hint = "the same command goes on from there" if state.exists() else error.hint
                raise TrainingError(error.message, hint=hint) from error

    def compare(self) -> None:
        """Merge in every way, and score every model on the splits of its table."""
        with self.step("scores of single models"):
            self.score("base.safetensors", "base", "base", *steps.COMPARED, *steps.TASKWISE)
            for file, words in steps.commands("finetune").items():
                lr, augment = (words[words.index(option) + 1] for option in ("--lr", "--augment"))
                name = f"{Path(file).stem}: lr {lr}" + ("" if augment == "none" else f", {augment}")
                if file.startswith("ft/"):
                    self.score(file, name, "ingredient", *steps.COMPARED)
        best = self.best
        self.rows.append(Row(f"best single ({best.name.partition(':')[0]})", "best", best.file, best.scores))
        for command in ("soup", "interpolate", "add", "negate", "patch"):
            for file, words in steps.commands(command, best=str(best.file)).items():
                self.merge(file, words)
        self.documents["curve"] = self.curve(str(best.file))

    def merge(self, file: str, words: Sequence[str]) -> None:
        """Merge by one command, and score the file that was written."""
        key, role, name = steps.MERGED[Path(file).stem]
        with self.step(key.replace("_", " ").replace("wise ft", "WiSE-FT")):
            fresh = [] if role == "uniform" else ["--fresh"]
            document = self.documents[key] = self.command(*words, "--force", *fresh)
            numbers = [document.get("coefficient", document.get("alpha"))]
            if role == "greedy":
                numbers = [len(document["ingredients"]), len(document["candidates"])]
            if role == "added":
                for task in ("low", "high", "blurred"):
                    self.score(f"tasks/{task}.safetensors", f"{task} alone", "task", *steps.TASKWISE)
            splits = steps.TASKWISE if role in TASK_ROLES else steps.COMPARED
            self.score(file, name.format(*numbers), role, *splits)
            if role == "greedy":
                self.rows.append(Row("logit ensemble (all)", "ensemble", None, self.ensemble()))

    def report(self) -> None:
        """Write commands.sh, the comparison as a figure, and at last results.json: the demo is finished."""
        from clipmerge.report import figures

        best, curve = str(self.best.file), self.documents["curve"]
        (self.folder / "commands.sh").write_text(steps.script(best, self.pace), encoding="utf-8")
        rows = [{"role": r.role, "scores": {s: r.scores[s]["value"] for s in r.scores}} for r in self.rows]
        axes = {"x": "test", "y": "shift", "labels": {"test": "test digits", "shift": "turned by 25°"}}
        figure = {"kind": "comparison", "rows": rows, "curve": curve, **axes}
        figures.plot(figure, self.folder / "comparison.png")
        facts = {"model": steps.MODEL, "splits": steps.SPLITS, "models": [asdict(row) for row in self.rows]}
        write_json(facts | self.documents, self.folder / RESULTS)

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

    def score(self, file: str, name: str, role: str, *splits: str) -> None:
        """Add a row with a model's scores on the named splits."""
        options = [word for split in dict.fromkeys(splits) for word in ("--data", steps.SPLITS[split])]
        document = self.command("evaluate", file, *options, *shlex.split(steps.SCORING))
        scores = document["checkpoints"][0]["scores"]
        self.rows.append(Row(name, role, file, {split: scores[steps.SPLITS[split]] for split in splits}))

    def curve(self, best: str) -> list[dict[str, Any]]:
        """Return test scores along the line from the base to the best single, for the figure alone."""
        (words,) = steps.commands("interpolate", best=best).values()
        shown = [word.replace("#val", "#test") for word in words[: words.index("--plot")]]
        points = self.command(*shown, "--fresh")["points"]
        splits = {"test": "id", "shift": "shift"}
        scores = [{name: p["scores"][split]["value"] for name, split in splits.items()} for p in points]
        return [{"alpha": p["coefficient"], "scores": s} for p, s in zip(points, scores, strict=True)]

    def ensemble(self) -> Scores:
        """Score the mean of all ingredients' logits, on the splits that the soups are compared on."""
        from clipmerge.data.open import open_split
        from clipmerge.evaluate.evaluator import Evaluator
        from clipmerge.search.ensemble import score_ensemble

        splits = {name: open_split(steps.SPLITS[name], role="test") for name in steps.COMPARED}
        evaluator = Evaluator(self.folder / steps.MODEL_FILE, splits, templates=steps.TEMPLATE, device="cpu")
        ingredients = sorted(self.folder.glob("ft/*.safetensors"))
        return {split: score_ensemble(ingredients, evaluator, split).to_json() for split in splits}


def write_images(folder: Path) -> None:
    """Write broad.npz (each training digit turned by its own angle), low.npz (0 to 4) and high.npz (5 to 9)."""
    import numpy as np
    from PIL import Image

    from clipmerge.data.open import open_split

    parts = [open_split(f"digits#{part}") for part in ("train", "val", "test")]
    digits = [part.image(i).convert("L") for part in parts for i in range(len(part))]
    labels = np.concatenate([part.labels for part in parts]).astype(np.int16)
    split = np.repeat(np.arange(3, dtype=np.uint8), [len(part) for part in parts])
    angles = np.random.default_rng(0).uniform(-45, 45, len(parts[0]))
    turned = [digits[i].rotate(angle, Image.Resampling.BICUBIC) for i, angle in enumerate(angles)]
    for name, rows in {"broad": split == 0, "low": labels < 5, "high": labels >= 5}.items():
        images, first = turned if name == "broad" else digits, labels[rows].min()
        np.savez(
            folder / f"{name}.npz",
            images=np.stack([np.asarray(images[i]) for i in np.flatnonzero(rows)]),
            labels=labels[rows] - first,
            split=split[rows],
            classes=np.array(parts[0].classes)[first : labels[rows].max() + 1],
        )
