"""The commands that choose on held-out images: soup, interpolate, patch, add, negate."""

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import typer

import clipmerge
from clipmerge_cli import options as shared
from clipmerge_cli.groups import arg, opt, refuse_unused
from clipmerge_cli.options import INPUT, SEARCH, Grid, Several
from clipmerge_cli.scoring import Choosing, Search, choose, run_search
from clipmerge_cli.writing import Output, load_models, refuse_mixture, without_statistics

if TYPE_CHECKING:
    from clipmerge.search.results import SoupResult, SweepResult
    from clipmerge.search.rules import Rule
    from clipmerge.types import Progress
    from clipmerge.weights.weights import Weights

Mode = Literal["single", "sequential", "joint", "parallel"]
_KIND = "Kind of soup"


def soup(
    *,
    checkpoints: list[str] = shared.CHECKPOINTS,
    base: str | None = shared.UNDER,
    vectors: bool = shared.VECTORS,
    greedy: bool = opt(False, "Keep what helps on held-out images.", _KIND),
    learned: bool = opt(False, "Learn coefficients on held-out images.", _KIND),
    ensemble: bool = opt(False, "The greedy ensemble of logits, as a yardstick.", _KIND),
    val: str | None = opt(None, "Held-out images.", INPUT, metavar="DATA"),
    out: Output,
    choosing: Choosing,
    strict: bool = opt(False, "Keep only what raises the score.", SEARCH),
    order: Literal["score", "given", "random"] = opt("score", "Order in which candidates are tried.", SEARCH),
    per: Literal["model", "tower", "block", "tensor"] = opt(
        "model", "Learned: one share per model, or per part of it.", SEARCH
    ),
    epochs: int = opt(5, "Learned: passes over the images.", SEARCH, min=1),
    lr: float = opt(0.05, "Learned: AdamW's learning rate.", SEARCH),
    seed: int = shared.SEED,
) -> None:
    """Average checkpoints into one: all of them (uniform), or those that help on held-out images.

    A greedy soup ranks the checkpoints on the held-out images and adds each in turn to the mean, keeping it
    if the score does not fall. Scores are remembered: a search that was stopped goes on where it was.

        clipmerge soup ckpts/*.safetensors -o soup.safetensors
        clipmerge soup ckpts/*.safetensors --greedy --val images/val \\
          --model ViT-B-32 -o soup.safetensors
        torchrun --nproc-per-node 8 -m clipmerge soup ckpts/*.safetensors \\
          --greedy --val images/val --device cuda --precision bf16 -o soup.safetensors
    """
    kinds = {"greedy": greedy, "learned": learned, "ensemble": ensemble}
    chosen = [name for name, wanted in kinds.items() if wanted]
    if len(chosen) > 1:
        raise typer.BadParameter(f"choose one of --{' and --'.join(chosen)}", param_hint=f"--{chosen[1]}")
    kind = chosen[0] if chosen else "uniform"
    if kind != "uniform" and val is None:
        raise typer.BadParameter("a choice needs held-out images: --val DATA", param_hint="--val")
    if kind == "ensemble" and out.output is not None:
        raise typer.BadParameter("an ensemble is many models, not a file", param_hint="--output")
    if val is None:
        refuse_unused("without --val: a uniform soup is not scored", Choosing, but=("model",))
    if kind == "uniform":
        refuse_unused("without --greedy: there is one soup, and no picture of it", "plot")
    if kind not in ("greedy", "ensemble"):
        refuse_unused("without --greedy", "strict", "order")
    if kind != "learned":
        refuse_unused("without --learned", "per", "epochs", "lr")
        if order != "random":
            refuse_unused("without --order random", "seed")
    out.check_usage(needed=kind == "uniform")

    checkpoints = without_statistics(checkpoints, out)
    if base is None:
        weights = clipmerge.load_all(checkpoints, vectors=vectors)
        if out.resize_positions:
            weights = [clipmerge.resize_positions(w, weights[0]) for w in weights]
    else:
        _, *weights = load_models(base, *checkpoints, vectors=vectors, resize=out.resize_positions)
    refuse_mixture(weights)
    if out.dry_run or val is None:
        remark = f"uniform soup: the mean of {len(weights)} checkpoints"
        if len(weights) == 1:
            remark = "uniform soup of one checkpoint: a copy of it"
        if kind != "uniform":
            remark = f"a {kind} soup chooses among these; the plan shows the mean of all of them"
        document = clipmerge.uniform_soup(weights).to_json() if out.json else None
        out.merge(clipmerge.mean(weights), model=choosing.model, document=document, remark=remark)
        return

    search: Search
    if kind == "uniform":
        search = lambda evaluator, on_progress: clipmerge.uniform_soup(weights, evaluator)  # noqa: E731
    elif kind == "learned":
        batch_size = choosing.batch_size or 256
        search = partial(
            clipmerge.learned_soup, weights, per=per, epochs=epochs, lr=lr, batch_size=batch_size, seed=seed
        )
    else:
        greedily = clipmerge.greedy_ensemble if kind == "ensemble" else clipmerge.greedy_soup
        search = partial(greedily, weights, order=order, strict=strict, seed=seed)
    run_search(search, {"val": val}, weights, choosing, out)


