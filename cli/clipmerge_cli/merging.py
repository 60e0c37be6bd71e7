"""The commands that merge as they are told: analogy, merge, task-vector, convert."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import typer

import clipmerge
from clipmerge.checkpoint import convert as convert_checkpoint
from clipmerge.weights.recipe import Recipe, read_recipe
from clipmerge.weights.record import with_model
from clipmerge.weights.weights import one_tower
from clipmerge_cli import options as shared
from clipmerge_cli import show
from clipmerge_cli.groups import arg, opt
from clipmerge_cli.options import HUB_FILE, INPUT, Grid, Talk
from clipmerge_cli.scoring import Choosing, choose
from clipmerge_cli.writing import UNKNOWN_MODEL, Output, load_models, named_model


def analogy(
    *,
    base: str = shared.BASE,
    a: str = opt(..., "The checkpoint that relates to B as C does to the result.", metavar="A"),
    b: str = opt(..., "The checkpoint that A relates to.", metavar="B"),
    c: str = opt(..., "The checkpoint that relates to the result as A does to B.", metavar="C"),
    vectors: bool = shared.VECTORS,
    out: Output,
    choosing: Choosing,
    scale: float | None = shared.scale_option("1.0"),
    val: str | None = opt(None, "With auto: held-out images.", INPUT, metavar="DATA"),
    scales: Grid = shared.SCALES,
    refine: bool = shared.REFINE,
) -> None:
    """A is to B as C is to the result: base + scale * (C + B - A), all as task vectors.

    The scale is 1 unless one is given or, with --scale auto, chosen on held-out images.

        clipmerge analogy base.safetensors --a photo-dogs.safetensors \\
          --b photo-lions.safetensors --c sketch-dogs.safetensors \\
          -o sketch-lions.safetensors
        clipmerge analogy base.safetensors --a A --b B --c C --scale auto \\
          --val images/val -o out.safetensors
    """
    if scale is not None and val:
        raise typer.BadParameter("--val is for --scale auto", param_hint="--val")
    if scale is None and not val:
        raise typer.BadParameter("--scale auto needs held-out images: --val DATA", param_hint="--val")
    from clipmerge.search.rules import mean_of

    models = load_models(base, a, b, c, vectors=vectors)
    start, first, second, third = models

    vector = (third - start) + (second - start) - (first - start)
    splits, rule = {"val": val or ""}, mean_of(["val"])
    choose("analogy", models, vector, scale, scales, splits, choosing, out, rule=rule, refine=refine)


def merge(
    *,
    expression: str = arg("EXPRESSION|RECIPE.toml", "What to compute, or a recipe that says it."),
    files: list[str] | None = arg("[NAME=FILE]...", "The checkpoint behind each name.", None),
    out: Output,
    model: str | None = shared.MODEL,
) -> None:
    """Any expression over checkpoints, computed in one pass.

    The sum of the coefficients must be 1 (a model) or 0 (a task vector).

        clipmerge merge "base + 0.4*(a - base)" \\
          base=base.safetensors a=a.safetensors -o out.safetensors
        clipmerge merge "mean(\\[a, b])" a=a.pt b=hf-hub:org/b -o soup/
        clipmerge merge 'base + {"visual": 0.5}*(a - base)' \\
          base=base.safetensors a=a.safetensors --dry-run
        clipmerge merge recipe.toml

    A recipe is TOML: expression = "...", a table \\[checkpoints] with name = "file" (relative to the recipe),
    and, where wanted, output, dtype and shard_size. What the command line says wins.
    """
    named_files = shared.named(files or [], "NAME=FILE")
    recipe = read_recipe(expression) if expression.endswith(".toml") else Recipe(expression, {})
    recipe = replace(recipe, checkpoints={**recipe.checkpoints, **named_files})
    weights = recipe.weights()
    idle = [name for name in recipe.checkpoints if name not in {c.name for c in weights.checkpoints}]
    remark = f"no part of the result, as its coefficients sum to 0: {', '.join(idle)}" if idle else None
    first = {name: getattr(out, name) or getattr(recipe, name) for name in ("output", "dtype", "shard_size")}
    replace(out, **first).merge(weights, model=model, remark=remark)


def task_vector(*, base: str = shared.BASE, finetuned: str = shared.FINETUNED, out: Output) -> None:
    """Write finetuned minus base as a file of its own.

    The file knows that it is a task vector: expressions use it as one, and nothing takes it for a model.

        clipmerge task-vector zs.safetensors cars.safetensors -o cars.tv.safetensors
        clipmerge merge "zs + 0.4*cars" \\
          zs=zs.safetensors cars=cars.tv.safetensors -o added.safetensors
    """
    start, end = load_models(base, finetuned)
    out.merge(end - start)


def convert(
    *,
    checkpoint: str = arg("CKPT", "File, folder, hf-hub:ORG/NAME or MODEL:TAG."),
    output: Path = shared.output_option(...),
    talk: Talk,
    to: Literal["open_clip", "huggingface"] = opt("open_clip", "Whose names to write."),
    only: Literal["image", "text"] | None = opt(None, "Write one tower alone."),
    model: str | None = shared.MODEL,
    force: bool = shared.FORCE,
) -> None:
    """Rewrite a checkpoint as safetensors under open_clip's or Hugging Face's names, bit for bit.

    Reads OpenAI's TorchScript archives, training checkpoints, pickled modules and Hugging Face folders
    without running any code in them. DIR/ as output gets the model's configuration too (--model names the
    model where the checkpoint does not).

        clipmerge convert ViT-B-32.pt -o vit-b-32.safetensors
        clipmerge convert soup.safetensors --to huggingface -o soup-hf/
        clipmerge convert soup.safetensors --only image -o encoder.safetensors
    """
    weights = clipmerge.load(checkpoint)
    (source,) = weights.checkpoints
    if only:
        if output.name == HUB_FILE:
            raise typer.BadParameter(
                "one tower is a file, not a model's folder: -o FILE", param_hint="--only"
            )
        source = one_tower(source, only)
    said = weights.model if model is None else named_model(model, weights)
    source = replace(source, metadata={**source.metadata, **with_model(source, said)})
    with talk.progress() as on_progress:
        if output.name == HUB_FILE:
            record = clipmerge.resolve_model(model, weights).to_metadata()
            path = convert_checkpoint.convert_folder(
                source, output.parent, to, record, force=force, on_progress=on_progress
            )
        else:
            path = convert_checkpoint.convert(source, output, to, force=force, on_progress=on_progress)
    dropped = list(source.extra.get("dropped", ()))
    if talk.json:
        facts = {"from": source.layout, "to": to, "output": path, "dropped": dropped}
        show.document({"kind": "convert", **facts})
        return
    if dropped:
        talk.say(f"left out, as {to} has no place for them: {', '.join(dropped)}")
    talk.say(f"{source.layout} → {to}, {len(source.tensors)} tensors")
    if said is None:
        talk.say(UNKNOWN_MODEL)
    talk.say(f"wrote {show.short(path)}")
