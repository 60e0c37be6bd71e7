"""`clipmerge patch`: PAINT."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clipmerge_cli.groups import opt
from clipmerge_cli.options import INPUT, SEARCH, Alphas, Base, Refine, Several, named, numbered, numbers
from clipmerge_cli.scoring import Choosing, choose
from clipmerge_cli.writing import Output, load_models

if TYPE_CHECKING:
    from clipmerge.evaluate.evaluator import Evaluator
    from clipmerge.types import Progress
    from clipmerge.weights.coefficient import Scalar
    from clipmerge.weights.weights import Weights

Mode = Literal["single", "sequential", "joint", "parallel"]


def patch(
    base: Base,
    finetuned: Annotated[
        list[str],
        typer.Argument(metavar="FINETUNED...", help="Finetuned on the patching task, or one per task."),
    ],
    patching: Annotated[list[str], opt("A task to learn; repeat.", INPUT, "--patch", metavar="DATA")],
    supported: Annotated[list[str], opt("A task to keep; repeat.", INPUT, metavar="DATA")],
    out: Output,
    choosing: Choosing,
    several: Several,
    mode: Annotated[
        Mode | None,
        opt("How several tasks are patched; default: by how many models and tasks there are.", SEARCH),
    ] = None,
    alphas: Alphas = "0:1:0.05",
    refine: Refine = False,
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

    def search(evaluator: "Evaluator", on_progress: "Progress | None") -> Any:
        from clipmerge.search.patch import patch as patch_models

        old, new = list(splits)[: len(supported)], list(splits)[len(supported) :]
        options: dict[str, Any] = {"mode": mode or usual, "grid": grid, "refine": refine, **vars(several)}
        options |= {"patching": new, "supported": old, "on_progress": on_progress}
        return patch_models(start, tuned, evaluator, **options)

    choose("patch", [start, *tuned], at, None, grid, splits, choosing, out, search=search)
