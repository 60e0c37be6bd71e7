"""Golden values by hand on 3 × 3 cases, plain formulas, and gradients against finite differences."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from clipmerge.finetuning.losses import context_divergence, contrastive, cross_entropy

EYE = torch.eye(3, dtype=torch.float64)
ONE = torch.tensor(1.0, dtype=torch.float64)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def test_contrastive_of_matching_orthogonal_features() -> None:
    # logits are the identity: every row is log(e / (e + 2)) on the diagonal, both ways
    assert contrastive(EYE, EYE, ONE).item() == pytest.approx(math.log(math.e + 2) - 1, abs=1e-12)


def test_contrastive_averages_both_directions() -> None:
    text = EYE[[0, 0, 2]]
    # logits [[1,1,0],[0,0,0],[0,0,1]]: rows then columns, written out
    rows = [math.log(2 * math.e + 1) - 1, math.log(3), math.log(math.e + 2) - 1]
    columns = [math.log(math.e + 2) - 1, math.log(math.e + 2), math.log(math.e + 2) - 1]
    expected = (sum(rows) / 3 + sum(columns) / 3) / 2
    assert contrastive(EYE, text, ONE).item() == pytest.approx(expected, abs=1e-12)


def test_flyp_keeps_images_of_one_class_as_negatives() -> None:
    """Three images of one class under one prompt: nothing can tell them apart, the loss is log 3."""
    image, text = unit(3, 4), unit(1, 4, seed=1).expand(3, 4)
    by_image = math.log(3)
    by_text = torch.nn.functional.cross_entropy((image @ text.T).T, torch.arange(3)).item()
    assert contrastive(image, text, ONE).item() == pytest.approx((by_image + by_text) / 2)


def test_multi_positive_targets_are_spread_over_the_group() -> None:
    text = EYE[[0, 0, 2]]
    groups = torch.tensor([7, 7, 9])
    logits = EYE @ text.T
    log_rows, log_columns = logits.log_softmax(1), logits.T.log_softmax(1)
    targets = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]], dtype=torch.float64)
    expected = -((targets * log_rows).sum() + (targets * log_columns).sum()) / 6
    torch.testing.assert_close(contrastive(EYE, text, ONE, groups=groups), expected)


def test_groups_of_one_are_the_diagonal() -> None:
    image, text = unit(5, 8), unit(5, 8, seed=1)
    torch.testing.assert_close(
        contrastive(image, text, 3 * ONE, groups=torch.arange(5)), contrastive(image, text, 3 * ONE)
    )


def test_contrastive_equals_open_clips() -> None:
    from open_clip.loss import ClipLoss

    image, text = unit(6, 8), unit(6, 8, seed=1)
    torch.testing.assert_close(contrastive(image, text, 14 * ONE), ClipLoss()(image, text, 14 * ONE))


def test_cross_entropy_smooths_labels() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64)
    total = math.log(math.exp(2) + 2)
    own, others = total - 2, total
    labels = torch.tensor([0])
    assert cross_entropy(logits, labels).item() == pytest.approx(own)
    assert cross_entropy(logits, labels, label_smoothing=0.3).item() == pytest.approx(
        0.8 * own + 0.2 * others
    )


def test_mixup_weighs_both_labels() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64)
    total = math.log(math.exp(2) + 2)
    value = cross_entropy(logits, torch.tensor([0]), mixed=(torch.tensor([1]), 0.25))
    assert value.item() == pytest.approx(0.25 * (total - 2) + 0.75 * total)


def test_context_divergence_points_from_base_to_tuned() -> None:
    contexts, base, tuned = EYE[:2, :2], EYE[:1, :2], EYE[1:2, :2]
    scale = math.log(3.0)  # p_base = (3/4, 1/4), p = (1/4, 3/4)
    expected = 0.75 * math.log(3) + 0.25 * math.log(1 / 3)
    assert context_divergence(tuned, base, contexts, scale).item() == pytest.approx(expected)


def test_context_divergence_is_not_symmetric_and_zero_on_equal_features() -> None:
    contexts, base = unit(3, 6), unit(4, 6, seed=1)
    tuned = unit(4, 6, seed=2)
    there, back = (context_divergence(a, b, contexts, 5.0) for a, b in ((tuned, base), (base, tuned)))
    assert abs(there - back) > 1e-3
    p0 = (5.0 * base @ contexts.T).softmax(1)
    p = (5.0 * tuned @ contexts.T).softmax(1)
    torch.testing.assert_close(there, (p0 * (p0 / p).log()).sum() / 4)
    assert context_divergence(base, base, contexts, 5.0).item() == pytest.approx(0, abs=1e-12)


def test_gradients() -> None:
    image, text, contexts, base = (unit(4, 5, seed=s) for s in range(4))
    image.requires_grad_()
    text.requires_grad_()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([0, 1, 0, 2])
    labels = torch.tensor([0, 1, 3, 2])
    assert gradcheck(lambda i, t, s: contrastive(i, t, s), (image, text, scale))
    assert gradcheck(lambda i, t, s: contrastive(i, t, s, groups=groups), (image, text, scale))
    assert gradcheck(lambda i: context_divergence(i, base, contexts, 3.0), (image,))
    assert gradcheck(lambda i: cross_entropy(i @ text.T.detach(), labels, label_smoothing=0.1), (image,))
