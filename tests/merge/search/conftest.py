"""Real images and a tiny CLIP whose finetunings differ enough for a soup to be choosy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from clipmerge.data.open import open_split
from clipmerge.data.split import Split
from clipmerge.evaluate.evaluator import Evaluator


@pytest.fixture(scope="session")
def val() -> Split:
    return open_split("digits#val", limit=150)


@pytest.fixture(scope="session")
def spread(tiny_spec: Any, tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    """Six checkpoints around one base, at distances that make accuracies differ, with provenance metadata."""
    import torch

    from clipmerge.model import build_model
    from clipmerge.weights.weights import from_state_dict

    folder = tmp_path_factory.mktemp("spread")
    base = {k: v.clone() for k, v in build_model(tiny_spec, seed=3).state_dict().items()}
    paths = []
    for i, far in enumerate((0.02, 0.1, 0.05, 0.2, 0.01, 0.1)):
        noise = torch.Generator().manual_seed(i)
        moved = {k: v + far * torch.randn(v.shape, generator=noise) if v.ndim else v for k, v in base.items()}
        path = folder / f"m{i}.safetensors"
        from_state_dict(moved, f"m{i}").save(path, metadata={"model": tiny_spec.to_metadata()})
        paths.append(path)
    return paths


@pytest.fixture
def evaluator(tiny_spec: Any, val: Split) -> Evaluator:
    return Evaluator({"val": val}, tiny_spec)
