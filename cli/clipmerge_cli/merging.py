"""The commands that merge: analogy, merge, leaderboard, methods, task-vector, convert."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

import clipmerge
from clipmerge.checkpoint import convert as convert_checkpoint
from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.errors import RecipeError
from clipmerge.text import and_more
from clipmerge.weights.methods import METHODS, describe
from clipmerge.weights.parse import names_in, parse
from clipmerge.weights.recipe import Recipe, load_named, read_recipe
from clipmerge.weights.record import with_model
from clipmerge.weights.weights import Weights, as_checkpoint, one_tower
from clipmerge_cli import options as shared
from clipmerge_cli import show
from clipmerge_cli.groups import arg, opt, refuse_unused
from clipmerge_cli.options import HUB_FILE, INPUT, Grid, Talk
from clipmerge_cli.scoring import Choosing, Scoring, choose, run_search
from clipmerge_cli.writing import UNKNOWN_MODEL, Output, load_models, named_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from clipmerge.search.results import SweepResult
    from clipmerge.types import Progress
    from clipmerge.weights.coefficient import Scalar
    from clipmerge.weights.expression import OptionValue


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
    shared.check_images(int(val is not None), automatic=scale is None)
    from clipmerge.search.rules import mean_of

    models = load_models(base, a, b, c, vectors=vectors, resize=out.resize_positions)
    start, first, second, third = models

    vector = (third - start) + (second - start) - (first - start)
    splits, rule = {"val": val or ""}, mean_of(["val"])
    choose("analogy", models, vector, scale, scales, splits, choosing, out, rule=rule, refine=refine)


def merge(
    *,
    expression: str = arg("EXPRESSION|RECIPE.toml", "What to compute, or a recipe that says it."),
    files: list[str] | None = arg("[NAME=FILE]...", "The checkpoint behind each name.", None),
    base: str | None = opt(None, "What adapters were trained from: a NAME or a file.", metavar="CKPT"),
    out: Output,
    choosing: Choosing,
    scale: str | None = opt(
        None, "The number that `scale` in the expression stands for; auto: chosen on images.", metavar="X"
    ),
    val: list[str] | None = opt(
        None, "With auto: held-out images of the task of checkpoint NAME; repeat.", INPUT, metavar="NAME=DATA"
    ),
    scales: Grid | None = shared.grid_option(None, "With auto: numbers to try; default: the method's own."),
    refine: bool = shared.REFINE,
    fused: bool = opt(False, "Methods of matrices take q, k and v in one tensor as one matrix."),
    equalise: bool = opt(False, "Scale task vectors to the median of their norms first."),
    space: Literal["full", "core", "knots"] = opt(
        "full", "core, knots: align low-rank updates (adapters) in a space that they share."
    ),
) -> None:
    """Any expression over checkpoints.

    The sum of the coefficients must be 1 (a model) or 0 (a task vector). `clipmerge methods` lists what can be
    called in it. With --scale auto the number `scale` (or, where the expression has none, the factor on everything
    that it adds to its base) is the one with the best mean, over tasks, of held-out score divided by the score of
    that task's own checkpoint.

        clipmerge merge "base + 0.4*(a - base)" \\
          base=base.safetensors a=a.safetensors -o out.safetensors
        clipmerge merge "zs + scale*ties(\\[a - zs, b - zs], density=0.2)" \\
          zs=base.safetensors a=cars.safetensors b=dtd.safetensors \\
          --scale auto --val a=cars/val --val b=dtd/val -o out.safetensors
        clipmerge merge "mean(\\[a, b])" a=a.pt b=hf-hub:org/b -o soup/
        clipmerge merge 'base + {"visual": 0.5}*(a - base)' \\
          base=base.safetensors a=a.safetensors --dry-run
        clipmerge merge recipe.toml

    A recipe is TOML: expression = "...", a table \\[checkpoints] with name = "file" (relative to the recipe),
    and, where wanted, output, dtype and shard_size. What the command line says wins. mergekit's YAML is read for
    linear, task_arithmetic, slerp, model_stock and ties.
    """
    if expression.endswith((".yml", ".yaml")):
        ours = ("files", "base", "fused", "equalise", "space", "scale", "scales", "val", "refine")
        refuse_unused("with mergekit's YAML", *ours)
        from clipmerge.weights.mergekit import read_mergekit

        weights, dtype = read_mergekit(Path(expression))
        replace(out, dtype=out.dtype or dtype).merge(weights, model=choosing.model, remark=f"{weights!r}")
        return
    named_files = shared.named(files or [], "NAME=FILE")
    recipe = read_recipe(expression) if expression.endswith(".toml") else Recipe(expression, {})
    checkpoints = {**recipe.checkpoints, **named_files}
    recipe = replace(
        recipe, checkpoints=checkpoints, base=base or recipe.base, resize_positions=out.resize_positions
    )
    options: dict[str, OptionValue] = {
        key: value
        for key, value in (("fused", fused), ("equalise", equalise), ("space", space))
        if value not in (False, "full")
    }
    value = None if scale is None else shared.scale(scale)
    automatic = scale is not None and value is None
    if not (automatic and out.dry_run):
        shared.check_images(len(val or []), automatic=automatic)
    first = {name: getattr(out, name) or getattr(recipe, name) for name in ("output", "dtype", "shard_size")}
    out = replace(out, **first)
    if scale is None:
        weights = recipe.weights(**options)
        idle = [name for name in recipe.checkpoints if name not in {c.name for c in weights.checkpoints}]
        remark = f"no part of the result, as its coefficients sum to 0: {', '.join(idle)}" if idle else None
        out.merge(weights, model=choosing.model, device=choosing.device, remark=remark)
        return
    names = load_named(recipe.checkpoints, recipe.base, resize=out.resize_positions)
    family = scaled(recipe.expression, names, options)
    if value is not None:
        out.merge(family(value), model=choosing.model, device=choosing.device)
        return
    splits = shared.named(val or [], "--val")
    if out.dry_run:
        out.merge(family(1), model=choosing.model, remark="scale is chosen on images; the plan shows 1")
        return
    from clipmerge.search.leaderboard import search_scale

    if unknown := splits.keys() - names.keys():
        known = ", ".join(names)
        message = f"{min(unknown)!r} is no checkpoint of the expression, whose names are {known}"
        raise typer.BadParameter(message, param_hint="--val")
    start = Weights.of(family(1).reference)
    tasks = {split: names[split] if names[split].kind() == 1 else start + names[split] for split in splits}

    def search(evaluator: "clipmerge.Evaluator", *, on_progress: "Progress | None") -> "SweepResult":
        return search_scale(family, tasks, evaluator, grid=scales, refine=refine, on_progress=on_progress)

    run_search(search, splits, list(tasks.values()), choosing, out, "scale")


def scaled(
    text: str, names: "Mapping[str, Weights]", options: "Mapping[str, OptionValue]"
) -> "Callable[[Scalar], Weights]":
    """Return number → model: the number is `scale` in the expression, or the factor on what it adds to its base."""
    if "scale" in names_in(text):
        if "scale" in names:
            raise RecipeError(
                "scale is a number here, and a checkpoint", hint="give the checkpoint another name"
            )
        return lambda number: parse(text, names, numbers={"scale": number}, options=options)
    whole = parse(text, names, options=options)
    if whole.kind() != 1 or not isinstance(whole.base, Checkpoint):
        raise RecipeError("the expression has no free number", hint="write it as scale: zs + scale*ties(…)")
    base = Weights.of(whole.base)
    return lambda number: base + number * (whole - base)


def leaderboard(
    *,
    base: str = shared.BASE,
    finetuned: list[str] = arg("FINETUNED...", "One checkpoint, or task-vector file, per task."),
    talk: Talk,
    scoring: Scoring,
    val: list[str] = opt(..., "Each task's held-out images, in order.", INPUT, metavar="DATA"),
    test: list[str] | None = opt(
        None, "Each task's images to report on, in order; default: the held-out ones.", INPUT, metavar="DATA"
    ),
    method: list[str] | None = opt(
        None, "Run this one, such as 'ties(density=0.1)'; repeat.", metavar="METHOD"
    ),
    scales: Grid | None = shared.grid_option(
        None, "Scales that every method tries; default: each method's own."
    ),
) -> None:
    """Run merging methods on the same task vectors and print their scores, absolute and normalised.

    Each method of task vectors is added to the base times the number that has the best mean normalised score on
    the held-out images (see `clipmerge merge --help`). Without --method all methods run that take so many models.

        clipmerge leaderboard base.safetensors cars.safetensors dtd.safetensors \\
          --val cars/val --val dtd/val --test cars/test --test dtd/test
    """
    for option, given in (("--val", val), ("--test", test)):
        if given is not None and len(given) != len(finetuned):
            message = f"one {option} for each task: {len(finetuned)}, not {len(given)}"
            raise typer.BadParameter(message, param_hint=option)
    from clipmerge.search.leaderboard import leaderboard as run

    start, *tuned = load_models(base, *finetuned)
    tasks = [w.checkpoints[-1].name for w in tuned]
    data = shared.named(val, "--val", tasks)
    tests = shared.named(test or [], "--test", [f"{task}_test" for task in tasks])
    models = dict(zip(data, tuned, strict=True))
    reported = dict(zip(models, tests, strict=True)) if test else None
    roles = {**dict.fromkeys(data, "val"), **dict.fromkeys(tests, "test")}
    with scoring.evaluator({**data, **tests}, talk, role=roles, models=[start, *tuned], as_one=True) as (
        evaluator,
        bars,
    ):
        board = run(start, models, evaluator, method, test=reported, grid=scales, on_progress=bars)
    if not show.is_first():
        return
    if talk.json:
        show.document(board.to_json())
        return
    table = board.table()
    show.table(table.headers, table.rows, title=table.title)


def methods(*, talk: Talk) -> None:
    """List the methods that `clipmerge merge` knows: what they take and give, their options with defaults, the paper.

    In an expression: ties(\\[a - zs, b - zs], density=0.2). In Python: cm.ties(\\[a - zs, b - zs], density=0.2).

    Example: [bold]clipmerge methods[/bold]
    """
    rows = [describe(method) for method in METHODS.values()]
    if talk.json:
        show.document({"kind": "methods", "methods": rows})
        return
    cells = [(m["name"], m["takes"], ", ".join(m["shown"]), m["source"]) for m in rows]
    show.table(("method", "takes → gives", "options", "source"), cells)
    for row in rows:
        talk.say(f"{row['name']}: {row['says']}")
        for name, option in row["options"].items():
            talk.say(f"    {name}: {option['says']}")


def task_vector(*, base: str = shared.BASE, finetuned: str = shared.FINETUNED, out: Output) -> None:
    """Write finetuned minus base as a file of its own.

    The file knows that it is a task vector: expressions use it as one, and nothing takes it for a model.

        clipmerge task-vector zs.safetensors cars.safetensors -o cars.tv.safetensors
        clipmerge merge "zs + 0.4*cars" \\
          zs=zs.safetensors cars=cars.tv.safetensors -o added.safetensors
    """
    start, end = load_models(base, finetuned, resize=out.resize_positions)
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
    source = as_checkpoint(weights)
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
        talk.say(f"left out, as {to} has no place for them: {and_more(dropped)}")
    talk.say(f"{source.layout} → {to}, {len(source.tensors)} tensors")
    if said is None:
        talk.say(UNKNOWN_MODEL)
    talk.say(f"wrote {show.short(path)}")
