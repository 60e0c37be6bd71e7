"""Rules that take task vectors and give a task vector, one tensor at a time, in float64."""

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


def magmax(*vectors: F64) -> F64:
    """Each entry from the vector where it is largest in magnitude; the later vector wins ties.

    Source: Marczak et al. 2024, arXiv 2407.06322.
    """
    chosen = np.array(vectors[0])
    for vector in vectors[1:]:
        np.copyto(chosen, vector, where=np.abs(vector) >= np.abs(chosen))
    return chosen
