"""Path → Checkpoint: which kind of file (by content, never by suffix), then open_clip's names."""

import fnmatch
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipmerge.checkpoint import safetensors
from clipmerge.checkpoint.configs import model_beside
from clipmerge.checkpoint.index import SUFFIX, read_index
from clipmerge.checkpoint.layouts import to_open_clip
from clipmerge.checkpoint.tensors import Checkpoint, Tensor, identifiers
from clipmerge.errors import CheckpointError
from clipmerge.text import and_more

LOCAL = "local-dir:"
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


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the checkpoint at `path`: names, shapes, dtypes and where the bytes lie. No tensor is read.

    Args:
        path: a file of any layout, an index of shards, a folder that holds one checkpoint, `local-dir:FOLDER`,
            `hf-hub:org/name`, or open_clip's `model:tag`.

    Returns:
        The checkpoint. What a reader understood besides stands in `extra`: "model" (the record of a configuration
        beside the weights), "saved" (epoch, name … of a training checkpoint), "class" (of a pickled module), "dropped"
        (names left out), "reference" (`hf-hub:…` or `model:tag`, where the file was fetched by one).

    Raises:
        CheckpointError: there is nothing to read there, or it breaks its format's rules.
        UnsafeFileError: reading it would need code to run; says which.
        MismatchError: its names have no place in open_clip's model.
    """
    file = Path(str(path).removeprefix(LOCAL))
    stem = file.name.partition(".")[0] if file.name.endswith(SUFFIX) else file.stem
    extra: dict[str, Any] = {}
    if not os.path.exists(file):  # noqa: PTH110 (unlike Path.exists, it answers for any text)
        from clipmerge.checkpoint import hub

        if not hub.is_reference(str(path)):
            if not any(mark in file.name for mark in "*?["):
                raise CheckpointError(f"{file} does not exist", hint="check the path")
            beside = file.parent.iterdir() if file.parent.is_dir() else ()
            if any(fnmatch.fnmatch(each.name, file.name) for each in beside):
                hint = "leave out the quotes, so that the shell puts the files in its place"
                raise CheckpointError(f"{file} is a pattern, not a file", hint=hint)
            raise CheckpointError(f"no file matches {file}", hint="check the path")
        file, stem, extra = hub.download(str(path))
        extra["reference"] = str(path)
    place = file
    if file.is_dir():
        file, stem = checkpoint_in(file), file.resolve().name
    metadata, tensors, saved = _read(file)
    named = to_open_clip(tensors)
    extra |= saved
    if file.name in PREFERRED and (record := model_beside(file)) is not None:
        extra["model"] = record  # a folder of the Hub's kind says what its model is
    if named.dropped:
        extra["dropped"] = named.dropped
    return Checkpoint(identifiers([stem])[0], named.tensors, metadata, named.layout, place, extra)


def _read(
    path: Path, *, is_shard: bool = False
) -> tuple[Mapping[str, str], Mapping[str, Tensor], dict[str, Any]]:
    """Metadata, tensors under the file's own names, and what else a torch file holds."""
    head = _head(path)
    if safetensors.looks_like(head):
        return *safetensors.read_header(path), {}
    if head.lstrip()[:1] == b"{" and not is_shard:
        return *read_index(path, lambda shard: _read(shard, is_shard=True)[:2]), {}
    from clipmerge.checkpoint import torch_file

    if torch_file.looks_like(head):
        return {}, *torch_file.read_torch(path)
    raise _unknown(path, head)


def checkpoint_in(folder: Path) -> Path:
    """Find the checkpoint that a folder is about.

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
    files = [name for name in names if name.endswith(_SUFFIXES) and not name.startswith(".")]
    indexes = [name for name in files if name.endswith(SUFFIX)]
    if len(indexes) == 1:
        return folder / indexes[0]
    if not files:
        raise CheckpointError(f"{folder} holds no checkpoint", hint="give the file, or a folder that has one")
    if len(files) > 1:
        raise CheckpointError(
            f"{folder} holds {len(files)} checkpoints: {and_more(files)}",
            hint="give one of the files, or for a soup DIR/*.safetensors",
        )
    return folder / files[0]


def _head(path: Path) -> bytes:
    if not path.is_file():
        raise CheckpointError(
            f"{path} is not a file", hint="give a checkpoint file, or a folder that holds one"
        )
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _unknown(path: Path, head: bytes) -> CheckpointError:
    """What a file that is no checkpoint most likely is."""
    if not head:
        return CheckpointError(f"{path} is empty", hint="fetch or save it again")
    if head.startswith(b"version https://git-lfs"):
        return CheckpointError(f"{path} is a git-lfs pointer, not the file", hint="run `git lfs pull`")
    if head.lstrip()[:1] == b"<":
        return CheckpointError(f"{path} is a web page, not a checkpoint", hint="download the file itself")
    if path.suffix == ".safetensors":
        safetensors.read_header(path)
    return CheckpointError(
        f"{path} is not a checkpoint that clipmerge knows",
        hint="it reads .safetensors, torch's .pt, .pth and .bin, and TorchScript archives",
    )
