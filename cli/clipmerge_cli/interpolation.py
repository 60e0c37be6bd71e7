"""`clipmerge interpolate` and `patch`: between a base and finetuned checkpoints."""

from typing import TYPE_CHECKING, Any, Literal

import typer

from clipmerge_cli.groups import arg, opt
from clipmerge_cli.options import BASE, FINETUNED, INPUT, REFINE, SEARCH, Several, named, numbered, numbers
from clipmerge_cli.scoring import Choosing, choose
from clipmerge_cli.writing import Output, load_models

if TYPE_CHECKING:
    from clipmerge.evaluate.evaluator import Evaluator
    from clipmerge.search.results import SweepResult
    from clipmerge.search.rules import Rule
    from clipmerge.types import Progress
    from clipmerge.weights.coefficient import Scalar
    from clipmerge.weights.weights import Weights

RuleName = Literal["best-mean", "best-id"]
Mode = Literal["single", "sequential", "joint", "parallel"]


def interpolate(
    *,
    base: str = BASE,
    finetuned: str = FINETUNED,
    out: Output,
    choosing: Choosing,
    alpha: float | None = opt(None, "0 is BASE, 1 is FINETUNED; default 0.5 without --eval."),
    alphas: str | None = opt(
        None, "Alphas to try, as START:STOP:STEP or a list; default 0:1:0.1.", SEARCH, metavar="GRID"
    ),
    eval: list[str] | None = opt(
        None,
        "Images to score on; `id` (or the first) is in-distribution, the others are shifts.",
        INPUT,
        metavar="NAME=DATA",
    ),
    rule: RuleName | None = opt(
        None, "What chooses: the best mean of id and shifts, or the best id.", SEARCH
    ),
    refine: bool = REFINE,
) -> None:
    """Interpolate between a base and a finetuned checkpoint (WiSE-FT): (1 - alpha) base + alpha finetuned.

    With --alphas and --eval every alpha is scored, the curve is shown, and the alpha that the rule chooses is
    written. Without images to score on, alpha is 0.5.

    \b
    clipmerge interpolate base.safetensors ft.safetensors --alpha 0.5 \\
        -o out.safetensors
    clipmerge interpolate base.safetensors ft.safetensors --alphas 0:1:0.1 \\
        --eval id=images/val --eval shift=sketches/val \\
        --plot curve.png -o out.safetensors
    """
    from clipmerge.weights.weights import interpolate as between

    if alpha is not None and (alphas or eval):
        raise typer.BadParameter("give --alpha, or --alphas with --eval", param_hint="--alpha")
    if alphas and not eval:
        raise typer.BadParameter("a choice needs images: --eval NAME=DATA", param_hint="--eval")
    splits = named(eval or [], "--eval", ["id", *numbered("shift", len(eval or []))])
    chosen_by = _rule(rule, list(splits)) if eval else None
    value = None if eval else 0.5 if alpha is None else alpha
    grid = numbers(alphas or "0:1:0.1", "--alphas")
    start, end = load_models(base, finetuned)

    def at(alpha: "Scalar") -> "Weights":
        return between(start, end, alpha)

    beyond = alpha is not None and not 0 <= alpha <= 1
    remark = f"alpha {alpha:g} lies beyond the two models: this extrapolates" if beyond else None
    options: dict[str, Any] = {"rule": chosen_by, "refine": refine, "remark": remark}
    choose("interpolate", [start, end], at, value, grid, splits, choosing, out, **options)


def _rule(name: RuleName | None, splits: list[str]) -> "Rule":
    from clipmerge.search.rules import best_id, best_mean

    id = "id" if "id" in splits else splits[0]
    shifts = [split for split in splits if split != id]
    if name == "best-mean" and not shifts:
        raise typer.BadParameter("best-mean needs a shift: a second --eval NAME=DATA", param_hint="--rule")
    return best_id(id) if name == "best-id" or not shifts else best_mean(id, shifts)


def patch(
    *,
    base: str = BASE,
    finetuned: list[str] = arg("FINETUNED...", "Finetuned on the patching task, or one per task."),
    patching: list[str] = opt(..., "A task to learn; repeat.", INPUT, "--patch", metavar="DATA"),
    supported: list[str] = opt(..., "A task to keep; repeat.", INPUT, metavar="DATA"),
    out: Output,
    choosing: Choosing,
    several: Several,
    mode: Mode | None = opt(
        None, "How several tasks are patched; default: by how many models and tasks there are.", SEARCH
    ),
    alphas: str = opt("0:1:0.05", "Alphas to try, as START:STOP:STEP or a list.", SEARCH, metavar="GRID"),
    refine: bool = REFINE,
) -> None:
    """Learn a new task and keep the old ones (PAINT): interpolate towards the finetuned model.

    The alpha chosen has the best mean of held-out score on the supported tasks and on the patching tasks.
    Several tasks: one checkpoint finetuned on all of them (joint), one per task patched in turn (sequential: each
    should have been finetuned from the model patched before it), or all coefficients searched together (parallel).

    \b
    clipmerge patch base.safetensors cars.safetensors --patch cars/val \\
        --supported images/val -o out.safetensors
    clipmerge patch base.safetensors cars.safetensors dtd.safetensors \\
        --mode sequential --patch cars/val --patch dtd/val \\
        --supported images/val -o out.safetensors
    """
    from clipmerge.weights.weights import interpolate

    usual: Mode = "sequential" if len(finetuned) > 1 else "joint" if len(patching) > 1 else "single"
    grid = numbers(alphas, "--alphas")
    roles = [*numbered("supported", len(supported)), *numbered("patch", len(patching))]
    splits = named([*supported, *patching], "--patch", roles)
    start, *tuned = load_models(base, *finetuned)

    def at(alpha: "Scalar") -> "Weights":
        return interpolate(start, tuned[0], alpha)

    def search(evaluator: "Evaluator", on_progress: "Progress | None") -> "SweepResult":
        from clipmerge.search.patch import patch as patch_models

        old, new = list(splits)[: len(supported)], list(splits)[len(supported) :]
        options: dict[str, Any] = {"mode": mode or usual, "grid": grid, "refine": refine, **vars(several)}
        options |= {"patching": new, "supported": old, "on_progress": on_progress}
        return patch_models(start, tuned, evaluator, **options)

    choose("patch", [start, *tuned], at, None, grid, splits, choosing, out, search=search)
