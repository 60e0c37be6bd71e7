"""Rules that weigh models by statistics of data, one tensor at a time, in float64.

Statistics are arrays that were taken once of each model (`evaluate/statistics.py`); None, where a tensor has none.
"""

from collections.abc import Sequence

import numpy as np
from array_api_compat import array_namespace, device

from clipmerge.ops.matrices import gram_merge
from clipmerge.types import Array, Floats, Reals


def fisher(
    *points: Reals,
    statistics: Sequence[Reals] | None = None,
    weights: float | Sequence[float] = 1.0,
    floor: float = 0.0,
) -> Floats:
    """Average models entry by entry, each by the Fisher information of its entries: Σ c·θ / Σ c.

    c is the model's weight times its Fisher information; where all are 0, and in tensors without statistics, it is the
    weight alone.

    Args:
        statistics: diagonals of the models' Fisher information, in their order.
        weights: one for all models, or one each.
        floor: the least Fisher information of an entry; 1e-8 in WiSE-FT's code.

    Source: Matena and Raffel 2022, arXiv 2111.09832.
    """
    each = [weights] * len(points) if isinstance(weights, int | float) else list(weights)
    wide = [np.asarray(point, np.float64) for point in points]
    shares = [np.full(wide[0].shape, float(weight)) for weight in each]
    if statistics is not None:
        by_fisher = [
            w * np.maximum(s, floor, dtype=np.float64) for w, s in zip(each, statistics, strict=True)
        ]
        known = sum(by_fisher) > 0
        shares = [np.where(known, f, share) for f, share in zip(by_fisher, shares, strict=True)]
    # From the first model on, so that equal entries stay what they are, whatever their shares.
    first, *others = wide
    away = sum(
        (share * (point - first) for share, point in zip(shares[1:], others, strict=True)), np.zeros(())
    )
    return np.asarray(first + away / sum(shares))


def regmean(
    *points: Array,
    statistics: Sequence[Array] | None = None,
    off_diagonal: float = 0.95,
    transposed: bool = False,
) -> Array:
    """Fit each linear layer to the outputs that the models' own layers have on their own data (RegMean).

    W = (Σ W_t·G_t)(Σ G_t)⁻¹ with G_t = XᵀX of the layer's inputs; directions that no input has, and tensors without
    statistics, are averaged.

    Args:
        points: layers (out, in).
        statistics: the models' G, (in, in), in their order.
        off_diagonal: what everything but the diagonal of G is multiplied by.
        transposed: whether the layers are (in, out).

    Source: Jin et al. 2023, arXiv 2212.09849.
    """
    if statistics is None:
        return sum(points) / len(points)
    layers = [point.T for point in points] if transposed else list(points)
    centre = sum(layers) / len(layers)
    one = array_namespace(centre).eye(centre.shape[1], dtype=centre.dtype, device=device(centre))
    squares = [off_diagonal * g + (1 - off_diagonal) * one * g for g in statistics]
    fitted = [(layer - centre, square, 1.0) for layer, square in zip(layers, squares, strict=True)]
    merged = centre + gram_merge(fitted, ridge=0.0)
    return merged.T if transposed else merged


def regmean_plus(
    *points: Array,
    statistics: Sequence[Array] | None = None,
    off_diagonal: float = 0.95,
    transposed: bool = False,
) -> Array:
    """Fit each linear layer as RegMean does, to inputs that come out of the layers merged before it (RegMean++).

    Args:
        statistics: the models' G, (in, in), in their order, taken together. The others as for `regmean`.

    Source: Nguyen et al. 2025, arXiv 2508.03121.
    """
    return regmean(*points, statistics=statistics, off_diagonal=off_diagonal, transposed=transposed)
