"""Files of statistics of data: taken once of a checkpoint, kept beside it, and known by its content digest.

`evaluate/statistics.py` takes them; methods find them here, so that merging again needs neither images nor a model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipmerge.checkpoint.open import open_checkpoint
from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.errors import RecipeError
from clipmerge.weights.expression import Expression, Method
from clipmerge.weights.record import read_record

KEY = "statistics"
"""Of a file's record: "method", which needs it; "of", the checkpoint's content digest; and how it was taken.

"together" stands in files that mean something side by side only: the digests of all their checkpoints ("of"), the
"options" that the method must have, and how they were taken.
"""


def statistics_record(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return what a file of statistics says of itself; None for any other file."""
    record = read_record(checkpoint.metadata).get(KEY)
    return record if isinstance(record, dict) else None


def company_of(record: Mapping[str, Any]) -> list[str] | None:
    """Return the digests of all checkpoints that statistics were taken of together, sorted; None: of one alone."""
    together = record.get("together")
    if together is None:
        return None
    digests = together.get("of") if isinstance(together, dict) else None
    return sorted(map(str, digests)) if isinstance(digests, list) else []


def is_statistics(path: str | Path) -> bool:
    """Return whether a file holds statistics, and no model."""
    return Path(path).is_file() and statistics_record(open_checkpoint(path)) is not None


def statistics_path(checkpoint: Path, method: str) -> Path:
    """Return where a checkpoint's statistics are kept: `cars.fisher.safetensors` beside `cars.safetensors`."""
    name = checkpoint.name
    for suffix in (".safetensors", ".bin", ".pth.tar", ".pth", ".pt", ".ckpt"):
        name = name.removesuffix(suffix)
    return checkpoint.with_name(f"{name}.{method}.safetensors")


def statistics_for(
    method: Method, operands: Sequence[Expression], given: Sequence[Expression | str | Path] | None
) -> tuple[Checkpoint, ...]:
    """Return the file of statistics of each operand, given or found beside it; none for methods without them.

    Raises:
        RecipeError: an operand is no checkpoint, a file is missing, or is of another kind.
    """
    if method.statistics is None:
        if given is not None:
            raise RecipeError(f"{method.name} has no use for statistics", hint="leave them out")
        return ()
    if given is not None and len(given) != len(operands):
        raise RecipeError(
            f"{method.name} takes statistics of each of {len(operands)} models, not {len(given)}"
        )
    wanted: Sequence[Expression | str | Path | None] = given or [None] * len(operands)
    files = []
    for operand, each in zip(operands, wanted, strict=True):
        (checkpoint, *more) = operand.checkpoints
        if more or operand.terms.get(checkpoint) is None or operand.terms[checkpoint].constant != 1:
            raise RecipeError(
                f"{method.name} takes checkpoints, whose statistics were taken, not {operand!r}",
                hint="write it to a file first",
            )
        if each is None:
            if checkpoint.path is None:
                raise RecipeError(
                    f"{method.name} needs statistics of {checkpoint.name}", hint="statistics=[…]"
                )
            each = statistics_path(checkpoint.path, method.statistics)
            if not each.is_file():
                raise RecipeError(
                    f"{method.name} needs statistics of {checkpoint.path}, and there is no {each.name} beside it",
                    hint=f"clipmerge statistics --method {method.statistics} CKPT... --data DATA takes them",
                )
        file = each.checkpoints[0] if isinstance(each, Expression) else open_checkpoint(each)
        record = statistics_record(file)
        if record is None or record.get("method") != method.statistics:
            what = "no file of statistics" if record is None else f"statistics for {record.get('method')}"
            raise RecipeError(f"{file.path or file.name} is {what}, which {method.name} needs")
        files.append(file)
    return tuple(files)
