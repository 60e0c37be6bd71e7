"""What the chapters share: the setting, clipmerge's commands run once each, and numbers over seeds.

Everything is done by commands that a person could type in the study's folder. A command whose result is there is not
run again, so a study that was stopped goes on where it was; one that was changed is run anew.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Any

import clipmerge as cm

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Number of seeds → 97.5 % point of Student's t with one degree of freedom less."""

Job = tuple[str, Sequence[Any]]
"""(name, words of a `clipmerge` command)."""


@dataclass(frozen=True)
class Study:
    """One run of the study.

    Attributes:
        folder: everything is written below it: `weights/`, `results/` (a JSON document and the command beside it),
            `chapters/`.
        setting: setting.toml, with `[quick]` merged in where that was asked for.
        data: where the sources of relative paths lie.
        base: the checkpoint that everything starts from, seen from `folder`.
        base_name: what the page calls it.
        workers: commands that run side by side.
        used: names of the commands behind the chapter that is being made.
    """

    folder: Path
    setting: Mapping[str, Any]
    data: Path
    base: str
    base_name: str
    workers: int
    used: list[str] = field(default_factory=list)

    @property
    def seeds(self) -> list[int]:
        return list(self.setting["seeds"])

    def source(self, name: str, part: str, limit: int | str | None = None) -> str:
        """Return the images of a set as commands take them, seen from the study's folder.

        Args:
            name: a set of the setting, with shifts where there are any: `cifar10@blur:2`.
            limit: at most so many images, or such a share; None takes the setting's for the part, 0 all.
        """
        known, _, shift = name.partition("@")
        entry = self.setting["sets"][known]
        most = self.setting["images"].get(part, 0) if limit is None else limit
        place = entry["source"].format(part=f"{part}[:{most}]" if most else part)
        path, sign, rest = place.partition("#")
        if (self.data / path).exists():
            path = (
                f"images/{path}"  # a link to where they lie, so that no command names a path of this machine
            )
        return f"{path}{sign}{rest}{'@' + shift if shift else ''}"

    def template(self, name: str) -> str:
        """Return the prompt of a set, with {} for a class."""
        template: str = self.setting["sets"][name.partition("@")[0]]["template"]
        return template

    def images(
        self, option: str, name: str, part: str, limit: int | str | None = None, alias: str = ""
    ) -> list[str]:
        """Return the options that give a set of images to a command under a name, with its prompts; as in `source`."""
        called = alias or column(name)
        prompts = ["--templates", f"{called}={self.template(name)}"]
        return [option, f"{called}={self.source(name, part, limit)}", *prompts]

    def run(self, jobs: Iterable[Job]) -> list[dict[str, Any]]:
        """Run commands, several side by side, and return what each prints as JSON; those that were run are not again.

        Raises:
            SystemExit: a command failed; it, and what it said, is printed.
        """
        jobs = list(jobs)
        self.used.extend(name for name, _ in jobs)
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda job: self._one(*job), jobs))

    def _one(self, name: str, words: Sequence[Any]) -> dict[str, Any]:
        texts = [str(word) for word in words]
        result, script = self.folder / "results" / f"{name}.json", self.folder / "results" / f"{name}.sh"
        line = shlex.join(["clipmerge", *texts]) + "\n"
        outputs = [self.folder / texts[i + 1] for i, word in enumerate(texts) if word == "-o"]
        known = script.is_file() and script.read_text(encoding="utf-8") == line
        if not (known and all(path.exists() for path in (result, *outputs))):
            started = perf_counter()
            again = ["--force"] if "-o" in texts and texts[0] != "sweep" else []
            command = [sys.executable, "-m", "clipmerge", *texts, *again, "--json", "--quiet"]
            for path in outputs:
                path.parent.mkdir(parents=True, exist_ok=True)
            # Commands of one thread each, side by side, are faster than one command on all cores.
            environment = {"OMP_NUM_THREADS": "1", **os.environ}
            done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{line}\nin {self.folder}:\n{done.stderr}")
            result.parent.mkdir(parents=True, exist_ok=True)
            result.write_text(done.stdout, encoding="utf-8")
            script.write_text(line, encoding="utf-8")  # last: a result counts once its command is beside it
            print(f"  {perf_counter() - started:6.1f} s  {name}", flush=True)
        document: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return document

    def finetuned(
        self, name: str, train: Sequence[str], options: Mapping[str, Any], *, out: str = "", **more: Any
    ) -> Job:
        """Return the command of a finetuning into `out`, by default `weights/NAME.safetensors`."""
        settings = {"base": self.base, **options, **more}
        words: list[Any] = ["finetune", *train]
        for key, value in settings.items():
            words += [f"--{key.replace('_', '-')}", value]
        return name, [*words, "-o", out or weights(name)]

    def scores(
        self, name: str, checkpoints: Sequence[str], data: Sequence[str]
    ) -> dict[str, dict[str, float]]:
        """Evaluate checkpoints: file → images → accuracy in percent."""
        (document,) = self.run([(name, ["evaluate", *checkpoints, *data])])
        return {
            row["path"]: {split: 100 * score["value"] for split, score in row["scores"].items()}
            for row in document["checkpoints"]
        }

    def row(self, cells: Sequence[Any], files: Mapping[int, str]) -> dict[str, Any]:
        """Return a row with the notation and the parents' digests of the file of each seed behind it."""
        details = {}
        for seed, file in files.items():
            record = cm.load(self.folder / file).record
            parents = (f"{name}: {p['file']} {p['digest'][:16]}…" for name, p in record["parents"].items())
            details[f"seed {seed}"] = f"{record['notation']} ({'; '.join(parents)})"
        return {"cells": list(cells), "details": details}

    def write_chapter(self, order: int, name: str, *, settings: Mapping[str, Any], **parts: Any) -> None:
        """Write a chapter of the page, with every command that was run for it since the chapter before.

        Args:
            settings: those of the chapter, besides the base and the number of seeds.
        """
        parts["settings"] = {"base": self.base_name, **settings, "seeds": len(self.seeds)}
        scripts = [self.folder / "results" / f"{used}.sh" for used in dict.fromkeys(self.used)]
        self.used.clear()
        commands = [script.read_text(encoding="utf-8").strip() for script in scripts]
        chapter = {"format": "clipmerge-chapter", "version": 1, "order": order, **parts, "commands": commands}
        (self.folder / "chapters").mkdir(exist_ok=True)
        text = json.dumps(chapter, indent=1, ensure_ascii=False) + "\n"
        (self.folder / "chapters" / f"{order}-{name}.json").write_text(text, encoding="utf-8")


