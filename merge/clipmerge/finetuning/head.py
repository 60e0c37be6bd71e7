"""The head over unit image features: what a trained one starts from, and held-out scores of it or of a zero-shot head.

The trained head is `classification_head`; exp(logit_scale) is part of its weight.
"""

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmerge.data.split import Split
from clipmerge.distributed import all_reduce_sum, broadcast_object, is_first, overlapping_share
from clipmerge.errors import TrainingError
from clipmerge.evaluate.heads import average_templates, class_logits, evaluating
from clipmerge.finetuning.batches import Prompts
from clipmerge.finetuning.images import Images
from clipmerge.finetuning.towers import HEAD, Towers, image_features
from clipmerge.types import Ints, Pixels
from clipmerge.weights.weights import Weights

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["attach_head", "held_out_scores", "initial_head", "linear_probe", "read_head"]


@torch.no_grad()
def attach_head(
    model: nn.Module, weight: "Float[Tensor, 'classes d']", bias: "Float[Tensor, ' classes'] | None" = None
) -> None:
    """Put a head on the model, on the model's device; every rank gets the first one's, to the bit."""
    weight, bias = broadcast_object((weight.cpu(), None if bias is None else bias.cpu()))
    head = nn.Linear(weight.shape[1], weight.shape[0], device=next(model.parameters()).device)
    head.weight.copy_(weight)
    head.bias.zero_() if bias is None else head.bias.copy_(bias)
    model.add_module(HEAD, head)


def initial_head(
    kind: Literal["zero-shot", "probe"], towers: Towers, prompts: Prompts, images: Images
) -> tuple[Tensor, Tensor | None]:
    """Return what a head starts from: exp(logit_scale) times the zero-shot head, or a linear probe."""
    if kind == "zero-shot":
        unit = average_templates(towers.prompt_features(prompts.tokens), prompts.classes)
        return towers.exp_scale.detach() * unit, None
    train = images.plain()
    val = None if images.val is None else (images.held_out(), images.val.labels)
    what = "features for the probe"
    held_out = None if val is None else (images.features(towers, val[0], what), val[1])
    features = images.features(towers, train, what)
    if not is_first():
        return torch.empty(0, 0), None  # `attach_head` hands on the first one's
    return linear_probe(features, images.train.labels, prompts.classes, held_out=held_out)


def read_head(weights: Weights, classes: int) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a checkpoint's head.

    Raises:
        TrainingError: it has none, or one for another number of classes.
    """
    tensors = weights.state_dict()
    if f"{HEAD}.weight" not in tensors:
        raise TrainingError(f"{weights!r} has no {HEAD}", hint="make one with --method linear-probe")
    weight, bias = tensors[f"{HEAD}.weight"], tensors.get(f"{HEAD}.bias")
    if len(weight) != classes:
        raise TrainingError(
            f"{weights!r} has a head for {len(weight)} classes, the data have {classes}",
            hint="share a head only between data with the same classes",
        )
    return weight, bias


@torch.no_grad()
def held_out_scores(
    towers: Towers, split: Split, pixels: Pixels | Tensor, prompts: Prompts, batch_size: int
) -> dict[str, float]:
    """Return accuracy ("top1") and mean cross-entropy ("loss") of the trained head, or of the zero-shot head as it is.

    Every rank scores a share, and skips what the rank before it counts.
    """
    own, twice = overlapping_share(len(split))
    device = towers.mean.device
    with evaluating(towers):
        images = image_features(towers, pixels[own], device, batch_size)
        head = None
        if not hasattr(towers.model, HEAD):
            head = average_templates(towers.prompt_features(prompts.tokens), prompts.classes)
        logits = split.covered(class_logits(towers.model, images, head))[twice:]
    labels = torch.from_numpy(split.labels[own][twice:]).to(device)
    right = (logits.argmax(dim=1) == labels).sum()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    top1, loss = (all_reduce_sum(torch.stack([right.double(), loss.double()])) / len(split)).tolist()
    return {"top1": top1, "loss": loss}


STRENGTHS = (0.1, 1.0, 10.0, 100.0)
"""Inverse regularisation C tried where held-out features can choose it; features are unit vectors times SCALE."""

SCALE = 10.0
"""CLIP's probes see raw features, whose norm is about 10; unit features are brought to it, so C means the same."""

ROWS = 1 << 16
"""Images at a time: the logits of all would take more memory than their features."""


def linear_probe(
    features: "Float[Tensor, 'images d']",
    labels: Ints,
    classes: int,
    *,
    held_out: "tuple[Float[Tensor, 'held_out d'], Ints] | None" = None,
    strength: float = 0.316,
) -> "tuple[Float[Tensor, 'classes d'], Float[Tensor, ' classes']]":
    """Return weight and bias of a head over unit features, trained to convergence.

    Args:
        held_out: features and labels that choose the regularisation among STRENGTHS; without them `strength`
            is used (0.316: Radford et al. 2021, for ImageNet).

    Source: Kumar et al. 2022, arXiv 2202.10054.
    """
    present, rows = np.unique(labels, return_inverse=True)
    if len(present) < 2:
        raise TrainingError(
            "a linear probe needs images of two classes or more", hint="check the training data"
        )
    x, y = _scaled(features), torch.from_numpy(rows.reshape(-1)).to(features.device)
    fits = [_fit(x, y, len(present), c) for c in (STRENGTHS if held_out is not None else (strength,))]
    best = fits[0]
    if held_out is not None:
        seen, truth = _scaled(held_out[0]), held_out[1]
        right = [(present[(seen @ w.T + b).argmax(1).cpu().numpy()] == truth).sum() for w, b in fits]
        best = fits[int(np.argmax(right))]
    where = torch.from_numpy(present).to(features.device)
    weight = features.new_zeros(classes, features.shape[1]).index_copy_(0, where, (best[0] * SCALE).float())
    never = float(best[1].min()) - 100  # a class without images is never predicted
    bias = features.new_full((classes,), never).index_copy_(0, where, best[1].float())
    return weight, bias


def _scaled(features: Tensor) -> Tensor:
    """Return features as they are fitted: in float64 on a CPU; a GPU has little of it, and takes fp32."""
    return features.to(torch.float64 if features.device.type == "cpu" else torch.float32) * SCALE


def _fit(x: Tensor, y: Tensor, classes: int, strength: float) -> tuple[Tensor, Tensor]:
    """Minimise scikit-learn's objective: the mean cross-entropy plus |weight|² / (2 · C · images).

    With two classes scikit-learn has one row, the difference of ours, and so half of our penalty.
    """
    penalty = (2 if classes == 2 else 1) / (strength * len(x))
    weight, bias = x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=2000, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    @torch.no_grad()
    def loss_and_gradient() -> Tensor:
        loss = 0.5 * penalty * weight.square().sum()
        weight.grad, bias.grad = penalty * weight, torch.zeros_like(bias)
        for piece, labels in zip(torch.split(x, ROWS), torch.split(y, ROWS), strict=True):
            logs = (piece @ weight.T + bias).log_softmax(dim=1)
            loss = loss - logs.gather(1, labels[:, None]).sum() / len(x)
            error = logs.exp_()
            error[torch.arange(len(error), device=x.device), labels] -= 1
            weight.grad += error.T @ piece / len(x)
            bias.grad += error.sum(dim=0) / len(x)
        return loss

    solver.step(loss_and_gradient)  # type: ignore[no-untyped-call]
    return weight, bias
