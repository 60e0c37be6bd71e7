"""A CLIP of a few kilobytes, and ways to write and compare state dicts."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from clipmerge.checkpoint.read import Reader

os.environ.setdefault("OMP_NUM_THREADS", "1")

StateDict = Mapping[str, Any]


@pytest.fixture(scope="session")
def small_clip() -> Any:
    """An open_clip model with both towers and 64 words."""
    import torch
    from open_clip import CLIP

    torch.manual_seed(0)
    vision = {"image_size": 8, "layers": 2, "width": 16, "head_width": 8, "patch_size": 4, "mlp_ratio": 2.0}
    text = {"context_length": 8, "vocab_size": 64, "width": 12, "heads": 2, "layers": 1, "mlp_ratio": 2.0}
    return CLIP(embed_dim=6, vision_cfg=vision, text_cfg=text).eval()


@pytest.fixture(scope="session")
def small(small_clip: Any) -> StateDict:
    return {name: tensor.detach().clone() for name, tensor in small_clip.state_dict().items()}


def as_bytes(tensor: Any) -> bytes:
    """A torch tensor's elements in row-major order."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Any, StateDict], None]:
    """A checkpoint holds exactly these tensors: names, dtypes' widths, shapes and bytes."""

    def check(checkpoint: Any, expected: StateDict) -> None:
        assert sorted(checkpoint.tensors) == sorted(expected)
        assert list(checkpoint.tensors) == sorted(expected)
        for name, tensor in expected.items():
            read = Reader().dense(checkpoint.tensors[name])
            assert read.shape == tuple(tensor.shape), name
            assert read.tobytes() == as_bytes(tensor), name
            assert read.dtype.itemsize == tensor.element_size(), name

    return check


@pytest.fixture
def authors(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`src.models.modeling` as wise-ft, patching and task_vectors have it, importable while a file is saved."""
    import torch

    class ImageEncoder(torch.nn.Module):
        def __init__(self, model: Any, preprocess: Any) -> None:
            super().__init__()
            self.model = model
            self.train_preprocess = self.val_preprocess = preprocess
            self.cache_dir = Path("cache")

    class ClassificationHead(torch.nn.Linear):
        def __init__(self, weights: Any) -> None:
            super().__init__(weights.shape[1], weights.shape[0])
            self.normalize = True
            self.weight = torch.nn.Parameter(weights.clone())
            self.bias = torch.nn.Parameter(torch.zeros(weights.shape[0]))

    class ImageClassifier(torch.nn.Module):
        def __init__(self, image_encoder: Any, classification_head: Any) -> None:
            super().__init__()
            self.image_encoder = image_encoder
            self.classification_head = classification_head
            self.train_preprocess = image_encoder.train_preprocess

    names: list[type] = [ImageEncoder, ClassificationHead, ImageClassifier]
    for path in ("src", "src.models", "src.models.modeling"):
        monkeypatch.setitem(sys.modules, path, ModuleType(path))
    module: Any = sys.modules["src.models.modeling"]
    for cls in names:
        cls.__module__, cls.__qualname__ = "src.models.modeling", cls.__name__
        setattr(module, cls.__name__, cls)
    return module


@pytest.fixture(scope="session")
def raw_safetensors() -> Callable[..., Path]:
    """Writes a file from a header given as a dict or as text, and the bytes behind it."""

    def write(path: Path, header: Any, data: bytes = b"", *, size: int | None = None) -> Path:
        text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
        path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + data)
        return path

    return write
