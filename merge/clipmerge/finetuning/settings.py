"""The hyperparameters of `finetune`, each spelled once: default, type, meaning, limits, and whether it is recorded.

The keywords of `finetune`, the options of the command, the record inside a checkpoint and the comparison with a saved
state all follow from these fields. Nothing heavy is imported: the command reads this file to show its help.
"""
# ruff: noqa: RUF009  (`_option` makes a field, whose default is a plain value)

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from clipmerge.errors import TrainingError
from clipmerge.finetuning.table import METHODS, Method, MethodName
from clipmerge.text import did_you_mean

__all__ = ["RECORDED", "Settings"]

METHOD, OPTIMISER, DEVICE, KEEP = "Method", "Optimiser", "Device", "What is kept"
"""Panels of the command's help; a field without a panel is for Python only."""


def _option(
    default: Any,
    panel: str | None,
    help: str,
    *,
    min: float | None = None,
    max: float | None = None,
    recorded: bool = True,
    option: str | None = None,
) -> Any:
    """Declare a hyperparameter.

    Args:
        min, max: limits, both allowed.
        recorded: written into checkpoints and compared on resume; False where it does not change what is computed.
        option: the command's name for it, where that is not the field's.
    """
    metadata = {"panel": panel, "help": help, "min": min, "max": max, "recorded": recorded, "option": option}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to finetune. Each field is a keyword of `finetune`; its meaning is in its metadata, under "help".

    Raises:
        TrainingError: a value that is out of its limits, or no choice.
    """

    method: MethodName = _option("flyp", METHOD, "How to finetune.")
    towers: Literal["both", "image", "text"] = _option(
        "both", METHOD, "Which towers train; text is LiT's locked image tower."
    )
    templates: Sequence[str] | str | None = _option(None, None, "Prompts with {}; the data's own by default.")
    contexts: Sequence[str] | None = _option(None, None, 'CAR-FT\'s contexts ("photo", "sketch" …).')
    shots: int | None = _option(
        None, METHOD, "Train on this many images of each class; the best held-out loss is kept.", min=1
    )
    augment: str | Mapping[str, Any] = _option(
        "crop",
        METHOD,
        "none, or of crop:0.9 flip jitter:0.4 gray:0.2 randaugment:N,M joined by +, or a JSON aug-cfg.",
    )
    mixup: float = _option(0.0, METHOD, "Mix images in pairs, with a share from Beta(a, a).", min=0)
    label_smoothing: float = _option(
        0.0, METHOD, "Share of the target that is spread over all classes.", min=0, max=1
    )
    multi_positive: bool = _option(
        False, METHOD, "Images of one class are positives of each other (not FLYP)."
    )
    logit_scale: Literal["learned", "clamped", "frozen"] = _option(
        "learned", METHOD, "clamped: at most 100; frozen: as in the base."
    )
    car_weight: float = _option(1.0, METHOD, "Weight of CAR-FT's term.", min=0)
    lr: float = _option(1e-5, OPTIMISER, "Peak learning rate.", min=0)
    wd: float = _option(0.1, OPTIMISER, "Weight decay.", min=0)
    decay: Literal["all", "matrices"] = _option(
        "all", OPTIMISER, "What weight decay holds for; matrices: not norms, biases, logit_scale."
    )
    batch_size: int = _option(512, OPTIMISER, "Images of a batch on one device.", min=1)
    accumulate: int = _option(1, OPTIMISER, "Batches whose gradients make a step.", min=1)
    chunk: int | None = _option(
        None,
        OPTIMISER,
        "Gradient caching: hold this many images in memory, with the exact loss over the batch.",
        min=1,
    )
    epochs: float | None = _option(None, OPTIMISER, "Passes over the images; 10 by default.", min=0)
    steps: int | None = _option(None, OPTIMISER, "Steps in all, instead of --epochs.", min=1)
    warmup: int | None = _option(
        None, OPTIMISER, "Steps of warmup; by default 500, a tenth of all at most.", min=0
    )
    clip_grad: float | None = _option(None, OPTIMISER, "Largest norm of the gradient.", min=0)
    ema: float | None = _option(
        None, OPTIMISER, "Decay of a moving average of the weights, which is then scored and written."
    )
    seed: int = _option(0, OPTIMISER, "Seed of everything random.", min=0)
    device: str | None = _option(None, DEVICE, "By default the GPU if there is one.", recorded=False)
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] | None = _option(
        None, DEVICE, "What the towers compute in; by default bf16 autocast on a GPU, else fp32."
    )
    compile: bool = _option(False, DEVICE, "Use torch.compile.", recorded=False)
    checkpointing: bool = _option(False, DEVICE, "Less memory, a third more time.", recorded=False)
    channels_last: bool | None = _option(
        None, None, "Memory layout; by default for convolutional towers on a GPU.", recorded=False
    )
    fsdp: bool = _option(False, DEVICE, "Shard the model over torchrun's processes.", recorded=False)
    workers: int | None = _option(
        None, DEVICE, "Processes that decode and augment; 0: none beside the training.", min=0, recorded=False
    )
    score_every: int | None = _option(
        None, KEEP, "Steps between held-out scores; an epoch by default, 0: only at the end.", min=0
    )
    select: Literal["last", "best"] | None = _option(
        None, KEEP, "The checkpoint to write: the last (with --shots the best), or the best held-out one."
    )
    select_by: Literal["top1", "loss"] | None = _option(
        None, KEEP, "What makes a checkpoint the best: accuracy, or (with --shots) loss."
    )
    trajectory: int = _option(0, KEEP, "Keep this many evenly spaced checkpoints.", min=0)
    start: bool = _option(
        False,
        KEEP,
        "Also keep base and initial head, for WiSE-FT over a trained head.",
        recorded=False,
        option="--save-start",
    )
    save_every: int | None = _option(
        None,
        KEEP,
        "Steps between saved states; an epoch (100 steps at least) by default, 0: none.",
        min=0,
        recorded=False,
    )

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for spec in fields(self):
            _check(
                spec.name,
                getattr(self, spec.name),
                _choices(types[spec.name]),
                spec.metadata["min"],
                spec.metadata["max"],
            )
        rules = [
            (self.row.head is not None and self.towers == "text",
             f"{self.method} trains a head over images, not the text tower", "--towers text goes with --method flyp"),
            (self.row.head is None and self.mixup > 0, f"{self.method} has no label to mix",
             "mixup goes with ce, car-ft and lp-ft"),
            (self.row.head is not None and self.chunk is not None,
             f"{self.method} has no contrastive batch to cut into pieces",
             "use --accumulate: it is exact for this loss"),
            (self.row.head is not None and self.multi_positive, f"{self.method} has no contrastive targets",
             "it goes with --method flyp"),
            (self.epochs is not None and self.steps is not None, "both epochs and steps are given", "give one of them"),
            (self.ema is not None and not 0 < self.ema < 1, f"a moving average cannot decay by {self.ema}",
             "use a number such as 0.999"),
        ]  # fmt: skip
        for broken, message, hint in rules:
            if broken:
                raise TrainingError(message, hint=hint)

    @classmethod
    def create(cls, settings: "Settings | None", hyperparameters: Mapping[str, Any]) -> "Settings":
        """Return `settings` (the defaults where None) with these hyperparameters changed.

        Raises:
            TrainingError: there is no such hyperparameter.
        """
        known = [spec.name for spec in fields(cls)]
        for name in hyperparameters:
            if name not in known:
                hint = did_you_mean(name, known, ", ".join(known))
                raise TrainingError(f"{name} is no hyperparameter of finetune", hint=hint)
        return replace(settings or cls(), **hyperparameters)

    @property
    def row(self) -> Method:
        """The row of the table of methods."""
        return METHODS[self.method]

    def recorded(self) -> dict[str, Any]:
        """Return what a checkpoint records and a resumed run must agree on."""
        return {name: getattr(self, name) for name in RECORDED}


RECORDED = tuple(spec.name for spec in fields(Settings) if spec.metadata["recorded"])
"""Names of the hyperparameters that change what is computed."""


def _choices(hint: Any) -> tuple[str, ...]:
    """Return the values of a Literal, or of a Literal in a union with None; () for other types."""
    parts = (hint, *get_args(hint))
    return next((get_args(part) for part in parts if getattr(part, "__origin__", None) is Literal), ())


def _check(name: str, value: Any, choices: tuple[str, ...], low: float | None, high: float | None) -> None:
    if value is None:
        return
    if choices and value not in choices:
        raise TrainingError(
            f"{name} cannot be {value!r}",
            hint=did_you_mean(str(value), choices, "one of " + ", ".join(choices)),
        )
    if low is None and high is None:
        return
    if not isinstance(value, (int, float)):
        raise TrainingError(f"{name} is {value!r}", hint="give a number")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        span = f"{low:g} or more" if high is None else f"between {low:g} and {high:g}"
        raise TrainingError(f"{name} cannot be {value}", hint=f"give a number {span}")