def load_setting(path: Path, *, quick: bool) -> dict[str, Any]:
    """Read a setting; `[quick]` overrides what it names."""
    setting = tomllib.loads(path.read_text(encoding="utf-8"))
    smaller = setting.pop("quick", {})
    return merged(setting, smaller) if quick else setting


def merged(setting: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the setting with changes, table by table."""
    both = {key: setting[key] for key in setting if key not in changes}
    for key, value in changes.items():
        inside = setting.get(key)
        both[key] = (
            merged(inside, value) if isinstance(inside, Mapping) and isinstance(value, Mapping) else value
        )
    return both


def column(name: str) -> str:
    """Return what commands call a set with shifts: `cifar10@blur:2` is cifar10_blur_2."""
    return re.sub(r"\W", "_", name)


def weights(name: str) -> str:
    """Return the file of a checkpoint, seen from the study's folder."""
    return f"weights/{name}.safetensors"


def interval(values: Sequence[float]) -> str:
    """Return the mean of a number over seeds and, in brackets, half of its 95 % interval by Student's t."""
    if len(values) < 2:
        return f"{mean(values):.1f}"
    return f"{mean(values):.1f} ± {half_width(values):.1f}"


def half_width(values: Sequence[float]) -> float:
    """Return half of the 95 % interval of a mean over seeds."""
    return STUDENT[len(values)] * stdev(values) / len(values) ** 0.5


def claim(text: str, left: Sequence[float], right: Sequence[float]) -> list[str]:
    """Return a row: what was published (left above right), both sides here, their difference by seed, and a verdict."""
    differences = [a - b for a, b in zip(left, right, strict=True)]
    centre = mean(differences)
    if len(differences) < 2:
        verdict = "one seed: no verdict"
    elif centre > half_width(differences):
        verdict = "appeared"
    elif -centre > half_width(differences):
        verdict = "the opposite appeared"
    else:
        verdict = "not told apart"
    return [text, interval(left), interval(right), interval(differences), verdict]


CLAIMS = ("published", "here, left side", "right side", "difference", "verdict")
SEEDS_NOTE = (
    "± is half of the 95 % interval over {n} seeds (Student's t); a difference is taken seed by seed, and a verdict "
    "needs its interval to leave out 0. The test images are the same for all seeds."
)


def claims_table(rows: Sequence[Sequence[str]], seeds: Sequence[int]) -> dict[str, Any]:
    """Return the table of a chapter's published claims."""
    return {
        "caption": "What was published, and whether it appeared here",
        "columns": list(CLAIMS),
        "rows": [list(row) for row in rows],
        "note": SEEDS_NOTE.format(n=len(seeds)),
    }
