"""`clipmerge interpolate`: between two checkpoints, at one place or along a curve."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clipmerge_cli.groups import opt
from clipmerge_cli.options import INPUT, SEARCH, Base, Refine, named, numbers
from clipmerge_cli.scoring import Choosing, choose
from clipmerge_cli.writing import Output, load_models

if TYPE_CHECKING:
    from clipmerge.search.rules import Rule
    from clipmerge.weights.coefficient import Scalar
    from clipmerge.weights.weights import Weights

RuleName = Literal["best-mean", "best-id"]


def interpolate(
    base: Base,
    finetuned: Annotated[str, typer.Argument(metavar="FINETUNED", help="The model after finetuning.")],
    out: Output,
    choosing: Choosing,
    alpha: Annotated[float | None, opt("0 is BASE, 1 is FINETUNED; default 0.5 without --eval.")] = None,
    alphas: Annotated[
        str | None,
        opt("Alphas to try, as START:STOP:STEP or a list; default 0:1:0.1.", SEARCH, metavar="GRID"),
    ] = None,
    eval: Annotated[
        list[str] | None,
        opt(
            "Images to score on; `id` (or the first) is in-distribution, the others are shifts.",
            INPUT,
            metavar="NAME=DATA",
        ),
    ] = None,
    rule: Annotated[
        RuleName | None, opt("What chooses: the best mean of id and shifts, or the best id.", SEARCH)
    ] = None,
    refine: Refine = False,
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
    if rule == "best-mean" and len(eval or []) == 1:
        raise typer.BadParameter("best-mean needs a shift: a second --eval NAME=DATA", param_hint="--rule")
    splits = named(eval or [], "--eval", ["id", *(f"shift{i}" for i in range(1, len(eval or [])))])
    grid = numbers(alphas or "0:1:0.1", "--alphas")
    value = None if eval else 0.5 if alpha is None else alpha
    start, end = load_models(base, finetuned)

    def at(alpha: "Scalar") -> "Weights":
        return between(start, end, alpha)

    chosen_by = _rule(rule, list(splits)) if eval else None
    beyond = alpha is not None and not 0 <= alpha <= 1
    remark = f"alpha {alpha:g} lies beyond the two models: this extrapolates" if beyond else None
    options: dict[str, Any] = {"rule": chosen_by, "refine": refine, "remark": remark}
    choose("interpolate", [start, end], at, value, grid, splits, choosing, out, **options)


def _rule(name: RuleName | None, splits: list[str]) -> "Rule":
    from clipmerge.search.rules import best_id, best_mean

    id = "id" if "id" in splits else splits[0]
    shifts = [split for split in splits if split != id]
    return best_id(id) if name == "best-id" or not shifts else best_mean(id, shifts)
