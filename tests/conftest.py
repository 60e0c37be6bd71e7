"""Fixtures for the whole suite: a tiny random CLIP of our own, as configuration, file and checkpoints."""

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from . import shape_checks

os.environ.setdefault("OMP_NUM_THREADS", "1")
shape_checks.install()  # before any test module imports clipmerge


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all tests but those that are about them: the suite means the same everywhere."""
    if "cuda" not in config.option.markexpr.replace("not cuda", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 16,
        "layers": 2,
        "width": 16,
        "head_width": 8,
        "patch_size": 4,
        "mlp_ratio": 2.0,
    },
    "text_cfg": {
        "context_length": 32,
        "vocab_size": 49408,
        "width": 8,
        "heads": 2,
        "layers": 2,
        "mlp_ratio": 2.0,
    },
}


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or fills the user's cache; processes that tests start inherit this one."""
    os.environ["CLIPMERGE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tiny_model_config() -> dict[str, Any]:
    """An open_clip model_cfg: both towers, the real vocabulary, 1.7 MB in fp32."""
    return copy.deepcopy(TINY)


@pytest.fixture(scope="session")
def tiny_model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as an open_clip_config.json-like file, `tiny.json`."""
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}))
    return path


@pytest.fixture(scope="session")
def tiny_spec(tiny_model_file: Path) -> Any:
    from clipmerge.model import resolve_model

    return resolve_model(tiny_model_file)


def _taught_digits(spec: Any) -> dict[str, Any]:
    """A random model whose last image layer was solved (ridge) towards digits' prompts: better than chance."""
    import torch

    from clipmerge.data.open import open_split
    from clipmerge.data.pixels import mean_and_std, normalise, pixels
    from clipmerge.evaluate.heads import zero_shot_head
    from clipmerge.model import build_model, get_tokenizer

    train = open_split("digits#train", limit=400)
    model: Any = build_model(spec, seed=0)
    with torch.no_grad():
        head = zero_shot_head(model, get_tokenizer(spec), train.classes, ['a photo of the number: "{}".'])
        images = normalise(
            torch.from_numpy(pixels(train, spec.preprocess)), *mean_and_std(spec.preprocess, "cpu")
        )
        model.visual.proj.copy_(torch.eye(16))
        pooled = model.encode_image(images)
        wanted = torch.nn.functional.normalize(head - head.mean(0), dim=-1)[torch.from_numpy(train.labels)]
        ridge = pooled.T @ pooled + 0.01 * len(pooled) * torch.eye(16)
        model.visual.proj.copy_(3 * torch.linalg.solve(ridge, pooled.T @ wanted))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="session")
def tiny_checkpoints(tiny_spec: Any, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """`base` and five perturbations of it, `ft0` … `ft4`: open_clip's names, no metadata of ours.

    On the digits they score between 10 and 25 %, each with its own mistakes.
    """
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("checkpoints")
    base = _taught_digits(tiny_spec)
    paths = {"base": folder / "base.safetensors"}
    save_file(base, paths["base"], metadata={"format": "pt"})
    for i in range(5):
        noise = torch.Generator().manual_seed(100 + i)
        moved = {k: v + 0.005 * torch.randn(v.shape, generator=noise) for k, v in base.items()}
        paths[f"ft{i}"] = folder / f"ft{i}.safetensors"
        save_file(moved, paths[f"ft{i}"], metadata={"format": "pt"})
    return paths


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `clipmerge demo` leaves, made with a twentieth of its training steps. Copy it before writing there."""
    from clipmerge_cli import demo
    from clipmerge_cli.options import Talk

    out = tmp_path_factory.mktemp("demo") / "clipmerge-demo"
    demo.run(out, Talk(quiet=True), pace=0.05)
    return out
