"""`clipmerge task-vector`: what finetuning changed, as a file of its own."""

from typing import Annotated

import typer

from clipmerge_cli.options import Base
from clipmerge_cli.writing import Output


def task_vector(
    base: Base,
    finetuned: Annotated[str, typer.Argument(metavar="FINETUNED", help="The model after finetuning.")],
    out: Output,
) -> None:
    """Write finetuned minus base as a file of its own.

    The file knows that it is a task vector: expressions use it as one, and nothing takes it for a model.

    \b
    clipmerge task-vector zs.safetensors cars.safetensors -o cars.tv.safetensors
    clipmerge merge "zs + 0.4*cars" \\
        zs=zs.safetensors cars=cars.tv.safetensors -o added.safetensors
    """
    from clipmerge.weights.weights import load_all

    start, end = load_all([base, finetuned])
    out.merge(end - start)
