"""`clipmerge task-vector`: what finetuning changed, as a file of its own."""

from typing import Annotated

import typer

from clipmerge_cli.options import (
    AllowNonfinite,
    DryRun,
    Dtype,
    Force,
    Fsync,
    Json,
    NoDigests,
    Output,
    Quiet,
    Threads,
)


def task_vector(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base checkpoint.", show_default=False)],
    finetuned: Annotated[
        str, typer.Argument(metavar="FINETUNED", help="What finetuning made of it.", show_default=False)
    ],
    output: Output,
    dtype: Dtype = None,
    force: Force = False,
    dry_run: DryRun = False,
    allow_nonfinite: AllowNonfinite = False,
    threads: Threads = None,
    no_digests: NoDigests = False,
    fsync: Fsync = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write finetuned minus base as a file of its own.

    The file knows that it is a task vector: expressions use it as one, and nothing takes it for a model.

    \b
    clipmerge task-vector zs.safetensors cars.safetensors -o cars.tv.safetensors
    clipmerge merge "zs + 0.4*cars" \\
        zs=zs.safetensors cars=cars.tv.safetensors -o added.safetensors
    """
    from clipmerge.weights.weights import load_all
    from clipmerge_cli.writing import Writing, merge_or_plan

    start, end = load_all([base, finetuned])
    writing = Writing(
        output, force, dtype, None, allow_nonfinite, threads,
        digests=not no_digests, fsync=fsync,
    )  # fmt: skip
    merge_or_plan(end - start, writing, dry_run, json, quiet)
