"""The methods of finetuning, one row each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["METHODS", "Method", "MethodName"]

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
    "ce": Method("cross-entropy, the head starts from the zero-shot head", "zero-shot"),
    "car-ft": Method(
        "cross-entropy, and the base's context distribution is kept", "zero-shot", contexts=True
    ),
    "lp-ft": Method("a linear probe first, then full finetuning from its head", "probe"),
    "linear-probe": Method("a linear probe on frozen features, nothing else", "probe", steps=False),
}
"""Sources: FLYP 2212.00638, WiSE-FT's CE 2109.01903, CAR-FT 2211.16175, LP-FT 2202.10054."""
