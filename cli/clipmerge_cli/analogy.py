"""`clipmerge analogy`: a model for what is not there, from three that are."""

from typing import TYPE_CHECKING, Annotated

import typer

from clipmerge_cli.groups import opt
from clipmerge_cli.options import INPUT, Base, Refine, Scale, Scales, numbers, scale_of
from clipmerge_cli.scoring import Choosing, choose
from clipmerge_cli.writing import Output, load_models

if TYPE_CHECKING:
    from clipmerge.weights.coefficient import Scalar
    from clipmerge.weights.weights import Weights


def analogy(
    base: Base,
    a: Annotated[str, opt("A of: A is to B as C is to the result.", metavar="A")],
    b: Annotated[str, opt("B of: A is to B as C is to the result.", metavar="B")],
    c: Annotated[str, opt("C of: A is to B as C is to the result.", metavar="C")],
    out: Output,
    choosing: Choosing,
    scale: Scale = "1.0",
    val: Annotated[str | None, opt("With auto: held-out images.", INPUT, metavar="DATA")] = None,
    scales: Scales = "0:1:0.05",
    refine: Refine = False,
) -> None:
    """A is to B as C is to the result: base + scale * (C + B - A), all as task vectors.

    \b
    clipmerge analogy base.safetensors --a photo-dogs.safetensors \\
        --b photo-lions.safetensors --c sketch-dogs.safetensors \\
        -o sketch-lions.safetensors
    clipmerge analogy base.safetensors --a A --b B --c C --scale auto \\
        --val images/val -o out.safetensors
    """
    from clipmerge.search.rules import mean_of

    value, grid = scale_of(scale), numbers(scales, "--scales")
    if value is not None and val:
        raise typer.BadParameter("--val is for --scale auto", param_hint="--val")
    if value is None and not val:
        raise typer.BadParameter("--scale auto needs held-out images: --val DATA", param_hint="--val")
    models = load_models(base, a, b, c)
    start, first, second, third = models

    def at(scale: "Scalar") -> "Weights":
        return start + scale * ((third - start) + (second - start) - (first - start))

    splits, rule = {"val": val or ""}, mean_of(["val"])
    choose("analogy", models, at, value, grid, splits, choosing, out, rule=rule, refine=refine)
