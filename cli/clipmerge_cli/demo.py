"""`clipmerge demo`: finetune, merge, choose and compare on embedded real images, and say how to repeat it."""

import json as json_module
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipmerge.errors import OutputError
from clipmerge_cli.demo_setting import MODEL, MODEL_FILE, SPLITS
from clipmerge_cli.options import Talk

if TYPE_CHECKING:
    from clipmerge.types import Progress
    from clipmerge_cli.demo_study import Row, Study

RESULTS = "results.json"


def demo(
    talk: Talk,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="The folder that keeps everything.")
    ] = Path("clipmerge-demo"),
    force: Annotated[bool, typer.Option("--force", help="Start a finished demo anew.")] = False,
) -> None:
    """Finetune, merge, choose and compare: two minutes on two cores, no network.

    Real images (scikit-learn's handwritten digits), a tiny CLIP trained from scratch, six FLYP finetunings;
    then soups, WiSE-FT, task arithmetic and PAINT, all chosen on held-out images and reported on test images
    and on a shift (the digits turned by 25 degrees). [bold]commands.sh[/bold] in the folder has every step as
    a command. An interrupted demo goes on where it stopped.

        clipmerge demo --out clipmerge-demo/
    """
    study = run(out, force=force, quiet=talk.quiet or talk.json)
    if talk.json:
        print((out / RESULTS).read_text(encoding="utf-8"), end="")
    else:
        _show(study, out)


def run(out: Path, *, force: bool = False, quiet: bool = False, pace: float = 1.0) -> "Study":
    """The whole demo in `out`."""
    from clipmerge_cli.demo_report import write_report
    from clipmerge_cli.demo_study import Study
    from clipmerge_cli.progress import progress
    from clipmerge_cli.show import say

    _claim(out, force)
    say(f"1,797 real images of digits, a CLIP of 2 million parameters; all of it goes to {out}/", quiet=quiet)

    @contextmanager
    def watched(step: str) -> Iterator["Progress | None"]:
        start = perf_counter()
        with progress(quiet=quiet, title=step) as on_progress:
            yield on_progress
        say(f"  {step:<32} {perf_counter() - start:5.1f} s", quiet=quiet)

    study = Study(out, watched, pace)
    with _one_thread():
        study.run()
        with watched("figures"):
            write_report(study, out / RESULTS)
    return study


@contextmanager
def _one_thread() -> Iterator[None]:
    """A model this small gains nothing from a second thread, and one thread always gives the same bytes."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _claim(out: Path, force: bool) -> None:
    """Refuse a folder that is not a demo's, or that holds a finished demo, unless `force`.

    Raises:
        OutputError: the folder is not ours to write into.
    """
    ours = out / MODEL_FILE
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        out.mkdir(parents=True, exist_ok=True)
        return
    if not ours.is_file():
        raise OutputError(f"{out} is not empty, and no demo's", hint="name another folder with --out")
    if force:
        for name in ("data", "ft", "tasks", "again"):
            shutil.rmtree(out / name, ignore_errors=True)
        for path in (*out.glob("*.safetensors"), out / "base.state", out / RESULTS):
            path.unlink(missing_ok=True)
    elif (out / RESULTS).exists():
        raise OutputError(
            f"{out} holds a finished demo", hint="look at it, name another folder with --out, or use --force"
        )
    elif json_module.loads(ours.read_text(encoding="utf-8")) != MODEL:
        raise OutputError(f"{out} holds a demo of another version", hint="start it anew with --force")


def _show(study: "Study", out: Path) -> None:
    from clipmerge_cli.demo_study import TASK_ROLES
    from clipmerge_cli.show import table

    chosen = "Chosen on held-out digits; reported on test digits and on the shift"
    table(
        ("model", "held-out", "test", "95 %", f"shift ({SPLITS['shift'].partition('@')[2]})", "95 %"),
        [_compared(row) for row in study.rows if row.role not in TASK_ROLES],
        title=f"{chosen} (top-1 %)",
    )
    table(
        ("model", "low 0–4", "high 5–9", "upright 0–9", "blurred 0–9"),
        [_task(row) for row in study.rows if row.role in ("base", *TASK_ROLES)],
        title="Task arithmetic and patching, on test digits (top-1 %)",
    )
    print(f"{out}/comparison.png   the first table as a picture; also greedy-soup, wise-ft, forgot, patched")
    print(f"{out}/results.json     every number")
    print(f"{out}/commands.sh      every step as a command, to type or to run")


def _compared(row: "Row") -> list[Any]:
    cells = [row.name, _percent(row, "held-out")]
    for split in ("test", "shift"):
        low, high = row.scores[split]["interval"]
        cells += [_percent(row, split), f"{100 * low:.1f}–{100 * high:.1f}"]
    return cells


def _task(row: "Row") -> list[Any]:
    return [row.name, *(_percent(row, split) for split in ("low", "high", "test", "blurred"))]


def _percent(row: "Row", split: str) -> str:
    return f"{100 * row.scores[split]['value']:.1f}"
