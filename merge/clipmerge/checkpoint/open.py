"""Path → Checkpoint: which kind of file (by content, never by suffix), then open_clip's names."""

import fnmatch
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from clipmerge.checkpoint import safetensors
from clipmerge.checkpoint.adapters import CONFIG, is_adapter, read_adapter
from clipmerge.checkpoint.configs import model_beside, repository
from clipmerge.checkpoint.index import METADATA, SUFFIX, read_index
from clipmerge.checkpoint.layouts import to_open_clip
from clipmerge.checkpoint.other_kinds import refuse_other_kinds
from clipmerge.checkpoint.sets import AVERAGED, RAW, choose_set
from clipmerge.checkpoint.tensors import Checkpoint, Tensor, identifiers
from clipmerge.errors import CheckpointError
from clipmerge.text import and_more

LOCAL = "local-dir:"
Groups = Mapping[str, Mapping[str, Tensor]]
"""Tensors by name, by the key under which a file holds them."""
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
    "adapter_model.safetensors",
    "adapter_model.bin",
)
"""open_clip's own names first: its folders on the Hub often carry a Hugging Face copy too."""

_LONG_SUFFIXES = (SUFFIX, ".pth.tar", ".pt.tar")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", *_LONG_SUFFIXES)
"""What a file that holds weights is called: only in folders is a file known by its name alone."""


_BESIDE = re.compile(
    r"(?:optimizer|optim|scheduler|scaler|rng_state|random_states|training_args|trainer_state|events)",
    re.IGNORECASE,
)
"""How trainers call what they leave beside the weights."""
_POINTER = 1024
"""Bytes: more than a git-lfs pointer has, less than any model."""
_SHARD = re.compile(r"-\d{5}-of-(?!00001\b)\d{5}\.(?:safetensors|bin)$")
"""What transformers calls the shards of one checkpoint."""


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the checkpoint at `path`: names, shapes, dtypes and where the bytes lie. No tensor is read.

    Args:
        path: a file of any layout, an index of shards, a folder that holds one checkpoint, `local-dir:FOLDER`,
            `hf-hub:org/name`, or open_clip's `model:tag`. Behind it, `#ema`, `#raw` or the file's own key chooses one
            of several sets of weights.

    Returns:
        The checkpoint. What a reader understood besides stands in `extra`: "model" (the record of a configuration
        beside the weights), "saved" (epoch, name … of a training checkpoint), "class" (of a pickled module), "dropped"
        (names left out), "without_place" (names for which open_clip has none, so that all kept their own),
        "untranslated" (why the configuration beside it makes no model of open_clip's), "set" (which of several sets of
        weights was chosen), "reference" (`hf-hub:…` or `model:tag`, where it was fetched by one).

    Raises:
        CheckpointError: there is nothing to read there, or it breaks its format's rules.
        UnsafeFileError: reading it would need code to run; says which.
        MismatchError: two of its names become one, or what open_clip keeps in one tensor is incomplete.
    """
    text, choice = str(path).removeprefix(LOCAL), None
    if "#" in text and not os.path.exists(text):  # noqa: PTH110 (unlike Path.exists, it answers for any text)
        text, _, choice = text.rpartition("#")
    if not text.strip():
        raise CheckpointError("the name of a checkpoint is empty", hint="is a variable of the shell unset?")
    file = Path(text)
    stem = file.name.partition(".")[0] if file.name.endswith(_LONG_SUFFIXES) else file.stem
    extra: dict[str, Any] = {}
    if not os.path.exists(file):  # noqa: PTH110
        from clipmerge.checkpoint import hub

        if not hub.is_reference(text):
            if not any(mark in file.name for mark in "*?["):
                piped = "checkpoints are files or folders; none is read from standard input"
                raise CheckpointError(
                    f"{file} does not exist", hint=piped if text == "-" else "check the path"
                )
            beside = file.parent.iterdir() if file.parent.is_dir() else ()
            if any(fnmatch.fnmatch(each.name, file.name) for each in beside):
                hint = "leave out the quotes, so that the shell puts the files in its place"
                raise CheckpointError(f"{file} is a pattern, not a file", hint=hint)
            raise CheckpointError(f"no file matches {file}", hint="check the path")
        file, stem, extra = hub.download(text)
        extra["reference"] = text
    place = file
    if file.is_dir():
        place = file = _snapshot(file)
        stem = repository(file / "x")
        file = checkpoint_in(file)
    elif _SHARD.search(file.name):
        raise CheckpointError(f"{file} is one shard of a checkpoint", hint=f"give the folder, {file.parent}")
    try:
        metadata, groups, saved = _read(file)
    except CheckpointError as error:
        if not (twin := _twin(file)):
            raise
        hint = f"{error.hint or 'fetch it again'}, or give {twin.name}, which lies beside it"
        raise type(error)(error.message, hint=hint) from error
    first: Mapping[str, Tensor] = next(iter(groups.values()), {})
    if is_adapter(first) or (file.stem == "adapter_model" and file.with_name(CONFIG).is_file()):
        return read_adapter(file, place, stem, first)
    where = place if file.name == METADATA else file
    if (unnamed := saved.pop("without_names", None)) and choice in (None, AVERAGED):
        raise CheckpointError(
            f"{where} holds weights as trained and an average of them, {unnamed}, that has no names to go by",
            hint=f"take the first by {where}#{RAW}; or put the average into the model (torch_ema's copy_to) and save "
            "its state_dict()",
        )
    chosen = choose_set(str(where), groups, choice)
    refuse_other_kinds(where, chosen.tensors, saved.get("saved", {}))
    named = to_open_clip(chosen)
    extra |= saved
    if choice is not None:
        extra["set"], stem = choice, f"{stem}_{choice}"
    if named.without_place:
        extra["without_place"] = named.without_place
    # A folder of one model says what it is; of a file among others, what lies beside it need not.
    if (place != file or file.name in PREFERRED) and (record := model_beside(file)) is not None:
        # A configuration of open_clip's is none of a model that open_clip has no place for.
        kept = ("name", "config", "preprocess") if not named.without_place else ("preprocess",)
        extra["model"] = {key: record[key] for key in kept if key in record}
        extra |= {"untranslated": record["untranslated"]} if "untranslated" in record else {}
    if named.dropped:
        extra["dropped"] = named.dropped
    return Checkpoint(identifiers([stem])[0], named.tensors, metadata, named.layout, place, extra)


def _read(path: Path, *, is_shard: bool = False) -> tuple[Mapping[str, str], Groups, dict[str, Any]]:
    """Metadata, tensors under the file's own names by the key that held them, and what else a torch file holds."""
    if path.name == METADATA:
        from clipmerge.checkpoint.distributed_folder import read_distributed

        return {}, read_distributed(path.parent), {}
    head = _head(path)
    if safetensors.looks_like(head):
        metadata, tensors = safetensors.read_header(path)
        return metadata, {"": tensors}, {}
    if head.lstrip()[:1] == b"{" and not is_shard:
        metadata, tensors = read_index(path, _read_shard)
        return metadata, {"": tensors}, {}
    from clipmerge.checkpoint import torch_file

    if torch_file.looks_like(head):
        return {}, *torch_file.read_torch(path)
    raise _unknown(path, head)


