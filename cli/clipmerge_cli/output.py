"""Writing merged weights: one file, shards, or a Hub-ready folder; or only saying what would be written."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipmerge_cli.options import HUB_FILE
from clipmerge_cli.progress import progress
from clipmerge_cli.show import document, say, table

if TYPE_CHECKING:
    from clipmerge.weights.expression import Weights


def write(
    weights: "Weights",
    output: Path,
    *,
    force: bool = False,
    dtype: str | None = None,
    shard_size: str | int | None = None,
    allow_nonfinite: bool = False,
    threads: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    model: str | None = None,
    digests: bool = True,
    quiet: bool = False,
) -> Path:
    """Save as the options of a merging command ask; the path that was written (a folder's own path).

    Args:
        output: a file; one called open_clip_model.safetensors (what `-o DIR/` becomes) gets its folder's
            open_clip_config.json and model card.
        metadata: further keys of the file's record: "selection", "scores" …
        model: what --model said, recorded in the file; None keeps what the checkpoints record.
    """
    from clipmerge.weights.recipe import parse_size

    size = parse_size(shard_size) if isinstance(shard_size, str) else shard_size
    extra = dict(metadata or {})
    with progress(quiet=quiet) as on_progress:
        options: dict[str, Any] = {
            "force": force, "dtype": dtype, "allow_nonfinite": allow_nonfinite, "threads": threads,
            "digests": digests, "on_progress": on_progress, "shard_size": size,
        }  # fmt: skip
        if output.name == HUB_FILE:
            from clipmerge.report.hub import save_folder

            return save_folder(weights, output.parent, model=model, metadata=extra, **options)
        if model is not None:
            from clipmerge.model import resolve_model

            extra["model"] = resolve_model(model, weights).to_metadata()
        return weights.save(output, metadata=extra, **options)


def show_plan(
    weights: "Weights",
    output: Path | None = None,
    *,
    dtype: str | None = None,
    force: bool = False,
    as_json: bool = False,
    quiet: bool = False,
) -> None:
    """`--dry-run`: the plan on stdout, after every check that headers and the output's folder allow."""
    from clipmerge.checkpoint.write import check_target
    from clipmerge.weights.describe import describe

    plan = describe(weights, dtype=dtype)
    if output is not None and (output.name != HUB_FILE or output.parent.is_dir()):
        check_target(output, force=force, inputs=[f for c in weights.checkpoints for f in c.files()])
    if as_json:
        document({**plan.to_json(), "output": output})
        return
    rows = [
        (i.name, i.path or "in memory", i.layout, i.tensors, counted(i.dtypes), size_text(i.nbytes))
        for i in plan.inputs
    ]
    table(("input", "path", "layout", "tensors", "dtypes", "size"), rows, title="Inputs")
    made = [
        (g.formula, g.tensors, counted(g.towers), g.dtype, size_text(g.nbytes), g.example)
        for g in plan.groups
    ]
    table(("what each gets", "tensors", "where", "dtype", "size", "such as"), made, title="Tensors")
    read, written, memory = (size_text(n) for n in (plan.read_bytes, plan.written_bytes, plan.memory_bytes))
    print(f"{plan.notation} gives {plan.gives}: reads {read}, writes {written}, works in {memory}")
    say("dry run: nothing was written", quiet=quiet)


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
