"""`clipmerge negate`: forgetting by negation."""

from typing import TYPE_CHECKING, Annotated

import typer

from clipmerge_cli.groups import opt
from clipmerge_cli.options import INPUT, SEARCH, Base, Refine, Scale, Scales, numbers, scale_of
from clipmerge_cli.scoring import Choosing, choose
from clipmerge_cli.writing import Output, load_models

if TYPE_CHECKING:
    from clipmerge.weights.coefficient import Scalar
    from clipmerge.weights.weights import Weights


def negate(
    base: Base,
    finetuned: Annotated[
        str, typer.Argument(metavar="FINETUNED", help="Finetuned on what to forget, or its task vector.")
    ],
    out: Output,
    choosing: Choosing,
    scale: Scale = "0.5",
    target: Annotated[str | None, opt("With auto: what to forget.", INPUT, metavar="DATA")] = None,
    control: Annotated[str | None, opt("With auto: what to keep.", INPUT, metavar="DATA")] = None,
    keep: Annotated[float, opt("Share of the base's control score to keep.", SEARCH, min=0, max=1)] = 0.95,
    scales: Scales = "0:1:0.05",
    refine: Refine = False,
) -> None:
    """Make the base worse at a task and leave the rest alone: base - scale * (finetuned - base).

    With --scale auto the scale is the largest one whose score on the control images stays at or above the
    share --keep of the base's.

    \b
    clipmerge negate base.safetensors cars.safetensors --scale 0.6 \\
        -o no-cars.safetensors
    clipmerge negate base.safetensors cars.safetensors --scale auto \\
        --target cars/val --control images/val -o no-cars.safetensors
    """
    from clipmerge.search.rules import keep_control

    value, grid = scale_of(scale), numbers(scales, "--scales")
    if value is not None and (target or control):
        raise typer.BadParameter("--target and --control are for --scale auto", param_hint="--scale")
    if value is None and not (target and control):
        raise typer.BadParameter("--scale auto needs --target and --control", param_hint="--target")
    start, tuned = load_models(base, finetuned)

    def at(scale: "Scalar") -> "Weights":
        return start - scale * (tuned - start)

    splits = {"target": target or "", "control": control or ""}
    rule = keep_control(keep)
    choose("negate", [start, tuned], at, value, grid, splits, choosing, out, rule=rule, refine=refine)
