"""The methods of finetuning, and its hyperparameters, each spelled once: default, type, meaning, limits.

The keywords of `finetune`, the options of the command, the record inside a checkpoint and the comparison with a saved
state all follow from these fields. Nothing heavy is imported: the command reads this file to show its help.
"""
# ruff: noqa: RUF009  (`_field` makes a field, whose default is a plain value)

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

from clipmerge.errors import TrainingError
from clipmerge.text import did_you_mean

__all__ = ["METHODS", "RECORDED", "Method", "MethodName", "Settings"]

MethodName: TypeAlias = Literal["flyp", "ce", "car-ft", "lp-ft", "linear-probe"]


@dataclass(frozen=True)
class Method:
    """What a method trains, and from where.

    Attributes:
        head: what the trained head starts from; None trains no head, but both towers against each other.
        steps: whether anything is trained after that start.
        contexts: whether CAR-FT's term keeps the base's context distribution.
    """

    summary: str
    head: Literal["zero-shot", "probe"] | None
    steps: bool = True
    contexts: bool = False


METHODS: Mapping[str, Method] = {
    "flyp": Method("finetune like you pretrain: the contrastive loss against class prompts", None),
    "ce": Method("cross-entropy, the head starts from the zero-shot head, or is it and frozen", "zero-shot"),
    "car-ft": Method(
        "cross-entropy, and the base's context distribution is kept", "zero-shot", contexts=True
    ),
    "lp-ft": Method("a linear probe first, then full finetuning from its head", "probe"),
    "linear-probe": Method("a linear probe on frozen features, nothing else", "probe", steps=False),
}
"""Sources: FLYP 2212.00638, WiSE-FT's CE 2109.01903, CAR-FT 2211.16175, LP-FT 2202.10054; CE under a frozen head:
task arithmetic 2212.04089, PAINT 2208.05592."""


def _field(
    panel: str | None,
    default: Any,
    help: str,
    *,
    min: float | None = None,
    max: float | None = None,
    recorded: bool = True,
    option: str | None = None,
) -> Any:
    """Declare a hyperparameter.

    Args:
        panel: where the command's help shows it; None: for Python only.
        min, max: limits, both allowed.
        recorded: written into checkpoints and compared on resume; False where it does not change what is computed.
        option: the command's name for it, where that is not the field's.
    """
    metadata = {"panel": panel, "help": help, "min": min, "max": max, "recorded": recorded, "option": option}
    return field(default=default, metadata=metadata)


