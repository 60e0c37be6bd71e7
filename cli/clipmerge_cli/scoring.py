"""What the commands that choose on held-out images share: options, an evaluator, a journal, and how results show."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipmerge_cli import show
from clipmerge_cli.progress import OnProgress, progress
from clipmerge_cli.writing import Writing

if TYPE_CHECKING:
    from clipmerge.data.split import Split
    from clipmerge.evaluate.evaluator import Evaluator
    from clipmerge.search.journal import Journal
    from clipmerge.weights.weights import Weights

_INPUT, _SEARCH, _OUTPUT = "Model and images", "Search", "Output"

Holdout = Annotated[
    str | None,
    typer.Option("--holdout", metavar="SHARE", rich_help_panel=_INPUT,
                 help="Use only this share of the images, e.g. 2%; a hash of the name decides which."),
]  # fmt: skip
JournalFile = Annotated[
    Path | None,
    typer.Option("--journal", metavar="FILE", rich_help_panel=_SEARCH, show_default=False,
                 help="Where scores are remembered; default: one file in the cache folder."),
]  # fmt: skip
Fresh = Annotated[
    bool, typer.Option("--fresh", rich_help_panel=_SEARCH, help="Ignore scores that are remembered.")
]
Refine = Annotated[
    bool,
    typer.Option("--refine", rich_help_panel=_SEARCH, help="Narrow the choice down between grid points."),
]
Grid = Annotated[
    str,
    typer.Option(metavar="GRID", rich_help_panel=_SEARCH, help="START:STOP:STEP or a list such as 0,0.5."),
]
Budget = Annotated[
    int, typer.Option("--budget", min=1, rich_help_panel=_SEARCH, help="Models that a search may score.")
]
Seed = Annotated[int, typer.Option("--seed", rich_help_panel=_SEARCH, help="Of anything random.")]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", rich_help_panel=_OUTPUT, show_default=False,
                 help="Draw it: FILE as PNG, and as SVG beside it."),
]  # fmt: skip


@dataclass(frozen=True)
class Scoring:
    """How candidates are scored: the options of that name."""

    model: str | None
    templates: str | None
    classnames: Path | None
    holdout: str | None
    limit: int | None
    skip_bad: bool
    metric: str
    precision: str
    device: str
    batch_size: int
    journal: Path | None
    fresh: bool
    quiet: bool = False

    def evaluator(
        self, data: Mapping[str, str], weights: "Sequence[Weights]", on_progress: OnProgress | None
    ) -> "Evaluator":
        """An evaluator over the named splits, for the model that the options or the weights name."""
        from clipmerge.data.open import open_split
        from clipmerge.evaluate.evaluator import Evaluator
        from clipmerge.model import resolve_model

        spec = resolve_model(self.model, *weights)
        splits = {
            name: open_split(
                source,
                classnames=self.classnames,
                role=None if self.holdout else "val",
                holdout=self.holdout,
                limit=self.limit,
                skip_bad=self.skip_bad,
                on_progress=on_progress,
            )
            for name, source in data.items()
        }
        say_left_out(splits, quiet=self.quiet)
        return Evaluator(
            spec,
            splits,
            device=self.device,
            precision=self.precision,
            batch_size=self.batch_size,
            templates=self.templates,
            metric=self.metric,
            on_progress=on_progress,
        )

    def open_journal(self) -> "Journal":
        """The journal that `--journal` names, or the one in the cache folder."""
        from clipmerge.checkpoint.cache import cache_dir
        from clipmerge.search.journal import Journal

        return Journal(self.journal or cache_dir() / "scores.jsonl", fresh=self.fresh)


def is_first() -> bool:
    """Whether this process writes and speaks: the only one, or torchrun's first. Imports nothing."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def searching(device: str, *, quiet: bool) -> Iterator[OnProgress | None]:
    """Joined with torchrun's other processes, where there are any; progress shows in the first one only."""
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if together:
        from clipmerge.device import resolve_device
        from clipmerge.distributed import finish, start

        start(resolve_device(device))
    try:
        with progress(quiet=quiet or not is_first()) as on_progress:
            yield on_progress
    finally:
        if together:
            finish()


def splits_of(values: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """`NAME=DATA` or plain `DATA`, which takes the name in its place: split → data text."""
    found: dict[str, str] = {}
    for value, default in zip(values, names, strict=True):
        name, equals, data = value.partition("=")
        name, data = (name, data) if equals and name.isidentifier() else (default, value)
        if name in found or not data:
            raise typer.BadParameter(f"{value!r}: each split needs its own name, as in {default}=DATA")
        found[name] = data
    return found


def counted(name: str, count: int) -> list[str]:
    """`name` for one, `name1`, `name2` … for several."""
    return [name] if count == 1 else [f"{name}{i}" for i in range(1, count + 1)]


def say_left_out(splits: "Mapping[str, Split]", *, quiet: bool) -> None:
    """What --skip-bad left out of each split, on stderr; in the first process."""
    for split in splits.values():
        show.left_out(split.source, split.skipped, len(split), quiet=quiet or not is_first())


def say_score(score: Any, *, quiet: bool) -> None:
    """The held-out score on stderr, with its interval."""
    from clipmerge.evaluate.metrics import METRICS

    low, high = score.interval
    right = f"{score.correct} of {score.n} right" if score.metric == "top1" else f"{score.n} images"
    show.say(
        f"held out: {METRICS[score.metric].title} {100 * score.value:.2f} "
        f"(95 %: {100 * low:.2f}–{100 * high:.2f}, {right})",
        quiet=quiet,
    )


def show_result(result: Any, output: Path | None, plot: Path | None, *, json: bool, quiet: bool) -> None:
    """A search's table or document on stdout, its figure where one was asked for; in the first process."""
    if not is_first():
        return
    drawn = [str(path) for path in result.plot(plot)] if plot else []
    if json:
        extra = {"output": output, "figures": drawn} if drawn else {"output": output}
        show.document(result.to_json() | extra)
    else:
        table = result.table()
        show.table(table.headers, table.rows, title=table.title or None)
    for path in drawn:
        show.say(f"drew {path}", quiet=quiet)


def choose(
    search: "Callable[[Evaluator, OnProgress | None], Any]",
    data: Mapping[str, str],
    weights: "Sequence[Weights]",
    scoring: Scoring,
    writing: Writing,
    plot: Path | None,
    *,
    json: bool,
    quiet: bool,
) -> None:
    """Run a search over coefficients on the named splits, show it, and write what it chose."""
    with searching(scoring.device, quiet=quiet or json) as on_progress:
        evaluator = scoring.evaluator(data, weights, on_progress)
        result = search(evaluator, on_progress)
        written = None
        if is_first():
            chosen = {"by": result.to_json()["kind"], "data": {n: evaluator.data_key(n) for n in data}}
            record = {"model": evaluator.model.to_metadata(), "selection": chosen}
            written = writing.write(result.weights, record, on_progress)
    show_result(result, written, plot, json=json, quiet=quiet)
    if is_first():
        show.say(f"chose {chosen_text(result)}", quiet=quiet)
        writing.finish(written, quiet=quiet)


def chosen_text(result: Any) -> str:
    """What a search over coefficients chose, in words."""
    numbers = getattr(result, "coefficients", None)
    if numbers is not None:
        return ", ".join(f"{name} {number:g}" for name, number in numbers.items())
    alpha = result.alpha
    return ", ".join(f"{x:g}" for x in alpha) if isinstance(alpha, tuple) else f"{alpha:g}"
