"""`clipmerge merge`: any expression over checkpoints, or a recipe file."""

from pathlib import Path
from typing import Annotated

import typer

from clipmerge_cli.options import (
    AllowNonfinite,
    DryRun,
    Dtype,
    Force,
    Json,
    MaybeOutput,
    Model,
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
    no_digests: Annotated[
        bool,
        typer.Option("--no-digests", help="Do not digest the parents; `verify` will not find them.",
                     rich_help_panel="Output"),
    ] = False,
    threads: Threads = None,
    model: Model = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="ORG/NAME", help="Upload the folder written with -o DIR/.",
                     rich_help_panel="Output"),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Any expression over checkpoints, computed in one pass.

    The sum of the coefficients must be 1 (a model) or 0 (a task vector).

    \b
    clipmerge merge "base + 0.4*(a - base)" base=base.safetensors a=a.safetensors -o out.safetensors
    clipmerge merge "mean(\\[a, b])" a=a.pt b=hf-hub:org/b -o soup/
    clipmerge merge 'base + {"visual": 0.5}*(a - base)' base=b.safetensors a=a.safetensors --dry-run
    clipmerge merge recipe.toml

    A recipe is TOML: expression = "...", a table \\[checkpoints] with name = "file" (relative to the recipe),
    and, where wanted, output, dtype and shard_size. What the command line says wins.
    """
    from clipmerge.weights.recipe import Recipe, read_recipe
    from clipmerge_cli.output import show_plan, write
    from clipmerge_cli.show import document, wrote

    given = named(files or [], "NAME=FILE")
    is_file = expression.endswith(".toml")
    recipe = read_recipe(expression) if is_file else Recipe(expression, {})
    weights = Recipe(recipe.expression, {**recipe.checkpoints, **given}).weights()
    target: Path | None = output or recipe.output
    dtype = dtype or recipe.dtype
    if dry_run:
        show_plan(weights, target, dtype=dtype, force=force, as_json=json, quiet=quiet)
        return
    if target is None:
        raise typer.BadParameter("say where to write: -o merged.safetensors", param_hint="--output")
    if push_to_hub and target.name != "open_clip_model.safetensors":
        raise typer.BadParameter("goes with a folder: -o DIR/", param_hint="--push-to-hub")
    path = write(
        weights, target, force=force, dtype=dtype, shard_size=shard_size or recipe.shard_size,
        allow_nonfinite=allow_nonfinite, threads=threads, model=model, digests=not no_digests,
        quiet=quiet or json,
    )  # fmt: skip
    if push_to_hub:
        from clipmerge.report.hub import push

        wrote_to = push(path, push_to_hub)
    if json:
        document({"output": path, "notation": repr(weights), **({"pushed": wrote_to} if push_to_hub else {})})
    wrote(path, quiet=quiet or json)