_method, _optimiser, _device, _keep, _python = (
    partial(_field, panel) for panel in ("Method", "Optimiser", "Device", "What is kept", None)
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to finetune. Each field is a keyword of `finetune`; its meaning is in its metadata, under "help".

    Raises:
        TrainingError: a value that is out of its limits, or no choice, or two that contradict each other.
    """

    method: MethodName = _method("flyp", "How to finetune.")
    towers: Literal["both", "image", "text"] = _method(
        "both", "What trains; text: LiT, with a locked image tower."
    )
    frozen_head: bool = _python(False, "Keep the zero-shot head as it is; train the image tower under it.")
    templates: Sequence[str] | str | None = _python(None, "Prompts with {}; the data's own by default.")
    contexts: Sequence[str] | None = _python(None, 'CAR-FT\'s contexts ("photo", "sketch" …).')
    shares: str | Mapping[str, float] = _method(
        "size", "Several --train sets: how often each is drawn: size, root (of it), equal, or cars=3,dtd=1."
    )
    shots: int | None = _method(None, "Images per class to train on; the best held-out loss is kept.", min=1)
    augment: str | Mapping[str, Any] = _method(
        "crop",
        "none, or of crop:0.9 flip jitter:0.4 gray:0.2 noise:0.1 blur:1 contrast:0.5 randaugment:N,M joined by +, "
        "or a JSON aug-cfg.",
    )
    augment_on: Literal["cpu", "device"] = _device(
        "cpu", "device: crop and flip in batches, from pixels decoded once; other pixels than on the CPU."
    )
    mixup: float = _method(0.0, "Mix images in pairs, with a share from Beta(a, a).", min=0)
    label_smoothing: float = _method(0.0, "Share of the target spread over all classes.", min=0, max=1)
    multi_positive: bool = _method(False, "Images of one class are positives of each other (not FLYP).")
    logit_scale: Literal["learned", "clamped", "frozen"] = _method("learned", "clamped: at most 100.")
    freeze_batch_norm: bool | None = _method(
        None,
        "Keep BatchNorm's running statistics, and normalise by them; the default from a base.",
        option="--freeze-batch-norm/--no-freeze-batch-norm",
    )
    car_weight: float = _method(1.0, "Weight of CAR-FT's term.", min=0)
    lr: float = _optimiser(1e-5, "Peak learning rate.", min=0)
    wd: float = _optimiser(0.1, "Weight decay.", min=0)
    decay: Literal["all", "matrices"] = _optimiser("all", "matrices: not norms, biases, logit_scale.")
    batch_size: int = _optimiser(512, "Images of a batch on one device.", min=1)
    accumulate: int = _optimiser(1, "Batches whose gradients make a step.", min=1)
    chunk: int | None = _optimiser(None, "Gradient caching: images in memory at once, exact loss.", min=1)
    epochs: float | None = _optimiser(None, "Passes over the images; 10 by default.", min=0)
    steps: int | None = _optimiser(None, "Steps in all, instead of --epochs.", min=1)
    warmup: int | None = _optimiser(None, "Steps; by default 500, a tenth of all at most.", min=0)
    clip_grad: float | None = _optimiser(
        None, "Largest norm of the gradient, 0: any; by default 1 under a frozen head, else any.", min=0
    )
    ema: float | None = _optimiser(None, "Decay of a moving average, which is then scored and written.")
    seed: int = _optimiser(0, "Seed of everything random.", min=0)
    device: str | None = _device(None, "By default the GPU if there is one.", recorded=False)
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] | None = _device(
        None, "What the towers compute in; by default bf16 autocast on a GPU, else fp32."
    )
    deterministic: bool = _device(
        False, "On a GPU too, the same bytes each time, also by --resume; slower.", recorded=False
    )
    compile: bool = _device(False, "Use torch.compile.", recorded=False)
    checkpointing: bool = _device(False, "Less memory, a third more time.", recorded=False)
    channels_last: bool | None = _python(None, "Memory layout of convolutional towers.", recorded=False)
    fsdp: bool = _device(False, "Shard the model over torchrun's processes.", recorded=False)
    workers: int | None = _device(None, "Processes that decode and augment images.", min=0, recorded=False)
    score_every: int | None = _keep(None, "Steps between held-out scores; an epoch by default.", min=0)
    select: Literal["last", "best"] | None = _keep(None, "Write the last (default; with --shots the best).")
    select_by: Literal["top1", "loss"] | None = _keep(
        None, "What is best: top1 (default; with --shots loss)."
    )
    trajectory: int = _keep(0, "Keep this many evenly spaced checkpoints.", min=0)
    start: bool = _keep(False, "Also keep base and initial head.", recorded=False, option="--save-start")
    save_every: int | None = _keep(None, "Steps between saved states; 0: none.", min=0, recorded=False)

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for spec in fields(self):
            _check(spec.name, getattr(self, spec.name), _choices(types[spec.name]), spec.metadata)
        name, headless = self.method, self.row.head is None
        rules = [
            (not headless and self.towers == "text", f"{name} trains a head over images, not the text tower",
             "--towers text goes with --method flyp"),
            (headless and self.mixup > 0, f"{name} has no label to mix", "mixup goes with ce, car-ft and lp-ft"),
            (not headless and self.chunk is not None, f"{name} has no contrastive batch to cut into pieces",
             "use --accumulate: it is exact for this loss"),
            (not headless and self.multi_positive, f"{name} has no contrastive targets", "it goes with flyp"),
            (self.frozen_head and self.method not in ("ce", "car-ft"), f"{name} has no frozen head",
             "--head frozen goes with ce and car-ft"),
            (self.epochs is not None and self.steps is not None, "both epochs and steps are given", "give one of them"),
            (self.ema is not None and not 0 < self.ema < 1, f"a moving average cannot decay by {self.ema}",
             "use a number such as 0.999"),
        ]  # fmt: skip
        for broken, message, hint in rules:
            if broken:
                raise TrainingError(message, hint=hint)
        for spec in fields(self):
            if getattr(self, spec.name) != spec.default and (why := self._why_idle(spec.name)):
                option = (spec.metadata["option"] or f"--{spec.name.replace('_', '-')}").split("/")[0]
                raise TrainingError(f"{option} does nothing here: {why}", hint="leave it out")

    def _why_idle(self, name: str) -> str | None:
        """Say why a hyperparameter has no effect with this method; None where it has one."""
        if not self.row.steps and name in _OF_STEPS:
            return f"{self.method} takes no steps"
        if not self.row.contexts and name in ("contexts", "car_weight"):
            return f"{self.method} keeps no contexts, car-ft does"
        if self.row.head is not None and name == "logit_scale":
            return (
                "the frozen head keeps the base's scale"
                if self.frozen_head
                else "a trained head holds the scale"
            )
        if self.augment == "none" and name == "augment_on":
            return "nothing is augmented"
        return None

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


_OF_STEPS = (
    "mixup", "label_smoothing", "freeze_batch_norm", "lr", "wd", "decay", "accumulate", "epochs", "steps", "warmup",
    "clip_grad", "ema", "augment_on", "compile", "checkpointing", "score_every", "trajectory", "save_every",
)  # fmt: skip
"""Hyperparameters that mean nothing where no step is taken."""

RECORDED = tuple(spec.name for spec in fields(Settings) if spec.metadata["recorded"])
"""Names of the hyperparameters that change what is computed."""


def _choices(hint: Any) -> tuple[str, ...]:
    """Return the values of a Literal, or of a Literal in a union with None; () for other types."""
    parts = (hint, *get_args(hint))
    return next((get_args(part) for part in parts if getattr(part, "__origin__", None) is Literal), ())


def _check(name: str, value: Any, choices: tuple[str, ...], limits: Mapping[str, Any]) -> None:
    low, high = limits["min"], limits["max"]
    if value is None:
        return
    if choices and value not in choices:
        hint = did_you_mean(str(value), choices, f"one of {', '.join(choices)}")
        raise TrainingError(f"{name} cannot be {value!r}", hint=hint)
    if low is None and high is None:
        return
    span = f"{low:g} or more" if high is None else f"between {low:g} and {high:g}"
    if not isinstance(value, (int, float)) or not low <= value <= (value if high is None else high):
        raise TrainingError(f"{name} cannot be {value!r}", hint=f"give a number {span}")
