"""`hf-hub:org/name` and `ViT-B-32:openai`, fetched by open_clip's own download code.

open_clip is imported by name inside the function: this room must not depend on a model library (an import
contract checks that), and only these two forms of a path need one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from clipmerge.errors import CheckpointError
from clipmerge.text import nearest

_HUB = re.compile(r"hf-hub:(?P<model>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_TAG = re.compile(r"(?P<model>[\w.-]+):(?P<tag>[\w.-]+)")
_FILES = (None, "model.safetensors", "pytorch_model.bin")
"""What to ask a repository for: open_clip's own names (its default), then Hugging Face's."""
_PREPROCESS = ("size", "mean", "std", "interpolation", "resize_mode")


@dataclass(frozen=True, slots=True)
class Download:
    """A file on this machine, what to call it, and what open_clip knows about it."""

    path: Path
    stem: str
    extra: dict[str, Any] = field(default_factory=dict)


def is_reference(text: str) -> bool:
    """True for `hf-hub:org/name` and `model:tag`."""
    return bool(_HUB.fullmatch(text) or _TAG.fullmatch(text))


def download(reference: str) -> Download:
    """Fetch what a reference names, or find it in open_clip's and Hugging Face's caches.

    Raises:
        CheckpointError: no such model or tag, or it cannot be fetched.
    """
    pretrained = import_module("open_clip.pretrained")
    if match := _HUB.fullmatch(reference):
        path = _from_hub(pretrained, reference, match["model"], match["revision"])
        return Download(path, match["model"].rpartition("/")[2])
    match = _TAG.fullmatch(reference)
    config = pretrained.get_pretrained_cfg(match["model"], match["tag"]) if match else {}
    if not match or not config:
        known = nearest(reference, pretrained.list_pretrained(as_str=True))
        raise CheckpointError(
            f"open_clip has no pretrained weights {reference!r}",
            hint=f"did you mean {known}?" if known else "open_clip.list_pretrained() lists them",
        )
    try:
        path = Path(pretrained.download_pretrained(config))
    except Exception as error:
        raise _failed(reference, error) from error
    return Download(path, f"{match['model']}_{match['tag']}", _known(match["model"], config))


def _known(model: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What open_clip's table says about pretrained weights, as the model record that our files carry."""
    preprocess = {key: config[key] for key in _PREPROCESS if config.get(key) is not None}
    record = {
        "name": model,
        "config": import_module("open_clip").get_model_config(model),
        "preprocess": preprocess,
    }
    return {"model": record, **({"quick_gelu": True} if config.get("quick_gelu") else {})}


def _from_hub(pretrained: Any, reference: str, model: str, revision: str | None) -> Path:
    failure: Exception | None = None
    path: Path | None = None
    for name in _FILES:
        try:
            path = Path(pretrained.download_pretrained_from_hf(model, filename=name, revision=revision))
            break
        except Exception as error:
            failure = failure or error
            if _unreachable(error):  # every further name would cost the same half minute of retries
                path = _kept(model, revision)
                break
    if path is None:
        raise _failed(reference, failure) from failure
    for name in ("open_clip_config.json", "config.json", "preprocessor_config.json"):
        try:
            pretrained.download_pretrained_from_hf(model, filename=name, revision=revision)
        except Exception as error:  # a repository without a configuration still has weights
            if _unreachable(error):  # what the cache has lies beside the weights
                break
    return path


def _kept(model: str, revision: str | None) -> Path | None:
    """A file with weights in Hugging Face's cache, without asking the network."""
    look = import_module("huggingface_hub").try_to_load_from_cache
    found = (look(model, name, revision=revision) for name in _FILES[1:])
    return next((Path(path) for path in found if isinstance(path, str)), None)


def _unreachable(error: Exception | None) -> bool:
    """Whether huggingface_hub found neither the network nor a file in its cache."""
    return type(getattr(error, "__context__", None)).__name__ == "LocalEntryNotFoundError"


def _failed(reference: str, error: Exception | None) -> CheckpointError:
    if _unreachable(error):
        return CheckpointError(
            f"{reference} cannot be fetched: the Hub is out of reach, and the cache does not hold it",
            hint="check the network, or give a local file",
        )
    first = str(error).strip().partition("\n")[0][:300]
    return CheckpointError(
        f"{reference} cannot be fetched: {first}", hint="check the name and the network, or give a local file"
    )
