"""`clipmerge demo`: finetune, merge, choose and compare on embedded real images, and say how to repeat it."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from clipmerge.checkpoint.output import make_folder
from clipmerge.errors import OutputError
from clipmerge_cli import show
from clipmerge_cli.demo_steps import MODEL, MODEL_FILE, SHIFTS, TASKWISE
from clipmerge_cli.demo_study import RESULTS, TASK_ROLES, Study
from clipmerge_cli.groups import opt
from clipmerge_cli.options import Talk

_LEVEL = 0.05
"""A difference stands where its p is smaller."""


def demo(
    *,
    talk: Talk,
    out: Path = opt(Path("clipmerge-demo"), "The folder that keeps everything.", metavar="DIR"),
    force: bool = opt(False, "Start a finished demo anew."),
) -> None:
    """Finetune, merge, choose and compare: two minutes on two cores, no network.

    Real images (scikit-learn's handwritten digits), a tiny CLIP trained from scratch, eight FLYP finetunings;
    then soups, WiSE-FT, task arithmetic and PAINT, all chosen on 400 held-out images and reported on 800 test
    images and on four shifts of them. Paired tests say which differences stand. [bold]commands.sh[/bold] in the
    folder has every step as a command. An interrupted demo goes on where it stopped.

    Three settings were looked at, with all that came out: one with six finetunings and 360 test digits, where no
    difference stood in distribution; this one; and this with 150 training digits, where soups helped under shift alone.
    Models were first scored under six shifts; a turn the other way and low contrast were left out before the last run.

        clipmerge demo --out clipmerge-demo/
    """
    run(out, talk, force=force)
    results = (out / RESULTS).read_text(encoding="utf-8")
    if talk.json:
        print(results, end="")
    else:
        _show(json.loads(results), out)


def run(out: Path, talk: Talk, *, force: bool = False, pace: float = 1.0) -> Study:
    """Make the whole demo in `out`, with `pace` times the training steps."""
    import torch

    _claim(out, force)
    talk.say(f"1,797 real images of digits, a CLIP of 2 million parameters; all of it goes to {out}/")
    study, threads = Study(out.absolute(), talk, pace), torch.get_num_threads()
    torch.set_num_threads(1)  # a second gains nothing with so small a model; one always gives the same bytes
    try:
        study.run()
    finally:
        torch.set_num_threads(threads)
    return study


def _claim(out: Path, force: bool) -> None:
    """Refuse a folder that is not a demo's, or that holds a finished demo, unless `force`."""
    model = out / MODEL_FILE
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        make_folder(out)
        return
    if not model.is_file():
        message = f"{out} is not empty and was not created by `clipmerge demo`"
        raise OutputError(message, hint="name another folder with --out")
    if force:
        for name in ("data", "ft", "tasks", "again"):
            shutil.rmtree(out / name, ignore_errors=True)
        for path in (*out.glob("*.safetensors"), out / "base.state", out / RESULTS):
            path.unlink(missing_ok=True)
    elif (out / RESULTS).exists():
        hint = "look at it, name another folder with --out, or use --force"
        raise OutputError(f"{out} holds a finished demo", hint=hint)
    elif json.loads(model.read_text(encoding="utf-8")) != MODEL:
        raise OutputError(f"{out} holds a demo of another version", hint="start it anew with --force")


def _show(results: Mapping[str, Any], out: Path) -> None:
    models = [model for model in results["models"] if model["role"] not in TASK_ROLES]
    n = models[0]["scores"]["test"]["n"]
    title = f"In distribution, top-1 %: chosen on held-out digits, reported on {n} test digits"
    rows = [_row(m, ("held-out", "test"), m["scores"]["test"]["interval"], "test") for m in models]
    show.table(("model", "held-out", "test", "95 %", "vs best", "p"), rows, title=title)
    title = "Under shift, top-1 %: the same test digits, changed"
    rows = [_row(m, SHIFTS, None, "shifts") for m in models]
    show.table(("model", *SHIFTS, "mean", "vs best", "p"), rows, title=title)
    best = next(model for model in models if model["role"] == "best")
    print(f"Against the {best['name']}; by paired tests, a difference stands at p < {_LEVEL}:")
    for sentence in verdicts(results):
        print(fill(sentence, 79, initial_indent="  ", subsequent_indent="    "))
    tasks = [model for model in results["models"] if model["role"] in ("base", *TASK_ROLES)]
    columns = ("model", "low 0–4", "high 5–9", "upright 0–9", "blurred 0–9")
    print()
    title = "Task arithmetic and patching, on test digits (top-1 %)"
    cells = [(m["name"], *(show.percent(m["scores"][s]["value"], 1) for s in TASKWISE)) for m in tasks]
    show.table(columns, cells, title=title)
    print(f"{out}/comparison.png   both tables drawn; each search beside it")
    print(f"{out}/results.json     every number")
    print(f"{out}/commands.sh      every step as a command, to type or to run")


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """Say of each way of merging whether it helped, as its paired tests against the best single have it."""
    sentences = []
    for model in results["models"]:
        if model["role"] in ("uniform", "greedy", "ensemble", "wise-ft"):
            where = {"test": "on test digits", "shifts": "under shift"}
            halves = [f"{words} {_verdict(model['against_best'][key])}" for key, words in where.items()]
            sentences.append(f"{model['name']}: {', '.join(halves)}")
    return sentences


def _verdict(entry: Mapping[str, float]) -> str:
    points, p = 100 * entry["difference"], entry["p"]
    chance = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    if p >= _LEVEL:
        return f"no difference that stands ({points:+.1f}, {chance})"
    return f"{abs(points):.1f} points {'better' if points > 0 else 'worse'} ({chance})"


def _row(
    model: Mapping[str, Any], splits: Iterable[str], interval: Sequence[float] | None, against: str
) -> tuple[str, ...]:
    """Return a row of a table: scores, an interval or the mean over shifts, and the test against the best single."""
    from clipmerge.search.results import p_text

    scores = [show.percent(model["scores"][split]["value"], 1) for split in splits]
    last = show.percent(model["shifts"]["value"], 1) if interval is None else show.interval(interval)
    entry = model["against_best"][against]
    itself = entry["p"] == 1 and entry["difference"] == 0
    test = ("–", "–") if itself else (f"{100 * entry['difference']:+.1f}", p_text(entry["p"]))
    return (model["name"], *scores, last, *test)
