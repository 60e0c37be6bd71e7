"""`clipmerge demo`: finetune, merge, choose and compare on embedded real images, and say how to repeat it."""

import json
import shutil
from pathlib import Path

from clipmerge.checkpoint.output import make_folder
from clipmerge.errors import OutputError
from clipmerge_cli import show
from clipmerge_cli.demo_steps import MODEL, MODEL_FILE, SPLITS
from clipmerge_cli.demo_study import RESULTS, TASK_ROLES, Row, Study
from clipmerge_cli.groups import opt
from clipmerge_cli.options import Talk


def demo(
    *,
    talk: Talk,
    out: Path = opt(Path("clipmerge-demo"), "The folder that keeps everything.", metavar="DIR"),
    force: bool = opt(False, "Start a finished demo anew."),
) -> None:
    """Finetune, merge, choose and compare: two minutes on two cores, no network.

    Real images (scikit-learn's handwritten digits), a tiny CLIP trained from scratch, six FLYP finetunings;
    then soups, WiSE-FT, task arithmetic and PAINT, all chosen on held-out images and reported on test images
    and on a shift (the digits turned by 25 degrees). [bold]commands.sh[/bold] in the folder has every step as
    a command. An interrupted demo goes on where it stopped.

        clipmerge demo --out clipmerge-demo/
    """
    study = run(out, talk, force=force)
    if talk.json:
        print((out / RESULTS).read_text(encoding="utf-8"), end="")
    else:
        _show(study, out)


def run(out: Path, talk: Talk, *, force: bool = False, pace: float = 1.0) -> Study:
    """Make the whole demo in `out`, with `pace` times the training steps."""
    import torch

    _claim(out, force)
    talk.say(f"1,797 real images of digits, a CLIP of 2 million parameters; all of it goes to {out}/")
    study, threads = Study(out, talk, pace), torch.get_num_threads()
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


def _show(study: Study, out: Path) -> None:
    columns = ("model", "held-out", "test", "95 %", f"shift ({SPLITS['shift'].partition('@')[2]})", "95 %")
    title = "Chosen on held-out digits; reported on test digits and on the shift (top-1 %)"
    singles = [
        _cells(r, "held-out", "test", None, "shift", None) for r in study.rows if r.role not in TASK_ROLES
    ]
    show.table(columns, singles, title=title)
    tasks = [row for row in study.rows if row.role in ("base", *TASK_ROLES)]
    task_columns = ("model", "low 0–4", "high 5–9", "upright 0–9", "blurred 0–9")
    title = "Task arithmetic and patching, on test digits (top-1 %)"
    show.table(task_columns, [_cells(row, "low", "high", "test", "blurred") for row in tasks], title=title)
    print(f"{out}/comparison.png   the first table as a picture; also greedy-soup, wise-ft, forgot, patched")
    print(f"{out}/results.json     every number")
    print(f"{out}/commands.sh      every step as a command, to type or to run")


def _cells(row: Row, *splits: str | None) -> list[str]:
    """Return a row of the table; None is the interval of the score before it."""
    cells: list[str] = [row.name]
    score = row.scores["test"]
    for split in splits:
        score = score if split is None else row.scores[split]
        cells.append(show.interval(score["interval"]) if split is None else show.percent(score["value"], 1))
    return cells
