"""Fetch weights by reference: `hf-hub:org/name` from the Hub, `ViT-B-32:openai` from open_clip's table.

Only the second form needs open_clip, and only inside its function: it is the one exception that the contract "merging
needs no model library" lists.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from clipmerge.errors import CheckpointError
from clipmerge.text import did_you_mean

_HUB = re.compile(r"hf-hub:(?P<model>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_TAG = re.compile(r"(?P<model>[\w.-]+):(?P<tag>[\w.-]+)")
_WEIGHTS = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin",
    "adapter_model.safetensors", "adapter_model.bin",
)  # fmt: skip
"""What to ask a repository for: open_clip's own names, then Hugging Face's, then peft's."""
_CONFIGS = ("open_clip_config.json", "config.json", "preprocessor_config.json", "adapter_config.json")
_PREPROCESS = ("size", "mean", "std", "interpolation", "resize_mode")


def is_reference(text: str) -> bool:
    """Return whether the text is `hf-hub:org/name` or `model:tag`."""
    return bool(_HUB.fullmatch(text) or _TAG.fullmatch(text))


def download(reference: str) -> tuple[Path, str, dict[str, Any]]:
    """Fetch what a reference names, or find it in open_clip's and Hugging Face's caches.

    Returns:
        The file on this machine, what to call it, and what open_clip knows about it.

    Raises:
        CheckpointError: no such model or tag, or it cannot be fetched.
    """
    try:
        if match := _HUB.fullmatch(reference):
            path = _from_hub(reference, match["model"], match["revision"])
            return path, match["model"].rpartition("/")[2], {}
        model, _, tag = reference.partition(":")
        return _from_open_clip(reference, model, tag)
    except CheckpointError:
        raise
    except Exception as error:  # whatever network, server and libraries come up with
        first = str(error).strip().partition("\n")[0][:300]
        raise CheckpointError(
            f"{reference} cannot be fetched: {first}",
            hint="check the name and the network, or give a local file",
        ) from error


def _from_open_clip(reference: str, model: str, tag: str) -> tuple[Path, str, dict[str, Any]]:
    from open_clip import get_model_config
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained

    config = get_pretrained_cfg(model, tag)
    if not config:
        known, otherwise = list_pretrained(as_str=True), "open_clip.list_pretrained() lists them"
        hint = did_you_mean(reference, known, otherwise)
        raise CheckpointError(f"open_clip has no pretrained weights {reference!r}", hint=hint)
    preprocess = {key: config[key] for key in _PREPROCESS if config.get(key) is not None}
    record = {"name": model, "config": get_model_config(model), "preprocess": preprocess}
    extra = {"model": record, **({"quick_gelu": True} if config.get("quick_gelu") else {})}
    return Path(download_pretrained(config)), f"{model}_{tag}", extra


def _from_hub(reference: str, model: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(name: str) -> str | None:
        try:
            return hf_hub_download(model, name, revision=revision)
        except LocalEntryNotFoundError:  # out of reach: each further name would cost half a minute of retries
            raise
        except EntryNotFoundError:
            return None

    try:
        path = next((path for name in _WEIGHTS if (path := fetch(name))), None)
    except LocalEntryNotFoundError as error:
        cached = (try_to_load_from_cache(model, name, revision=revision) for name in _WEIGHTS)
        path = next((path for path in cached if isinstance(path, str)), None)
        if path is None:
            raise CheckpointError(
                f"{reference} cannot be fetched: the Hub is out of reach, and the cache does not hold it",
                hint="check the network, or give a local file",
            ) from error
        return Path(path)  # the configurations that the cache has lie beside it
    if path is None:
        raise CheckpointError(
            f"{reference} cannot be fetched: it holds none of {', '.join(_WEIGHTS)}",
            hint="download the file that you mean and give its path",
        )
    with suppress(LocalEntryNotFoundError):
        for name in _CONFIGS:
            fetch(name)
    return Path(path)
