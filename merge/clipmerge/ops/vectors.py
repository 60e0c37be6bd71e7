"""Rules that take task vectors and give a task vector, one tensor at a time, in float64."""

import numpy as np

from clipmerge.types import Floats


def magmax(*vectors: Floats) -> Floats:
    """Take each entry from the vector where it is largest in magnitude; the later vector wins ties.

    Source: Marczak et al. 2024, arXiv 2407.06322.
    """
    largest = np.array(vectors[0])
    for vector in vectors[1:]:
        np.copyto(largest, vector, where=np.abs(vector) >= np.abs(largest))
    return largest
