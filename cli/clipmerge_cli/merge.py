"""`clipmerge merge`: any expression over checkpoints, or a recipe file."""

from typing import Annotated

import typer

from clipmerge_cli.options import (
    AllowNonfinite,
    DryRun,
    Dtype,
    Force,
    Fsync,
    Json,
    MaybeOutput,
    Model,
    NoDigests,
    PushToHub,
    Quiet,
    ShardSize,
    Threads,
    named,
)


def merge(
    expression: Annotated[
        str, typer.Argument(metavar="EXPRESSION|RECIPE.toml", help="What to compute, or a recipe that says it.")
    ],
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=FILE]...", help="The checkpoint behind each name.", show_default=False),
    ] = None,
    output: MaybeOutput = None,
    dtype: Dtype = None,
    shard_size: ShardSize = None,
    force: Force = False,
    dry_run: DryRun = False,
    allow_nonfinite: AllowNonfinite = False,
    threads: Threads = None,
    no_digests: NoDigests = False,
    fsync: Fsync = False,
    model: Model = None,
    push_to_hub: PushToHub = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Any expression over checkpoints, computed in one pass.

    The sum of the coefficients must be 1 (a model) or 0 (a task vector).

    \b
    clipmerge merge "base + 0.4*(a - base)" \\
        base=base.safetensors a=a.safetensors -o out.safetensors
    clipmerge merge "mean(\\[a, b])" a=a.pt b=hf-hub:org/b -o soup/
    clipmerge merge 'base + {"visual": 0.5}*(a - base)' \\
        base=base.safetensors a=a.safetensors --dry-run
    clipmerge merge recipe.toml

    A recipe is TOML: expression = "...", a table \\[checkpoints] with name = "file" (relative to the recipe),
    and, where wanted, output, dtype and shard_size. What the command line says wins.
    """
    from clipmerge.weights.recipe import Recipe, read_recipe
    from clipmerge_cli.writing import Writing, merge_or_plan

    given = named(files or [], "NAME=FILE")
    recipe = read_recipe(expression) if expression.endswith(".toml") else Recipe(expression, {})
    weights = Recipe(recipe.expression, {**recipe.checkpoints, **given}).weights()
    target = output or recipe.output
    writing = Writing(
        target, force, dtype or recipe.dtype, shard_size or recipe.shard_size, allow_nonfinite, threads,
        digests=not no_digests, fsync=fsync, model=model, push_to_hub=push_to_hub,
    )  # fmt: skip
    merge_or_plan(weights, writing, dry_run, json, quiet)
