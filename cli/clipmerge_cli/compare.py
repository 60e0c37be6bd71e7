"""`clipmerge compare`: how far apart two checkpoints are, and in which parts."""

from typing import TYPE_CHECKING

from clipmerge_cli import show
from clipmerge_cli.groups import arg, opt
from clipmerge_cli.options import Talk

if TYPE_CHECKING:
    from clipmerge.weights.look import Distance


def compare(
    *,
    a: str = arg("A", "A checkpoint."),
    b: str = arg("B", "Another of the same model."),
    talk: Talk,
    base: str | None = opt(
        None, "What both were finetuned from: adds task vectors' cosines.", metavar="CKPT"
    ),
) -> None:
    """How far apart two checkpoints are, by tower and block.

    The distance is the norm of A - B divided by the norm of A. With --base also the norms of the task vectors
    A - base and B - base, and the cosine between them.

    \b
    clipmerge compare cars.safetensors dtd.safetensors --base zs.safetensors
    """
    from clipmerge.weights.look import compare as compare_weights
    from clipmerge.weights.weights import load

    with talk.progress() as on_progress:
        comparison = compare_weights(
            load(a, "a"), load(b, "b"), load(base, "base") if base else None, on_progress=on_progress
        )
    if talk.json:
        show.document({**comparison.to_json(), "a": a, "b": b, "base": base})
        return
    columns = ["part", "tensors", "parameters", "distance", "largest"]
    rows = [_row(part, base is not None) for part in (*comparison.parts, comparison.whole)]
    show.table([*columns, *(("|A - base|", "|B - base|", "cosine") if base else ())], rows)
    differing, total = len(comparison.differing), comparison.whole.tensors
    print(f"{differing} of {total} float tensors differ" if differing else "every float tensor is equal")


def _row(part: "Distance", has_base: bool) -> list[object]:
    where = "all" if part.tower is None else show.part(part.tower, part.block)
    row: list[object] = [where, part.tensors, f"{part.parameters:,}", part.relative, part.largest]
    return [*row, part.vector_a, part.vector_b, part.cosine] if has_base else row
