"""Rules that take models and give a model, one tensor at a time, in float64."""

import numpy as np

from clipmerge.types import Floats

PARALLEL = 1e-6
"""Below this angle (radians) slerp is a straight line to float64's accuracy."""


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
    count = len(points)
    cosines = [
        float(np.vdot(vectors[i], vectors[j])) / (lengths[i] * lengths[j])
        for i in range(count)
        for j in range(i)
        if lengths[i] and lengths[j]
    ]
    cosine = max(sum(cosines) / len(cosines), 0.0) if cosines else 0.0
    t = count * cosine / ((count - 1) * cosine + 1)
    return np.asarray(t * (sum(points[1:], start=points[0]) / count) + (1 - t) * base)
