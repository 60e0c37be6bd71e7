"""Few digits and many, and evaluators over them."""

from typing import Any

import pytest

from clipmerge.data.open import open_split
from clipmerge.data.split import Split


@pytest.fixture(scope="session")
def digits() -> Split:
    """120 handwritten digits."""
    return open_split("digits#val", limit=120)


@pytest.fixture(scope="session")
def weights(tiny_checkpoints: Any) -> Any:
    """The tiny checkpoints, opened: name → Weights."""
    from clipmerge.weights.weights import load

    return {name: load(path) for name, path in tiny_checkpoints.items()}


@pytest.fixture
def evaluator(tiny_spec: Any, digits: Split) -> Any:
    from clipmerge.evaluate.evaluator import Evaluator

    return Evaluator({"val": digits}, tiny_spec)


@pytest.fixture(scope="session")
def spread(tiny_checkpoints: Any) -> Any:
    """The tiny checkpoints' paths, without the base."""
    return [path for name, path in tiny_checkpoints.items() if name != "base"]
