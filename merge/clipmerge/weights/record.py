"""The record that clipmerge writes into a file's metadata: one JSON document under the key `clipmerge`."""

import json
from collections.abc import Mapping
from typing import Any

from clipmerge.checkpoint.processors import OWN_KEYS
from clipmerge.checkpoint.safetensors import refuse_constant
from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.errors import RecipeError

KEY = "clipmerge"
FORMAT = 1
RECALIBRATED = "recalibrated"
"""Key of which running statistics were taken on images and not from the parents, under "tensors"."""
COMPUTATION = ("notation", "parents", "dtype")
"""Keys that say how the tensors were computed: true of all of them together only."""
MAX_DEPTH = 64
"""Lists and objects within each other in a record that is read; ours go two deeper with each generation."""


def is_statistic(name: str) -> bool:
    """Return whether a tensor is a running statistic of BatchNorm, which images can give."""
    return name.endswith((".running_mean", ".running_var"))


def recalibrated(record: Mapping[str, Any]) -> list[str]:
    """List the running statistics that the record says were taken on images; nothing else can be."""
    entry = record.get(RECALIBRATED)
    names = entry.get("tensors") if isinstance(entry, Mapping) else None
    return [n for n in names if isinstance(n, str) and is_statistic(n)] if isinstance(names, list) else []


def read_record(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Read the record of a file, {} where there is none or it is not ours."""
    text = metadata.get(KEY)
    if text is None:
        return {}
    try:
        record = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(record, dict) or record.get("total", 1) not in (0, 1) or _depth(record) > MAX_DEPTH:
        return {}
    return record


def _depth(document: Any) -> int:
    """How deep lists and objects are nested, without recursion."""
    depth, level = 0, [document]
    while level:
        inside = [value for value in level if isinstance(value, dict | list)]
        level = [v for value in inside for v in (value.values() if isinstance(value, dict) else value)]
        depth += bool(inside)
    return depth


def model_record(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Say which model the checkpoint is for: {"name", "config", "preprocess"}, each where it is known.

    What its own record leaves out is taken from the configuration beside the file.
    """
    own, beside = read_record(checkpoint.metadata).get("model"), checkpoint.extra.get("model")
    said = {**(beside if isinstance(beside, dict) else {}), **(own if isinstance(own, dict) else {})}
    if isinstance(own, dict) and isinstance(beside, dict):
        aside, stated = (p if isinstance(p := m.get("preprocess"), dict) else {} for m in (beside, own))
        if "resize_mode" in stated:
            aside = {key: value for key, value in aside.items() if key not in OWN_KEYS}
        said["preprocess"] = {**aside, **stated}
    config = said.get("config")
    if isinstance(config, dict) and needs_quick_gelu(checkpoint):
        said["config"] = {**config, "quick_gelu": True}
    return said or None


def prompts_of(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """List what the checkpoint records of its prompts, an entry for each set of classes that it was finetuned on.

    An entry has "templates", and may have "classes" (the names in the prompts) and "words" (what the data calls them).
    """
    record = read_record(checkpoint.metadata)
    entries, training = record.get("prompts"), record.get("training")
    if entries is None and isinstance(training, dict) and training.get("templates"):
        templates = training["templates"]  # files of old record them as they were given
        entries = [{"templates": [templates] if isinstance(templates, str) else templates}]
    entries = entries if isinstance(entries, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and _is_entry(entry)]


def _is_entry(entry: Mapping[str, Any]) -> bool:
    """Whether it is lists of texts, and has templates; a file's name is not one, for no path in a file is followed."""
    lists = [entry.get("templates"), entry.get("classes", []), entry.get("words", [])]
    if not lists[0] or not all(isinstance(x, list) and all(isinstance(t, str) for t in x) for x in lists):
        return False
    named = lists[0] in (["openai"], ["simple"])
    return named or all("{}" in text and "{" not in text.replace("{}", "") for text in lists[0])


def needs_quick_gelu(checkpoint: Checkpoint) -> bool:
    """Whether the weights were trained with QuickGELU, as OpenAI's were: no tensor tells, so the record must."""
    recorded = read_record(checkpoint.metadata).get("quick_gelu") is True
    return recorded or checkpoint.layout == "openai" or checkpoint.extra.get("quick_gelu") is True


def with_model(checkpoint: Checkpoint, model: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the checkpoint's record as file metadata, with what is known of its model; {} where nothing is known."""
    record = read_record(checkpoint.metadata)
    known = {
        **({"model": model} if model else {}),
        **({"quick_gelu": True} if needs_quick_gelu(checkpoint) else {}),
    }
    return write_record({"format": FORMAT, "total": 1, **record, **known}) if known else {}


def write_record(record: Mapping[str, Any]) -> dict[str, str]:
    """Write the record as file metadata: keys sorted, so that the same record is the same bytes.

    Bytes of a file's name that are not Unicode become question marks: no safetensors header can hold them.

    Raises:
        RecipeError: something in it has no form in JSON.
    """
    try:
        text = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(
            f"the metadata cannot be recorded: {error}", hint="text, finite numbers, lists and mappings can"
        ) from error
    return {"format": "pt", KEY: text.encode(errors="replace").decode()}