def _read_shard(path: Path) -> tuple[Mapping[str, str], Mapping[str, Tensor]]:
    metadata, groups, _ = _read(path, is_shard=True)
    return metadata, next(iter(groups.values()))


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
    if METADATA in names and any(name.endswith(".distcp") for name in names):
        return folder / METADATA
    files = [name for name in names if name.endswith(SUFFIXES) and not name.startswith(".")]
    files = [name for name in files if not _BESIDE.match(name)] or files
    indexes = [name for name in files if name.endswith(SUFFIX)]
    if len(indexes) == 1:
        return folder / indexes[0]
    if not files:
        hint = "give the file, or a folder that has one"
        with suppress(OSError):
            inside = sorted(each.name for each in folder.iterdir() if each.is_dir() and _looks_like_one(each))
            hint = f"give one of the folders in it: {and_more(inside)}" if inside else hint
            if any(each.suffix.lower() in (".jpg", ".jpeg", ".png") for each in folder.glob("*/*")):
                hint = "it looks like images: the DATA of an option, such as --val or --data"
        raise CheckpointError(f"{folder} holds no checkpoint", hint=hint)
    if any(map(_SHARD.search, files)):
        hint = "fetch it too (model.safetensors.index.json); it says which shard holds what"
        raise CheckpointError(f"{folder} holds shards of a checkpoint without their index", hint=hint)
    if len(files) > 1:
        raise CheckpointError(
            f"{folder} holds {len(files)} checkpoints: {and_more(files)}",
            hint="give one of the files, or for a soup DIR/*.safetensors",
        )
    return folder / files[0]


def _snapshot(folder: Path) -> Path:
    """Return the snapshot that a repository's folder in the Hub's cache stands for: its main one, or the only one.

    Any other folder stands for itself.

    Raises:
        CheckpointError: there are several snapshots, and refs/main names none of them.
    """
    inside = folder / "snapshots"
    if not (folder.name.startswith("models--") and inside.is_dir()):
        return folder
    with suppress(OSError, UnicodeDecodeError):
        commit = (folder / "refs" / "main").read_text().strip()
        if re.fullmatch(r"[0-9a-f]{40}", commit) and (inside / commit).is_dir():
            return inside / commit
    snapshots = sorted(each for each in inside.iterdir() if each.is_dir())
    if len(snapshots) == 1:
        return snapshots[0]
    if snapshots:
        raise CheckpointError(
            f"{folder} holds {len(snapshots)} snapshots, and refs/main names none of them",
            hint=f"give one of them: {and_more([str(each) for each in snapshots])}",
        )
    return folder


def _looks_like_one(folder: Path) -> bool:
    names = [entry.name for entry in folder.iterdir()]
    return METADATA in names or any(name.endswith(SUFFIXES) for name in names)


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


def _twin(path: Path) -> Path | None:
    """Return another file of the folder that holds one model's weights by its name, and more than a few bytes."""
    twins = (path.with_name(name) for name in PREFERRED if name != path.name and path.name in PREFERRED)
    return next((twin for twin in twins if twin.is_file() and twin.stat().st_size > _POINTER), None)


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
