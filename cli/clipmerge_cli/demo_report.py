"""What the demo leaves behind: JSON, figures, and the commands that repeat every step."""

from pathlib import Path
from typing import TYPE_CHECKING

from clipmerge_cli.demo_setting import (
    ALPHAS,
    BASE,
    INGREDIENTS,
    MODEL,
    SCALES,
    SPLITS,
    TASKS,
    TEMPLATE,
    shell,
)

if TYPE_CHECKING:
    from clipmerge_cli.demo_study import Study


def write_report(study: "Study", results: Path) -> None:
    """commands.sh, the figures, and at last results.json, which marks the demo as finished."""
    from clipmerge.finetuning.log import read
    from clipmerge.report import figures
    from clipmerge.report.documents import write_json

    folder, documents = study.folder, study.documents
    (folder / "commands.sh").write_text(commands(study), encoding="utf-8")
    rows = [
        {"role": row.role, "scores": {s: row.scores[s]["value"] for s in row.scores}} for row in study.rows
    ]
    shown = {"x": "test", "y": "shift", "labels": {"test": "test digits", "shift": "turned by 25°"}}
    comparison = {"kind": "comparison", "rows": rows, "curve": documents["curve"], **shown}
    figures.plot(comparison, folder / "comparison.png")
    for name, key in (
        ("greedy-soup", "greedy_soup"), ("wise-ft", "wise_ft"), ("forgot", "negation"),
        ("added", "addition"), ("patched", "patching"),
    ):  # fmt: skip
        figures.plot(documents[key], folder / f"{name}.png")
    if (log := folder / "base.log.jsonl").exists():
        figures.training(read(log), folder / "base-training.png")
    models = [{"name": r.name, "role": r.role, "file": r.file, "scores": r.scores} for r in study.rows]
    write_json({"model": MODEL, "splits": SPLITS, "models": models, **documents}, results)


def commands(study: "Study") -> str:
    """A shell script that repeats every step on the demo's files; what it writes goes to again/."""
    lines = [
        "#!/usr/bin/env bash",
        "# Every step of the demo as a command. Results go to again/, beside what the demo made.",
        "set -euo pipefail",
        "export OMP_NUM_THREADS=1  # as the demo: one thread, the same bytes",
        'cd "$(dirname "$0")"',
        "rm -rf again && mkdir -p again/ft again/tasks",
    ]
    for title, steps in _sections(study):
        lines += ["", f"# {title}", *map(shell, steps)]
    return "\n".join(lines) + "\n"


def _sections(study: "Study") -> list[tuple[str, list[list[str]]]]:
    clipmerge, prompts, best = "clipmerge", ["--templates", TEMPLATE], str(study.best.file)
    held, shift, blurred = (SPLITS[f"held-out{name}"] for name in ("", " shift", " blurred"))
    low, high = SPLITS["held-out low"], SPLITS["held-out high"]
    base, globbed = BASE.path, "ft/*.safetensors"
    return [
        ("The base, from scratch, on digits at every angle", [BASE.command(study.pace, f"again/{BASE.path}")]),
        (
            "Six finetunings of it on upright digits, three on tasks",
            [t.command(study.pace, f"again/{t.path}") for t in (*INGREDIENTS, *TASKS)],
        ),
        (
            "Each of them on test digits, and turned by 25 degrees",
            [[clipmerge, "evaluate", base, globbed, "--data", SPLITS[name]] for name in ("test", "shift")],
        ),
        (
            "Soups",
            [
                [clipmerge, "soup", globbed, "-o", "again/uniform.safetensors"],
                [clipmerge, "soup", globbed, "--greedy", "--val", held, "-o", "again/greedy.safetensors"],
            ],
        ),
        (
            "WiSE-FT: from the base to the best single",
            [
                [clipmerge, "interpolate", base, best, "--alphas", ALPHAS, "--eval", f"id={held}",
                 "--eval", f"shift={shift}", "--plot", "again/wise-ft.png", "-o", "again/wise-ft.safetensors"],
            ],
        ),
        (
            "Task arithmetic: add two tasks, forget one",
            [
                [clipmerge, "add", base, "tasks/low.safetensors", "tasks/high.safetensors", "--scale", "auto",
                 "--scales", SCALES, "--val", low, "--val", high, *prompts, "-o", "again/added.safetensors"],
                [clipmerge, "negate", base, "tasks/low.safetensors", "--scale", "auto", "--scales", SCALES,
                 "--target", low, "--control", high, *prompts, "-o", "again/forgot.safetensors"],
            ],
        ),
        (
            "PAINT: learn blurred digits, keep upright ones",
            [
                [clipmerge, "patch", base, "tasks/blurred.safetensors", "--patch", blurred,
                 "--supported", held, "--alphas", ALPHAS, "-o", "again/patched.safetensors"],
            ],
        ),
        (
            "What was written, and whether it is what it says",
            [
                [clipmerge, "inspect", "greedy.safetensors"],
                [clipmerge, "verify", "greedy.safetensors", "--parents", "ft"],
                [clipmerge, "compare", "uniform.safetensors", "greedy.safetensors", "--base", base],
            ],
        ),
    ]  # fmt: skip
