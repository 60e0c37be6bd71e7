"""`clipmerge compare`: how far apart two checkpoints are, and in which parts."""

from typing import TYPE_CHECKING, Annotated

import typer

from clipmerge_cli.options import Json, Quiet

if TYPE_CHECKING:
    from clipmerge.weights.compare import Comparison, Distance


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="Another of the same model.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="CKPT", help="What both were finetuned from: adds task vectors' cosines."
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """How far apart two checkpoints are, by tower and block.

    The distance is the norm of A - B divided by the norm of A. With --base also the norms of the task vectors
    A - base and B - base, and the cosine between them.

    \b
    clipmerge compare cars.safetensors dtd.safetensors --base zs.safetensors
    """
    from clipmerge.weights.compare import compare as measure
    from clipmerge.weights.weights import load
    from clipmerge_cli.progress import progress
    from clipmerge_cli.show import document, table

    with progress(quiet=quiet or json) as on_progress:
        found = measure(
            load(a, "a"), load(b, "b"), load(base, "base") if base else None, on_progress=on_progress
        )
    if json:
        document({**found.to_json(), "a": a, "b": b, "base": base})
        return
    columns = ["part", "tensors", "parameters", "distance", "largest"]
    rows = [_row(part, base is not None) for part in (*found.parts, found.whole)]
    table([*columns, *(("|A - base|", "|B - base|", "cosine") if base else ())], rows)
    print(_verdict(found))


def _row(part: "Distance", has_base: bool) -> list[object]:
    where = "all" if part.tower is None else part.tower
    where += "" if part.block is None else f".block[{part.block}]"
    row: list[object] = [where, part.tensors, f"{part.parameters:,}", part.relative, part.largest]
    return [*row, part.vector_a, part.vector_b, part.cosine] if has_base else row


def _verdict(found: "Comparison") -> str:
    if not found.differing:
        return "every float tensor is equal"
    return f"{len(found.differing)} of {found.whole.tensors} float tensors differ"
