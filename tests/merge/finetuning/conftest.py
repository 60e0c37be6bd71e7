"""A finetuning small enough to run many times: 60 digits, the tiny model, seconds on one core."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import TINY


@pytest.fixture(scope="session")
def train() -> Any:
    from clipmerge.data.open import open_split

    return open_split("digits#train", limit=60)


@pytest.fixture(scope="session")
def val() -> Any:
    from clipmerge.data.open import open_split

    return open_split("digits#val", limit=40)


@pytest.fixture(scope="session")
def base(tiny_checkpoints: Any) -> Any:
    from clipmerge.weights.weights import load

    return load(tiny_checkpoints["base"])


@pytest.fixture
def tune(base: Any, train: Any, tiny_spec: Any, tmp_path: Path) -> Callable[..., Any]:
    """`finetune` with small settings; a name and what is to be different."""
    from clipmerge.finetuning.finetune import finetune

    def run(name: str = "ft", **changed: Any) -> Any:
        options = {"lr": 1e-3, "batch_size": 16, "steps": 6, "augment": "none", "model": tiny_spec, **changed}
        if options.get("method") == "linear-probe":  # takes no steps
            options = {name: value for name, value in options.items() if name not in ("lr", "steps")}
        start = options.pop("base", base)
        split = options.pop("train", train)
        return finetune(start, split, out=tmp_path / f"{name}.safetensors", **options)

    return run


@pytest.fixture(scope="session")
def resnet_spec(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny ResNet beside the tiny text tower: convolutions and BatchNorm."""
    from clipmerge.model import resolve_model

    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "patch_size": None}
    path = tmp_path_factory.mktemp("resnet") / "resnet.json"
    path.write_text(json.dumps({"model_cfg": {**TINY, "vision_cfg": vision}}))
    return resolve_model(path)


def tensors(weights: Any) -> dict[str, Any]:
    return dict(weights.state_dict())
