"""The demo's work: images, trainings and merges by clipmerge's own commands, and what each model scores."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from clipmerge.errors import TrainingError
from clipmerge.report.documents import write_json
from clipmerge_cli import demo_steps as steps
from clipmerge_cli.options import Talk

if TYPE_CHECKING:
    import clipmerge
    from clipmerge.evaluate.score import Score

RESULTS = "results.json"
TASK_ROLES = ("task", "added", "negated", "patched")


@dataclass(frozen=True)
class Row:
    """A model of a table: its role in the figure, its file, its score on each split of that table."""

    name: str
    role: str
    file: str | None
    scores: "Mapping[str, Score]"

    def to_json(self, best: "Row") -> dict[str, Any]:
        """Return the scores, the mean over shifts with its interval, and the differences to the best single."""
        document: dict[str, Any] = {"name": self.name, "role": self.role, "file": self.file}
        document["scores"] = {split: score.to_json() for split, score in self.scores.items()}
        if self.role not in TASK_ROLES:
            document["shifts"] = mean_of_shifts(self)
            document["against_best"] = {
                "test": compare([self.scores["test"]], [best.scores["test"]]),
                "shifts": compare(*([row.scores[name] for name in steps.SHIFTS] for row in (self, best))),
            }
        return document


def mean_of_shifts(row: Row) -> dict[str, Any]:
    """Return the mean score over shifts; its 95 % interval counts images, each of which is in every shift."""
    import numpy as np

    each = np.mean([row.scores[name].correct_mask for name in steps.SHIFTS], axis=0)
    reach = 1.96 * each.std(ddof=1) / len(each) ** 0.5
    return {"value": float(each.mean()), "interval": [float(each.mean() - reach), float(each.mean() + reach)]}


def compare(ours: "Sequence[Score]", theirs: "Sequence[Score]") -> dict[str, float]:
    """Return the difference of two models' mean scores on the same images, and how surprising it is.

    p is a sign test's over images: of those that one model has right under more shifts than the other, would as many
    speak for one of them, were both equally good? With one split this is McNemar's exact test.
    """
    import numpy as np

    from clipmerge.evaluate.metrics import mcnemar

    mine, yours = (np.sum([score.correct_mask for score in scores], axis=0) for scores in (ours, theirs))
    difference = float((mine - yours).mean() / len(ours))
    return {"difference": difference, "p": mcnemar(mine > yours, yours > mine)}


@dataclass
class Study:
    """The demo in one folder: rows scored so far, and what each search printed as JSON.

    Attributes:
        pace: a factor on the number of training steps; below 1 only in tests, and with a quarter of the test digits.
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
            write_images(self.folder / "data", tests=800 if self.pace >= 1 else 200)
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
                augment = augment.partition(":")[0]
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
                from clipmerge.search.ensemble import score_ensemble

                files = sorted(self.folder.glob("ft/*.safetensors"))
                scores = {split: score_ensemble(files, self.evaluator, split) for split in steps.COMPARED}
                self.rows.append(Row("logit ensemble (all)", "ensemble", None, scores))

    def report(self) -> None:
        """Write commands.sh, the comparison as a figure, and at last results.json: the demo is finished."""
        from clipmerge.figures import draw

        best = self.best
        (self.folder / "commands.sh").write_text(steps.script(str(best.file), self.pace), encoding="utf-8")
        models = [row.to_json(best) for row in self.rows]
        facts = {"model": steps.MODEL, "splits": steps.SPLITS, "models": models, **self.documents}
        facts["comparison"] = comparison(facts)
        draw.plot(facts["comparison"], self.folder / "comparison.png")
        write_json(facts, self.folder / RESULTS)

    # -- what they share ---------------------------------------------------------------------------------

    @property
    def best(self) -> Row:
        """The ingredient with the best held-out score, the first of them on a tie."""
        singles = [row for row in self.rows if row.role == "ingredient"]
        return max(singles, key=lambda row: row.scores["held-out"].value)

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

    @cached_property
    def evaluator(self) -> "clipmerge.Evaluator":
        """What scores every model on every split."""
        import clipmerge

        with chdir(self.folder):
            splits = {name: clipmerge.open_split(data) for name, data in steps.SPLITS.items()}
        model = self.folder / steps.MODEL_FILE
        return clipmerge.Evaluator(splits, model, templates=steps.TEMPLATE, device="cpu")

    def score(self, file: str, name: str, role: str, *splits: str) -> None:
        """Add a row with a model's scores on the named splits."""
        scores = self.evaluator.scores(self.folder / file, list(dict.fromkeys(splits)))
        self.rows.append(Row(name, role, file, scores))

    def curve(self, best: str) -> list[dict[str, Any]]:
        """Return test scores along the line from the base to the best single, for the figure alone."""
        import clipmerge

        start, end = clipmerge.load_all([str(self.folder / "base.safetensors"), str(self.folder / best)])
        points = []
        for tenths in range(11):
            weights = clipmerge.interpolate(start, end, tenths / 10)
            row = Row("", "curve", None, self.evaluator.scores(weights, ("test", *steps.SHIFTS)))
            means = {"test": row.scores["test"].value, "shifts": mean_of_shifts(row)["value"]}
            points.append({"alpha": tenths / 10, "scores": means})
        return points


def comparison(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the figure of the comparison draws, out of the results."""
    rows = []
    for model in results["models"]:
        if "shifts" in model:
            both = {"test": model["scores"]["test"], "shifts": model["shifts"]}
            scores = {name: score["value"] for name, score in both.items()}
            intervals = {name: score["interval"] for name, score in both.items()}
            rows.append(
                {"name": model["name"], "role": model["role"], "scores": scores, "intervals": intervals}
            )
    n = results["models"][0]["scores"]["test"]["n"]
    labels = {"test": f"{n} test digits", "shifts": f"mean over {len(steps.SHIFTS)} changes of them"}
    return {
        "kind": "comparison",
        "rows": rows,
        "curve": results["curve"],
        "x": "test",
        "y": "shifts",
        "labels": labels,
    }


def write_images(folder: Path, tests: int = 800) -> None:
    """Write digits.npz (297 training, 400 held-out, `tests` test digits), low.npz (0 to 4) and high.npz (5 to 9).

    broad.npz has the base's 597 training digits, each turned by its own angle: those 297, and 300 that no finetuning
    sees.
    """
    import numpy as np
    from PIL import Image

    from clipmerge.data.open import open_split

    parts = [open_split(f"digits#{part}") for part in ("train", "val", "test")]
    digits = [part.image(i).convert("L") for part in parts for i in range(len(part))]
    labels = np.concatenate([part.labels for part in parts]).astype(np.int16)
    order = np.random.default_rng(1).permutation(len(digits))
    split = np.full(len(digits), 2, np.uint8)
    split[order[:597]], split[order[597:997]] = 0, 1
    angles = np.random.default_rng(0).uniform(-45, 45, len(digits))
    turned = [
        image.rotate(angle, Image.Resampling.BICUBIC) for image, angle in zip(digits, angles, strict=True)
    ]
    used = np.concatenate([order[:297], order[597 : 997 + tests]])
    low, high = used[labels[used] < 5], used[labels[used] >= 5]
    for name, rows in {"broad": order[:597], "digits": used, "low": low, "high": high}.items():
        images, first = turned if name == "broad" else digits, labels[rows].min()
        np.savez(
            folder / f"{name}.npz",
            images=np.stack([np.asarray(images[i]) for i in rows]),
            labels=labels[rows] - first,
            split=split[rows],
            classes=np.array(parts[0].classes)[first : labels[rows].max() + 1],
        )
