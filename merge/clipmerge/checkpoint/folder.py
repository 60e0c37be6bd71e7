"""The one checkpoint in a folder, as open_clip and Hugging Face lay folders out."""

from pathlib import Path

from clipmerge.checkpoint.index import SUFFIX
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
