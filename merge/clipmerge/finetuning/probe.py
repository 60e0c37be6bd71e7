"""Linear probes: logistic regression by LBFGS on features that were computed once."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clipmerge.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["linear_probe"]

STRENGTHS = (0.1, 1.0, 10.0, 100.0)
"""Inverse regularisation C tried where held-out features can choose it; features are unit vectors times SCALE."""

SCALE = 10.0
"""CLIP's probes see raw features, whose norm is about 10; unit features are brought to it, so C means the same."""


def linear_probe(
    features: "Tensor",
    labels: npt.NDArray[np.int64],
    classes: int,
    *,
    held_out: "tuple[Tensor, npt.NDArray[np.int64]] | None" = None,
    strength: float = 0.316,
) -> tuple["Tensor", "Tensor"]:
    """(weight, bias) of a head over unit features, trained to convergence.

    Args:
        held_out: features and labels that choose the regularisation among STRENGTHS; without them `strength`
            is used (0.316: Radford et al. 2021, for ImageNet).

    Source: Kumar et al. 2022, arXiv 2202.10054.
    """
    import torch

    x = features.double().cpu().numpy() * SCALE
    fits = [_fit(x, labels, c) for c in (STRENGTHS if held_out is not None else (strength,))]
    best = fits[0]
    if held_out is not None:
        y = held_out[0].double().cpu().numpy() * SCALE
        best = max(fits, key=lambda fit: float(fit.score(y, held_out[1])))
    weight = np.zeros((classes, x.shape[1]))
    bias = np.full(classes, 0.0)
    rows, intercept = best.coef_, best.intercept_
    if len(best.classes_) == 2:
        rows, intercept = np.concatenate([-rows, rows]) / 2, np.concatenate([-intercept, intercept]) / 2
    weight[best.classes_], bias[best.classes_] = rows * SCALE, intercept
    absent = np.setdiff1d(np.arange(classes), best.classes_)
    bias[absent] = bias.min() - 100.0  # a class without images is never predicted
    return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()


def _fit(x: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], strength: float) -> Any:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(labels)) < 2:
        raise TrainingError(
            "a linear probe needs images of two classes or more", hint="check the training data"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=2000, tol=1e-5).fit(x, labels)
