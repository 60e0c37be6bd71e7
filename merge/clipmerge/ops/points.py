"""Rules that take models and give a model, one tensor at a time, in float64."""

import numpy as np

from clipmerge.ops.decompose import CUT, triplets
from clipmerge.ops.vectors import mean
from clipmerge.types import Array, Floats

PARALLEL = 1e-6
"""Below this angle (radians) slerp is a straight line to float64's accuracy."""
STEPS, CONVERGED = 1000, 1e-10
"""Of iterations: how many at most, and the last step's length (radians, or of the largest distance from the mean)."""


def slerp(a: Floats, b: Floats, *, alpha: float) -> Floats:
    """Interpolate spherically from `a` (alpha = 0) to `b` (alpha = 1): along the arc between their directions.

    Falls back to the straight line where the two are nearly parallel or one is zero.

    Source: Shoemake 1985.
    """
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(np.vdot(a, b)) / length if length else 1.0
    angle = float(np.arccos(np.clip(cosine, -1.0, 1.0)))
    if angle < PARALLEL or np.pi - angle < PARALLEL:
        return (1 - alpha) * a + alpha * b
    return np.asarray((np.sin((1 - alpha) * angle) * a + np.sin(alpha * angle) * b) / np.sin(angle))


def model_stock(base: Floats, *points: Floats) -> Floats:
    """Move from the base towards the mean of the points, as far as the points agree.

    t = k·cos / ((k - 1)·cos + 1) with cos the mean pairwise cosine of the task vectors, then
    t·mean + (1 - t)·base. A negative mean cosine counts as 0 and gives the base. The paper's geometry has no such
    case: its cosine is |centre|² / |vector|², of which the measured one is an estimate. Put into the formula, it would
    lead away from all points, without bound as cos nears -1 / (k - 1).

    Source: Jang et al. 2024, arXiv 2403.19522.
    """
    vectors = [(point - base).reshape(-1) for point in points]
    lengths = [float(np.linalg.norm(v)) for v in vectors]
    count, least = len(points), CUT * max(lengths)
    cosines = [
        float(np.vdot(vectors[i], vectors[j])) / (lengths[i] * lengths[j])
        for i in range(count)
        for j in range(i)
        if lengths[i] > least and lengths[j] > least  # what was not trained has no direction
    ]
    cosine = max(sum(cosines) / len(cosines), 0.0) if cosines else 0.0
    t = count * cosine / ((count - 1) * cosine + 1)
    return np.asarray(t * (sum(points[1:], start=points[0]) / count) + (1 - t) * base)


def karcher(*points: Floats) -> Floats:
    """Average models on the sphere: the mean direction by arcs (Karcher mean), times the mean norm.

    Two models meet halfway along their arc. The straight mean is taken where there is no mean direction.

    Source: Karcher 1977.
    """
    norms = [float(np.linalg.norm(point)) for point in points]
    held = [point / n for point, n in zip(points, norms, strict=True) if n > CUT * max(norms)]
    centre = mean(*held) if held else mean(*points)
    length = float(np.linalg.norm(centre))
    if length < PARALLEL:
        return mean(*points)
    centre = centre / length
    for _ in range(STEPS):
        step = np.zeros_like(centre)
        for point in held:
            across = point - float(np.vdot(centre, point)) * centre
            sine = float(np.linalg.norm(across))
            if sine > 0:
                step += float(np.arctan2(sine, np.vdot(centre, point))) / sine * across
        step /= len(held)
        angle = float(np.linalg.norm(step))
        if angle < CONVERGED:
            break
        centre = np.cos(angle) * centre + np.sin(angle) / angle * step
        centre /= np.linalg.norm(centre)
    return np.asarray(sum(norms) / len(norms) * centre)


def geometric_median(*points: Floats) -> Floats:
    """Find the model with the smallest sum of distances to the models: an outlier pulls no more than any other.

    Weiszfeld's iteration, from the mean, on the coefficients of the models: it needs their distances alone.

    Source: Vardi and Zhang 2000.
    """
    centre = mean(*points)
    apart = np.stack([(point - centre).reshape(-1) for point in points])
    inner = apart @ apart.T
    scale = float(np.sqrt(inner.diagonal().max(initial=0.0)))
    if scale == 0:
        return centre
    inner /= scale**2
    shares = np.full(len(points), 1 / len(points))
    for _ in range(STEPS):
        there = inner @ shares
        distances = np.sqrt(np.maximum(inner.diagonal() - 2 * there + shares @ there, 0))
        at = distances < CONVERGED
        pull = np.where(at, 0.0, 1 / np.maximum(distances, CONVERGED))
        target = pull / pull.sum() if pull.sum() else shares
        if at.any():  # on a model: it stays there if the others pull less than it holds
            force = pull - pull.sum() * shares
            strength = float(np.sqrt(max(force @ inner @ force, 0.0)))
            stay = min(1.0, at.sum() / strength) if strength > 0 else 1.0
            target = (1 - stay) * target + stay * shares
        moved = target - shares
        shares = target
        if float(np.sqrt(max(moved @ inner @ moved, 0.0))) < CONVERGED:
            break
    return np.asarray(centre + (shares @ apart).reshape(centre.shape))


def cart(*points: Array, rank: float, scale: float) -> Array:
    """Go from the mean along each model's strongest directions away from it: mean + scale·Σ SVD_k(model - mean).

    Args:
        points: matrices (m, n).
        rank: the share of min(m, n) that is k.

    Source: Choi et al. 2024, arXiv 2412.12153.
    """
    centre: Array = sum(points) / len(points)
    count = max(1, int(rank * min(centre.shape)))
    parts = [triplets(point - centre, count) for point in points]
    return centre + scale * sum((left * values) @ right.T for left, values, right in parts)
