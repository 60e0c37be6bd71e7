"""One checkpoint from one layout to another: names and views change, bytes do not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clipmerge.checkpoint.configs import to_huggingface_config, to_text
from clipmerge.checkpoint.huggingface import to_huggingface
from clipmerge.checkpoint.output import check_folder, check_target, new_files, whole_folder, write_at
from clipmerge.checkpoint.processors import for_open_clip, to_processor
from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.safetensors import header
from clipmerge.checkpoint.siglip import for_open_clip_alone
from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.errors import CheckpointError, MismatchError
from clipmerge.types import Progress

LAYOUTS = ("open_clip", "huggingface")
BLOCK = 1 << 20


def convert(
    checkpoint: Checkpoint, path: Path, to: str, *, force: bool = False, on_progress: Progress | None = None
) -> Path:
    """Write the checkpoint as one safetensors file under the names of `to`. Returns its path.

    Raises:
        MismatchError: a tensor has no place in the other layout.
        OutputError: the output exists, is the input, or cannot be written.
    """
    if to not in LAYOUTS:
        raise CheckpointError(
            f"there is no layout {to!r} to convert to", hint=f"one of: {', '.join(LAYOUTS)}"
        )
    tensors = to_huggingface(checkpoint.tensors) if to == "huggingface" else checkpoint.tensors
    real = check_target(path, force=force, inputs=checkpoint.files())
    head, offsets, size = header(tensors, {"format": "pt", **checkpoint.metadata})
    with Reader((checkpoint,)) as reader, new_files([(real, size)], force=force) as (descriptor,):
        write_at(descriptor, real, 0, head)
        done = len(head)
        for name, offset in offsets.items():
            for low, block in reader.blocks(tensors[name], BLOCK):
                write_at(descriptor, real, offset + low * block.itemsize, block.view(np.uint8))
                done += block.nbytes
                if on_progress:
                    on_progress("converting", done, size)
        reader.unchanged()
    return real


def convert_folder(
    checkpoint: Checkpoint,
    folder: Path,
    to: str,
    model: Mapping[str, Any],
    *,
    force: bool = False,
    on_progress: Progress | None = None,
) -> Path:
    """Write a folder that open_clip (`local-dir:`) or transformers (`CLIPModel.from_pretrained`) loads.

    Args:
        model: the model record {"name", "config", "preprocess"}: the configuration files are made of it.

    Raises:
        MismatchError: a tensor, or the model, has no place in the other layout.
        OutputError: a file of the folder exists, is the input, or cannot be written; nothing is left behind.
    """
    config, preprocess = model["config"], model.get("preprocess") or {}
    configs: dict[str, Any]
    if to == "open_clip":
        ours = {"model_cfg": for_open_clip_alone(config), "preprocess_cfg": for_open_clip(preprocess)}
        weights, configs = "open_clip_model.safetensors", {"open_clip_config.json": ours}
    else:
        weights, configs = "model.safetensors", {"config.json": to_huggingface_config(config)}
        if configs["config.json"] is None:
            raise MismatchError(
                f"transformers has no configuration for {model.get('name')}",
                hint="it has CLIP with two transformer towers, and SigLIP; write the weights alone with -o FILE",
            )
        if (processor := to_processor(preprocess)) is not None:
            configs["preprocessor_config.json"] = processor
    names = (*configs, weights)
    check_folder(folder, names, force=force, inputs=list(checkpoint.files()))
    with whole_folder(folder, names) as stage:
        convert(checkpoint, stage / weights, to, on_progress=on_progress)
        for file, content in configs.items():
            (stage / file).write_bytes(to_text(content))
    return folder