def interpolate(
    *,
    base: str = shared.BASE,
    finetuned: str = shared.FINETUNED,
    vectors: bool = shared.VECTORS,
    out: Output,
    choosing: Choosing,
    alpha: float | None = opt(None, "0 is BASE, 1 is FINETUNED; default 0.5 without --eval."),
    alphas: Grid | None = shared.grid_option(
        None, "Alphas to try, as START:STOP:STEP or a list; default 0:1:0.1."
    ),
    eval: list[str] | None = opt(
        None, "Images: `id` (or the first) is in-distribution, others are shifts.", INPUT, metavar="NAME=DATA"
    ),
    rule: str | None = opt(
        None, "What chooses: best-mean (of id and shifts), best-id, or within:POINTS.", SEARCH, metavar="RULE"
    ),
    refine: bool = shared.REFINE,
) -> None:
    """Interpolate between a base and a finetuned checkpoint (WiSE-FT): (1 - alpha) base + alpha finetuned.

    With --alphas and --eval every alpha is scored, the curve is shown, and the alpha that the rule chooses is
    written. Without images to score on, alpha is 0.5. Where only FINETUNED has a trained head, BASE gets the zero-shot
    head of its own text tower, for the classes and prompts that FINETUNED records.

    Which --rule? best-mean (the default where there is a shift) when images of the shifts that matter can be scored.
    within:1 when they cannot: the smallest alpha whose score on id is within 1 point of the best; on 18 published
    curves it loses 0.5 points on the shifts and 0.6 on id, where best-id loses 1.7 and 0. best-id when only id counts.

        clipmerge interpolate base.safetensors ft.safetensors --alpha 0.5 \\
          -o out.safetensors
        clipmerge interpolate base.safetensors ft.safetensors --alphas 0:1:0.1 \\
          --eval id=images/val --eval shift=sketches/val \\
          --plot curve.png -o out.safetensors
    """
    if alpha is not None and (alphas or eval):
        raise typer.BadParameter("give --alpha, or --alphas with --eval", param_hint="--alpha")
    if alphas and not eval:
        raise typer.BadParameter("a choice needs images: --eval NAME=DATA", param_hint="--eval")
    splits = shared.named(eval or [], "--eval", ["id", *shared.numbered("shift", len(eval or []))])
    by = _rule(rule, list(splits)) if eval else None
    value = None if eval else 0.5 if alpha is None else alpha
    grid = alphas or shared.numbers("0:1:0.1")
    start, end = load_models(base, finetuned, vectors=vectors, resize=out.resize_positions)
    start = _with_head(start, end, choosing, out)

    beyond = alpha is not None and not 0 <= alpha <= 1
    remark = f"alpha {alpha:g} lies beyond the two models: this extrapolates" if beyond else None
    models, vector = [start, end], end - start
    choose(
        "interpolate",
        models,
        vector,
        value,
        grid,
        splits,
        choosing,
        out,
        rule=by,
        refine=refine,
        remark=remark,
    )


def _with_head(base: "Weights", tuned: "Weights", choosing: Choosing, out: Output) -> "Weights":
    """Give a base that has no head its zero-shot head where the finetuned model has a trained one, and say so."""
    trained = "classification_head.weight"
    if trained in base.names or trained not in tuned.names:
        return base
    headed, recipe = clipmerge.with_zero_shot_head(base, tuned, choosing.model)
    templates = recipe["templates"]
    prompts = repr(templates[0]) if len(templates) == 1 else f"{len(templates)} templates"
    out.say(
        f"{base!r} has no head: its zero-shot head is built from its own text tower, with the {len(recipe['classes'])} "
        f"classes and the prompts ({prompts}) that {tuned!r} records"
    )
    return headed


