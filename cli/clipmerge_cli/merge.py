"""`clipmerge merge`: any expression over checkpoints, or a recipe file."""

from dataclasses import replace

from clipmerge_cli.groups import arg
from clipmerge_cli.options import MODEL, named
from clipmerge_cli.writing import Output


def merge(
    *,
    expression: str = arg("EXPRESSION|RECIPE.toml", "What to compute, or a recipe that says it."),
    files: list[str] | None = arg("[NAME=FILE]...", "The checkpoint behind each name.", None),
    out: Output,
    model: str | None = MODEL,
) -> None:
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

    named_files = named(files or [], "NAME=FILE")
    recipe = read_recipe(expression) if expression.endswith(".toml") else Recipe(expression, {})
    weights = replace(recipe, checkpoints={**recipe.checkpoints, **named_files}).weights()
    out = replace(
        out,
        output=out.output or recipe.output,
        dtype=out.dtype or recipe.dtype,
        shard_size=out.shard_size or recipe.shard_size,
    )
    out.merge(weights, model=model)
