"""Path → Checkpoint: which kind of file (by content, never by suffix), then open_clip's names."""

from pathlib import Path

from clipmerge.checkpoint import safetensors
from clipmerge.checkpoint.tensors import Checkpoint, identifiers
from clipmerge.errors import CheckpointError


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`: names, shapes, dtypes and where the bytes lie. No tensor is read.

    Raises:
        CheckpointError: there is nothing to read there, or it breaks its format's rules.
    """
    path = Path(path)
    head = _head(path)
    if not safetensors.looks_like(head):
        raise CheckpointError(
            f"{path} is not a checkpoint that clipmerge knows", hint="give a .safetensors file"
        )
    metadata, tensors = safetensors.read_header(path)
    name = identifiers([path.stem])[0]
    return Checkpoint(name, dict(sorted(tensors.items())), metadata, "open_clip", path)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist", hint="check the path") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