def _rule(name: str | None, splits: list[str]) -> "Rule":
    id = "id" if "id" in splits else splits[0]
    shifts = [split for split in splits if split != id]
    kind, colon, points = (name or ("best-mean" if shifts else "best-id")).partition(":")
    if kind == "best-mean" and not shifts:
        raise typer.BadParameter("best-mean needs a shift: a second --eval NAME=DATA", param_hint="--rule")
    if kind == "within":
        return clipmerge.within(shared.one_number(points, "--rule") if colon else 1, id)
    if colon or kind not in ("best-mean", "best-id"):
        message = f"{name!r} is neither best-mean, best-id nor within:POINTS, such as within:1"
        raise typer.BadParameter(message, param_hint="--rule")
    return clipmerge.best_id(id) if kind == "best-id" else clipmerge.best_mean(id, shifts)


def patch(
    *,
    base: str = shared.BASE,
    finetuned: list[str] = arg("FINETUNED...", "Finetuned on the patching task, or one per task."),
    patching: list[str] = opt(..., "A task to learn; repeat.", INPUT, "--patch", metavar="DATA"),
    supported: list[str] = opt(..., "A task to keep; repeat.", INPUT, metavar="DATA"),
    out: Output,
    choosing: Choosing,
    several: Several,
    vectors: bool = shared.VECTORS,
    mode: Mode | None = opt(None, "How several tasks are patched; default: by their number.", SEARCH),
    keep: float | None = opt(
        None,
        "Points of score that the supported tasks may lose against BASE at most.",
        SEARCH,
        min=0,
        max=100,
    ),
    alphas: Grid = shared.grid_option("0:1:0.05", "Alphas to try, as START:STOP:STEP or a list."),
    refine: bool = shared.REFINE,
) -> None:
    """Learn a new task and keep the old ones (PAINT): interpolate towards the finetuned model.

    The alpha chosen has the best mean of held-out score on the supported tasks and on the patching tasks.
    Several tasks: one checkpoint finetuned on all of them (joint), one per task patched in turn (sequential: each
    should have been finetuned from the model patched before it), or all coefficients searched together (parallel).
    The paper's sequential way is patch, finetune --base patched.safetensors on the next task, and patch again with
    the tasks patched so far: the last line below.

        clipmerge patch base.safetensors cars.safetensors --patch cars/val \\
          --supported images/val -o out.safetensors
        clipmerge patch base.safetensors cars.safetensors dtd.safetensors \\
          --mode sequential --patch cars/val --patch dtd/val \\
          --supported images/val -o out.safetensors
        clipmerge patch patched.safetensors dtd-from-patched.safetensors \\
          --patch cars/val --patch dtd/val --supported images/val -o out.safetensors
    """
    usual: Mode = "sequential" if len(finetuned) > 1 else "joint" if len(patching) > 1 else "single"
    if (mode or usual) == "parallel":
        refuse_unused("with --mode parallel, which searches freely", "alphas", "refine")
    else:
        refuse_unused("without --mode parallel", Several)
    roles = [*shared.numbered("supported", len(supported)), *shared.numbered("patch", len(patching))]
    splits = shared.named([*supported, *patching], "--patch", roles)
    start, *tuned = load_models(base, *finetuned, vectors=vectors, resize=out.resize_positions)

    old, new = list(splits)[: len(supported)], list(splits)[len(supported) :]
    how: dict[str, Any] = {
        "mode": mode or usual,
        "keep": keep,
        "grid": alphas,
        "refine": refine,
        **vars(several),
    }
    search = partial(clipmerge.patch, start, tuned, patching=new, supported=old, **how)
    choose("patch", [start, *tuned], tuned[0] - start, None, alphas, splits, choosing, out, search=search)


