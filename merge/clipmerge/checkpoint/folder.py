"""The one checkpoint in a folder, as open_clip and Hugging Face lay folders out."""

from pathlib import Path
from typing import Any

from clipmerge.checkpoint.index import SUFFIX
from clipmerge.checkpoint.safetensors import parse_json
from clipmerge.errors import CheckpointError

PREFERRED = (
    "open_clip_model.safetensors",
    "open_clip_model.safetensors.index.json",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
"""open_clip's own names first: its folders on the Hub often carry a Hugging Face copy too."""

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", SUFFIX)
_CONFIGS = {"open_clip_config.json": "open_clip_config", "config.json": "huggingface_config"}
_MAX_CONFIG = 1 << 20


def checkpoint_in(folder: Path) -> Path:
    """The checkpoint that a folder is about.

    Raises:
        CheckpointError: there is none, or there are several and no name tells which.
    """
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from error
    for name in PREFERRED:
        if name in names:
            return folder / name
    found = [name for name in names if name.endswith(_SUFFIXES) and not name.startswith(".")]
    indexes = [name for name in found if name.endswith(SUFFIX)]
    if len(indexes) == 1:
        return folder / indexes[0]
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint", hint="give the file, or a folder that has one")
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} holds {len(found)} checkpoints: {', '.join(found[:8])}{' …' if len(found) > 8 else ''}",
            hint="give one of the files",
        )
    return folder / found[0]


def configs_beside(path: Path) -> dict[str, Any]:
    """The model's configuration files next to a checkpoint, parsed: `open_clip_config`, `huggingface_config`."""
    found: dict[str, Any] = {}
    for name, key in _CONFIGS.items():
        config = path.parent / name
        try:
            with config.open("rb") as file:
                text = file.read(_MAX_CONFIG + 1)
        except OSError:
            continue
        if len(text) > _MAX_CONFIG:
            raise CheckpointError(f"{config} is too large for a model's configuration", hint="remove it")
        found[key] = parse_json(config, text)
    return found
