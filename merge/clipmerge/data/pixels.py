"""Put images through a model's eval transform once: uint8 on disk, keyed by content and transform."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from clipmerge.checkpoint.cache import cache_dir
from clipmerge.checkpoint.output import whole_file
from clipmerge.data.split import Split
from clipmerge.data.stored import map_intact, read_each, refuse
from clipmerge.errors import DataError, OutputError
from clipmerge.model import ModelSpec, eval_transform
from clipmerge.types import Pixels, Progress

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, Num, UInt8
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["eval_transform_uint8", "image_size", "mean_and_std", "normalise", "pixels"]

_FIELDS = ("size", "interpolation", "resize_mode", "fill_color", "steps")  # all that uint8 pixels depend on


def pixels(
    split: Split,
    preprocess_cfg: Mapping[str, Any],
    *,
    cache: Path | None = None,
    on_progress: Progress | None = None,
) -> "UInt8[Pixels, 'images 3 height width']":
    """Return open_clip's eval transform of every image, before ToTensor and Normalize.

    The array is a mapped file in the cache folder. It is copy-on-write: changing it changes no file.

    Args:
        preprocess_cfg: open_clip's: size, interpolation, resize_mode, fill_color; and "steps", see `model.transforms`.
        cache: the folder to keep it in, `cache_dir()` where None.
        on_progress: called as ("decoding images", done, total).

    Raises:
        DataError: images that cannot be decoded; all of them are counted, ten are named.
        OutputError: the cache cannot be written.
    """
    shape = (len(split), 3, *image_size(preprocess_cfg))
    path = (cache or cache_dir()) / "pixels" / f"{_key(split, preprocess_cfg)}.u8"
    cached = map_intact(path)
    if cached is not None:
        return cached.reshape(shape)
    transform, size = eval_transform_uint8(preprocess_cfg), int(np.prod(shape[1:]))
    with whole_file(path, parents=True) as sibling, sibling.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is met before anything is decoded
            os.posix_fallocate(file.fileno(), 0, size * len(split) + 32)

        def read(i: int) -> bytes:
            return np.asarray(transform(split.image(i, verify=True))).transpose(2, 0, 1).tobytes()

        def write(i: int, row: bytes) -> None:
            os.pwrite(file.fileno(), row, i * size)

        threads = os.cpu_count() or 1
        reasons = read_each(read, write, len(split), threads, "decoding images", on_progress)
        refuse(split.source, [f"{split.names[i]}: {reason}" for i, reason in reasons.items()])
        written = np.memmap(sibling, np.uint8, mode="r", shape=size * len(split))
        digest = blake3(written.data, max_threads=blake3.AUTO).digest()
        os.pwrite(file.fileno(), digest, size * len(split))
    cached = map_intact(path)
    if cached is None:
        raise OutputError(f"{path} does not hold what was written to it", hint="look at the cache's disk")
    return cached.reshape(shape)


def mean_and_std(
    preprocess_cfg: Mapping[str, Any], device: "torch.device | str"
) -> "tuple[Float[Tensor, '3 1 1'], Float[Tensor, '3 1 1']]":
    """Return a model's mean and standard deviation on a device: make them once, not for every batch.

    From a list of numbers, a GPU's constants are copied while the host waits.
    """
    import torch

    mean, std = (
        torch.tensor(list(preprocess_cfg[key]), dtype=torch.float32, device=device).view(3, 1, 1)
        for key in ("mean", "std")
    )
    return mean, std


def normalise(
    images: "Num[Tensor, '*batch 3 height width']",
    mean: "Float[Tensor, '3 1 1']",
    std: "Float[Tensor, '3 1 1']",
) -> "Float[Tensor, '*batch 3 height width']":
    """Return what ToTensor and Normalize make of pixels in 0 … 255, bit for bit, on the pixels' device.

    Args:
        mean, std: as `mean_and_std` makes them, on the same device.
    """
    import torch

    # CUDA multiplies by the rounded inverse of a Python 255, but divides by a tensor, as ToTensor does on the CPU.
    white = torch.full((1,), 255.0, device=images.device)
    return images.to(torch.float32).div(white).sub_(mean).div_(std)


def eval_transform_uint8(preprocess_cfg: Mapping[str, Any]) -> Callable[["Image"], "Image"]:
    """Return open_clip's eval transform without its last two steps."""
    from open_clip.transform import MaybeToTensor
    from torchvision.transforms import Compose, Normalize

    steps: Any = eval_transform(ModelSpec("", {}, preprocess_cfg)).transforms  # type: ignore[attr-defined]
    if not (isinstance(steps[-2], MaybeToTensor) and isinstance(steps[-1], Normalize)):
        raise DataError(
            "this open_clip's eval transform does not end in ToTensor and Normalize",
            hint="install a release of open_clip_torch that clipmerge was tested with",
        )
    shaped: Callable[[Image], Image] = Compose(steps[:-2])
    return shaped


def image_size(preprocess_cfg: Mapping[str, Any]) -> tuple[int, int]:
    """Return the height and width of what a model takes."""
    size = preprocess_cfg.get("size", 224)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))


def _key(split: Split, preprocess_cfg: Mapping[str, Any]) -> str:
    """Return a digest of what the pixels depend on: the images' content, the transform, the library that runs it."""
    import PIL

    fields = {"interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}
    fields |= {key: preprocess_cfg[key] for key in _FIELDS if preprocess_cfg.get(key) is not None}
    fields |= {"size": image_size(preprocess_cfg), "pillow": PIL.__version__}
    text = json.dumps(fields, sort_keys=True)
    return blake3(b"clipmerge pixels 1\0" + text.encode() + split.keys.tobytes()).hexdigest()
