"""Path → Checkpoint: which kind of file (by content, never by suffix), then open_clip's names."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipmerge.checkpoint import safetensors
from clipmerge.checkpoint.layouts import to_open_clip
from clipmerge.checkpoint.tensors import Checkpoint, Tensor, identifiers
from clipmerge.errors import CheckpointError

LOCAL = "local-dir:"


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`: names, shapes, dtypes and where the bytes lie. No tensor is read.

    Args:
        path: a file of any layout, an index of shards, a folder that holds one checkpoint, `local-dir:FOLDER`,
            `hf-hub:org/name`, or open_clip's `model:tag`.

    Raises:
        CheckpointError: there is nothing to read there, or it breaks its format's rules.
        UnsafeFileError: reading it would need code to run; says which.
        MismatchError: its names have no place in open_clip's model.

    What a reader understood besides stands in `extra`: "model" (the record of a configuration beside the weights),
    "saved" (epoch, name … of a training checkpoint), "class" (of a pickled module), "dropped" (names left out),
    "reference" (`hf-hub:…` or `model:tag`, where the file was fetched by one).
    """
    given = Path(str(path).removeprefix(LOCAL))
    file, stem = given, _stem(given)
    extra: dict[str, Any] = {}
    if not os.path.exists(given):  # noqa: PTH110 (unlike Path.exists, it answers for any text)
        file, stem, extra = _fetched(str(path), given)
    at = file
    if file.is_dir():
        from clipmerge.checkpoint.folder import checkpoint_in

        file, stem = checkpoint_in(file), file.resolve().name
    metadata, tensors, more = _read(file)
    named = to_open_clip(tensors)
    extra = {**extra, **more, **({"dropped": named.dropped} if named.dropped else {})}
    return Checkpoint(identifiers([stem])[0], named.tensors, metadata, named.layout, at, extra)


def _stem(path: Path) -> str:
    return path.name.partition(".")[0] if path.name.endswith(".index.json") else path.stem


def _read(path: Path) -> tuple[Mapping[str, str], Mapping[str, Tensor], dict[str, Any]]:
    """Metadata, tensors under the file's own names, and what else the file or its folder said."""
    head = _head(path)
    if safetensors.looks_like(head):
        metadata, tensors = safetensors.read_header(path)
        return metadata, tensors, _model(path)
    from clipmerge.checkpoint import torch_file

    if head.lstrip()[:1] == b"{":
        from clipmerge.checkpoint.index import read_index

        metadata, tensors = read_index(path, _read_shard)
        return metadata, tensors, _model(path)
    if torch_file.looks_like(head):
        tensors, extra = torch_file.read_torch(path)
        return {}, tensors, {**extra, **_model(path)}
    raise _unknown(path, head)


def _read_shard(path: Path) -> tuple[Mapping[str, str], Mapping[str, Tensor]]:
    from clipmerge.checkpoint import torch_file

    head = _head(path)
    if safetensors.looks_like(head):
        return safetensors.read_header(path)
    if torch_file.looks_like(head):
        return {}, torch_file.read_torch(path)[0]
    raise _unknown(path, head)


def _model(path: Path) -> dict[str, Any]:
    """What a folder of the Hub's kind says about its model, for files that carry such a folder's names."""
    from clipmerge.checkpoint.folder import PREFERRED

    if path.name not in PREFERRED:
        return {}
    from clipmerge.checkpoint.configs import model_beside

    record = model_beside(path)
    return {} if record is None else {"model": record}


def _fetched(reference: str, given: Path) -> tuple[Path, str, dict[str, Any]]:
    from clipmerge.checkpoint import hub

    if not hub.is_reference(reference):
        raise CheckpointError(f"{given} does not exist", hint="check the path")
    found = hub.download(reference)
    return found.path, found.stem, {**found.extra, "reference": reference}


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
