"""Settings and data that mean nothing together, refused before anything is read."""

from typing import TYPE_CHECKING

from clipmerge.errors import DataError, TrainingError

if TYPE_CHECKING:
    from clipmerge.data.split import Split
    from clipmerge.finetuning.methods import Method

__all__ = ["refuse_misfits"]


def refuse_misfits(
    name: str,
    method: "Method",
    train: "Split",
    val: "Split | None",
    *,
    towers: str,
    mixup: float,
    chunk: int | None,
    multi_positive: bool,
    epochs: float | None,
    steps: int | None,
    batch_size: int,
    accumulate: int,
    ema: float | None,
    select: str | None,
) -> None:
    """Raise on the first thing that does not fit.

    Raises:
        TrainingError: settings that contradict each other. DataError: images without what the method needs.
    """
    headless = method.head is None
    rules = [
        (towers not in ("both", "image", "text"), f"there is no tower {towers!r}", "both, image or text"),
        (not headless and towers == "text", f"{name} trains a head over images, not the text tower",
         "--towers text goes with --method flyp"),
        (headless and mixup > 0, f"{name} has no label to mix", "mixup goes with ce, car-ft and lp-ft"),
        (not headless and chunk is not None, f"{name} has no contrastive batch to cut into pieces",
         "use --accumulate: it is exact for this loss"),
        (not headless and multi_positive, f"{name} has no contrastive targets", "it goes with --method flyp"),
        (epochs is not None and steps is not None, "both epochs and steps are given", "give one of them"),
        (min(batch_size, accumulate, chunk or 1) < 1, "batches need one image at least", "give a positive number"),
        (select == "best" and val is None, "nothing says which checkpoint is best", "give held-out images with --val"),
        (ema is not None and not 0 < ema < 1, f"a moving average cannot decay by {ema}", "a number such as 0.999"),
    ]  # fmt: skip
    for broken, message, hint in rules:
        if broken:
            raise TrainingError(message, hint=hint)
    _refuse_data(name, headless, train, val)


def _refuse_data(name: str, headless: bool, train: "Split", val: "Split | None") -> None:
    if not len(train):
        raise DataError(f"{train.source} has no images", hint="check the part and the limit")
    labelled = bool(train.classes) and bool((train.labels >= 0).all())
    if not labelled and not (headless and train.captions is not None and not train.classes):
        raise DataError(
            f"{train.source} has images without a label", hint=f"{name} needs a class for each image"
        )
    if val is None:
        return
    if not len(val) or not val.classes or bool((val.labels < 0).any()):
        raise DataError(
            f"{val.source} cannot score: it has no labelled images", hint="name another held-out split"
        )
    if not headless and val.classes != train.classes:
        raise DataError(
            f"{val.source} has other classes than {train.source}",
            hint="a trained head scores the classes that it was trained on, in their order",
        )
