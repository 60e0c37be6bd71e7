"""How commands that merge write their output, or show what they would write."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from clipmerge_cli import show
from clipmerge_cli.options import HUB_FILE
from clipmerge_cli.progress import OnProgress, progress

if TYPE_CHECKING:
    from clipmerge.weights.weights import Weights


@dataclass(frozen=True)
class Writing:
    """How the output is written: the options of that name.

    Attributes:
        output: a file; one called open_clip_model.safetensors (what `-o DIR/` becomes) gets its folder's
            open_clip_config.json and model card.
        digests: whether the parents' content digests are recorded, which `verify` needs.
        fsync: whether to wait until the output is on the disk.
        model: what --model said, recorded in the file; None keeps what the checkpoints record.
        push_to_hub: ORG/NAME to upload the folder to that is written.
    """

    output: Path | None
    force: bool = False
    dtype: str | None = None
    shard_size: str | int | None = None
    allow_nonfinite: bool = False
    threads: int | None = None
    digests: bool = True
    fsync: bool = False
    model: str | None = None
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        if self.push_to_hub and (self.output is None or self.output.name != HUB_FILE):
            raise typer.BadParameter("goes with a folder: -o DIR/", param_hint="--push-to-hub")

    def check(self, *weights: "Weights", based: bool = True, output: bool = True) -> None:
        """Refuse what would be refused at the end, before any work is done.

        Args:
            based: the first weights are a base, whose float dtypes the output takes; else all must agree.
            output: look at the output too; where it is written next, writing does that.

        Raises:
            RecipeError: task vectors stand among models.
        """
        from clipmerge.errors import RecipeError
        from clipmerge.weights.check import check
        from clipmerge.weights.plan import float_dtype
        from clipmerge.weights.weights import mean

        bytes_of(self.shard_size)
        vectors = [w for w in weights if w.kind() == 0]
        if vectors and len(vectors) < len(weights):
            raise RecipeError(
                f"{vectors[0].checkpoints[0].path} is a task vector, not a model",
                hint='add it to its base: clipmerge merge "base + 0.4*vector" base=FILE vector=FILE -o FILE',
            )
        dtype = float_dtype(self.dtype) or ("F32" if based else None)
        check(mean(weights), dtype=dtype)
        if output:
            self.check_output(mean(weights), dtype)

    def check_output(self, weights: "Weights", dtype: str | None) -> None:
        """Refuse an output that could not be written, from headers alone: it exists, is an input, does not fit."""
        if self.output is None:
            return
        shard_size = bytes_of(self.shard_size)
        if self.output.name == HUB_FILE:
            from clipmerge.report import hub

            folder = self.output.parent
            hub.check_save(weights, folder, model=self.model, force=self.force, shard_size=shard_size)
            return
        from clipmerge.weights import run

        run.check_save(weights, self.output, force=self.force, dtype=dtype, shard_size=shard_size)

    def write(
        self,
        weights: "Weights",
        metadata: Mapping[str, Any] | None = None,
        on_progress: OnProgress | None = None,
    ) -> Path | None:
        """Write the weights where an output was named; the file or folder that was written.

        Args:
            metadata: further keys of the file's record: "selection", "scores" …
        """
        if self.output is None:
            return None
        extra = dict(metadata or {})
        options: dict[str, Any] = {
            "force": self.force, "dtype": self.dtype, "shard_size": bytes_of(self.shard_size),
            "allow_nonfinite": self.allow_nonfinite, "threads": self.threads, "digests": self.digests,
            "fsync": self.fsync, "on_progress": on_progress,
        }  # fmt: skip
        if self.model is not None and "model" not in extra:
            from clipmerge.model import resolve_model

            extra["model"] = resolve_model(self.model, weights).to_metadata()
        if self.output.name != HUB_FILE:
            return weights.save(self.output, metadata=extra, **options)
        from clipmerge.report.hub import save_folder

        return save_folder(weights, self.output.parent, metadata=extra, **options)

    def finish(self, written: Path | None, *, quiet: bool) -> None:
        """What is left once the results are shown: say what was written, and upload it if that was asked for."""
        if written is None:
            return
        show.wrote(written, quiet=quiet)
        if self.push_to_hub:
            from clipmerge.report.hub import push

            show.say(f"uploaded to {push(written, self.push_to_hub)}", quiet=quiet)


def load_models(base: str, *others: str) -> "list[Weights]":
    """The base and the models beside it; a task-vector file stands for the base plus that vector."""
    from clipmerge.weights.weights import load_all

    start, *rest = load_all([base, *others])
    return [start, *(start + w if start.kind() == 1 and w.kind() == 0 else w for w in rest)]


def merge_or_plan(weights: "Weights", writing: Writing, dry_run: bool, json: bool, quiet: bool) -> None:
    """Write weights that nobody has to choose, or with `--dry-run` show what would be written."""
    if dry_run:
        plan(weights, writing, json=json)
        return
    if writing.output is None:
        raise typer.BadParameter("say where to write: -o FILE", param_hint="--output")
    with progress(quiet=quiet or json) as on_progress:
        written = writing.write(weights, None, on_progress)
    if json:
        show.document({"kind": "merge", "notation": repr(weights), "output": written})
    writing.finish(written, quiet=quiet or json)


def plan(weights: "Weights", writing: Writing, *, json: bool) -> None:
    """The plan on stdout, after every check that headers and the output's folder allow."""
    from clipmerge.weights.describe import describe

    made = describe(weights, dtype=writing.dtype, threads=writing.threads)
    writing.check_output(weights, writing.dtype)
    bytes_of(writing.shard_size)
    if json:
        show.document({"kind": "plan", **made.to_json(), "output": writing.output})
        return
    inputs = [
        (i.name, i.path or "in memory", i.layout, i.tensors, counted(i.dtypes), size_text(i.nbytes))
        for i in made.inputs
    ]
    show.table(("input", "path", "layout", "tensors", "dtypes", "size"), inputs, title="Inputs")
    groups = [
        (g.formula, g.tensors, counted(g.towers), g.dtype, size_text(g.nbytes), g.example)
        for g in made.groups
    ]
    show.table(("what each gets", "tensors", "where", "dtype", "size", "such as"), groups, title="Tensors")
    read, written, memory = (size_text(n) for n in (made.read_bytes, made.written_bytes, made.memory_bytes))
    print(f"{made.notation} gives {made.gives}: reads {read}, writes {written}, works in {memory} at most")
    show.say("dry run: nothing was written")


def bytes_of(size: str | int | None) -> int | None:
    """`5GB` or `512MiB` as a number of bytes; wrong form: exit 2."""
    if size is None or isinstance(size, int):
        return size
    from clipmerge.errors import RecipeError
    from clipmerge.weights.recipe import parse_size

    try:
        return parse_size(size)
    except RecipeError as error:
        raise typer.BadParameter(f"{error.message}: {error.hint}", param_hint="--shard-size") from error


def counted(counts: Mapping[str, int]) -> str:
    """`{"F32": 302}` → `F32`; several with their counts: `F32 300, I64 2`."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{key} {count}" for key, count in counts.items())


def size_text(nbytes: int) -> str:
    """Bytes for people, in thousands: `605.2 MB`."""
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