def add(
    *,
    base: str = shared.BASE,
    finetuned: list[str] = arg("FINETUNED...", "One checkpoint, or task-vector file, per task."),
    origin: str | None = shared.ORIGIN,
    vectors: bool = shared.VECTORS,
    out: Output,
    choosing: Choosing,
    several: Several,
    scale: float | None = shared.scale_option("0.4"),
    val: list[str] | None = opt(None, "With auto: each task's images, in order.", INPUT, metavar="DATA"),
    scales: Grid = shared.SCALES,
    adamerging: bool = opt(False, "Learn the scales on the images, without their labels.", SEARCH),
    per: Literal["all", "task", "tower", "block", "tensor"] = opt(
        "all", "What has its own scale, where scales are chosen or learned.", SEARCH
    ),
    steps: int = opt(500, "AdaMerging: steps of Adam.", SEARCH, min=1),
    lr: float = opt(1e-3, "AdaMerging: Adam's learning rate.", SEARCH),
    refine: bool = shared.REFINE,
) -> None:
    """Add what finetuned checkpoints learned to their base: base + scale * sum of (finetuned - base).

    With --scale auto the scale is the one with the best mean, over tasks, of held-out score divided by the
    score of that task's own checkpoint; equal means take the smaller scale.

        clipmerge add base.safetensors cars.safetensors dtd.safetensors \\
          --scale 0.4 -o both.safetensors
        clipmerge add base.safetensors cars.safetensors dtd.safetensors --scale auto \\
          --val cars/val --val dtd/val -o both.safetensors
        clipmerge add base.safetensors cars.safetensors dtd.safetensors --adamerging \\
          --per tensor --val cars/val --val dtd/val -o both.safetensors
        clipmerge add vit-b-32.safetensors cars_encoder.pt \\
          --base zeroshot_encoder.pt \\
          -o added.safetensors
    """
    if adamerging:
        refuse_unused(
            "with --adamerging, which learns the scales", "scale", "scales", "refine", "method", "budget"
        )
        scale = None
    else:
        refuse_unused("without --adamerging", "steps", "lr")
        if per == "tensor":
            raise typer.BadParameter("one scale a tensor is learned: --adamerging", param_hint="--per")
    how = "--adamerging" if adamerging else "--scale auto"
    shared.check_images(len(val or []), automatic=scale is None, tasks=len(finetuned), how=how)
    if refine and per != "all":
        raise typer.BadParameter("--refine is for one scale", param_hint="--refine")
    if scale is None and per == "all" and not adamerging:
        refuse_unused("without --per task, tower or block", Several)
    start, *tuned = load_models(base, *finetuned, origin=origin, vectors=vectors, resize=out.resize_positions)
    splits = shared.named(val or [], "--val", [w.checkpoints[-1].name for w in tuned])
    vector = sum((w - start for w in tuned[1:]), tuned[0] - start)

    def search(
        evaluator: "clipmerge.Evaluator", *, on_progress: "Progress | None"
    ) -> "SweepResult | SoupResult":
        from clipmerge.search.coefficients import search_coefficients, task_family
        from clipmerge.search.sweep import reference_scores, sweep_scale

        models = dict(zip(splits, tuned, strict=True))
        if adamerging:
            groups: Any = "model" if per in ("all", "task") else per
            learn = partial(clipmerge.adamerging, start, models, evaluator, per=groups, steps=steps, lr=lr)
            return learn(batch_size=choosing.batch_size or 16, seed=several.seed, on_progress=on_progress)
        if per == "all":
            sums = partial(sweep_scale, lambda x: start + x * vector, models, evaluator)
            return sums(grid=scales, refine=refine, on_progress=on_progress)
        rule = clipmerge.normalised_mean(reference_scores(models, evaluator))
        assert per != "tensor"  # refused above
        names, family = task_family(start, models, per)
        low, high = min(scales), max(scales)
        share = min(max(1 / len(tuned), low), high)  # each part of a task vector starts at its task's share
        how = {"rule": rule, "low": low, "high": high, "start": share, **vars(several)}
        return search_coefficients(family, names, evaluator, on_progress=on_progress, **how)

    choose("add", [start, *tuned], vector, scale, scales, splits, choosing, out, search=search)


def negate(
    *,
    base: str = shared.BASE,
    finetuned: str = arg("FINETUNED", "Finetuned on what to forget, or its task vector."),
    origin: str | None = shared.ORIGIN,
    vectors: bool = shared.VECTORS,
    out: Output,
    choosing: Choosing,
    scale: float | None = shared.scale_option("0.5"),
    target: str | None = opt(None, "With auto: what to forget.", INPUT, metavar="DATA"),
    control: str | None = opt(None, "With auto: what to keep.", INPUT, metavar="DATA"),
    keep: float = opt(0.95, "Share of the base's control score to keep.", SEARCH, min=0, max=1),
    scales: Grid = shared.SCALES,
    refine: bool = shared.REFINE,
) -> None:
    """Make the base worse at a task and leave the rest alone: base - scale * (finetuned - base).

    With --scale auto the scale is the largest one whose score on the control images stays at or above the
    share --keep of the base's.

        clipmerge negate base.safetensors cars.safetensors --scale 0.6 \\
          -o no-cars.safetensors
        clipmerge negate base.safetensors cars.safetensors --scale auto \\
          --target cars/val --control images/val -o no-cars.safetensors
    """
    if scale is not None and (target or control):
        raise typer.BadParameter("--target and --control are for --scale auto", param_hint="--scale")
    if scale is None and not (target and control):
        raise typer.BadParameter("--scale auto needs --target and --control", param_hint="--target")
    start, tuned = load_models(base, finetuned, origin=origin, vectors=vectors, resize=out.resize_positions)
    splits = {"target": target or "", "control": control or ""}
    models, vector, rule = [start, tuned], start - tuned, clipmerge.keep_control(keep)
    choose("negate", models, vector, scale, scales, splits, choosing, out, rule=rule, refine=refine)
