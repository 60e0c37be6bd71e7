"""Write a model folder as the Hugging Face Hub and open_clip's `local-dir:` expect it, and upload it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipmerge.checkpoint.output import check_folder, whole_folder
from clipmerge.checkpoint.processors import for_open_clip
from clipmerge.checkpoint.siglip import for_open_clip_alone
from clipmerge.errors import ModelError, OutputError, RecipeError
from clipmerge.model import ModelSpec, build_model, resolve_model
from clipmerge.report.card import model_card, shared_license
from clipmerge.weights.weights import Weights

WEIGHTS, CONFIG, CARD = "open_clip_model.safetensors", "open_clip_config.json", "README.md"


def save_folder(
    weights: Weights,
    folder: str | Path,
    *,
    model: str | Path | ModelSpec | None = None,
    metadata: Mapping[str, Any] | None = None,
    license: str | None = None,
    force: bool = False,
    **options: Any,
) -> Path:
    """Write weights, open_clip_config.json and a model card into `folder`, whole or not at all.

    `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads it. Other files in the folder stay.

    Args:
        model: an open_clip name or configuration; None takes `metadata["model"]` or what the checkpoints record.
        metadata: further keys of the record; "scores" and "selection" also appear on the card.
        license: what the card names; None takes the one that all checkpoints state, or leaves it out.
        force: replace these three files where they exist.
        **options: as in `Weights.save`.

    Raises:
        ModelError: the model is unknown, or the weights do not fit it.
        MismatchError: open_clip has no name for the model.
        OutputError: the files exist, one of them is an input, or the folder cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    recorded = (metadata or {}).get("model")
    if model is None and recorded is not None:
        model = ModelSpec.from_metadata(recorded)
    spec = check_save(weights, folder, model=model, force=force, shard_size=options.get("shard_size"))
    record = {**(metadata or {}), "model": spec.to_metadata()}
    if license := license or shared_license(weights.checkpoints):
        record["license"] = license
    config = {"model_cfg": for_open_clip_alone(spec.config), "preprocess_cfg": for_open_clip(spec.preprocess)}
    with whole_folder(folder, (CONFIG, CARD, WEIGHTS)) as stage:
        written = weights.save(stage / WEIGHTS, metadata=record, **options)
        (stage / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (stage / CARD).write_text(model_card(folder.name, written), encoding="utf-8")
    return folder


def check_save(
    weights: Weights,
    folder: Path,
    *,
    model: str | Path | ModelSpec | None = None,
    force: bool = False,
    shard_size: int | None = None,
) -> ModelSpec:
    """Refuse what `save_folder` would refuse, from headers alone. Returns the model that the folder would name."""
    if weights.kind() != 1:
        raise RecipeError(
            "a task vector is not a model to publish", hint="write it to a file: -o NAME.safetensors"
        )
    if shard_size is not None:
        raise OutputError("open_clip loads one file from a folder, not shards", hint="leave --shard-size out")
    inputs = [file for checkpoint in weights.sources for file in checkpoint.files()]
    check_folder(folder, (WEIGHTS, CONFIG, CARD), force=force, inputs=inputs)
    if own := [c for c in weights.checkpoints if c.extra.get("without_place")]:
        raise ModelError(
            f"{own[0].path or own[0].name} keeps its own names, as open_clip has no such model, nor a folder for one",
            hint="write model.safetensors beside a copy of the input's config.json: -o DIR/model.safetensors",
        )
    spec = resolve_model(model, weights)
    for_open_clip_alone(spec.config, quiet=True)
    if any(name.startswith("classification_head.") for name in weights.names):
        raise ModelError(
            "open_clip has no place for a trained classification head",
            hint="write it to a file instead: -o NAME.safetensors",
        )
    weights.check_fit(build_model(spec, "meta"))  # open_clip loads the file strictly
    return spec


def push(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload a folder that `save_folder` wrote to the Hub. Returns the address of the model.

    Uses the token that `huggingface-cli login` or HF_TOKEN left.

    Raises:
        OutputError: the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api, files = HfApi(), [WEIGHTS, CONFIG, CARD]
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        message = "Upload merged weights"
        api.upload_folder(repo_id=repo, folder_path=str(folder), allow_patterns=files, commit_message=message)
    except Exception as error:  # which HTTP library huggingface_hub speaks through is its own affair
        raise OutputError(
            f"{repo} could not be uploaded: {error}",
            hint="check the name ORG/NAME and your login: `hf auth login`; the folder is complete on disk",
        ) from error
    return str(address)
