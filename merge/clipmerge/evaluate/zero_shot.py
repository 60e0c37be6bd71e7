"""The zero-shot head as weights, so that a model without a head can be merged with one whose head was trained."""

from collections.abc import Mapping
from typing import Any

import torch

from clipmerge.data.prompts import check_templates
from clipmerge.errors import MismatchError
from clipmerge.evaluate.heads import zero_shot_head
from clipmerge.model import ModelSpec, build_model, get_tokenizer, load_weights, resolve_model
from clipmerge.weights.digest import content_digest
from clipmerge.weights.provenance import HEAD_OF
from clipmerge.weights.record import FORMAT, write_record
from clipmerge.weights.weights import Weights, as_checkpoint, from_state_dict

__all__ = ["head_recipe", "rebuild_head", "with_zero_shot_head"]

HEAD = "classification_head"


def with_zero_shot_head(
    weights: Weights, tuned: Weights, model: "ModelSpec | str | None" = None
) -> tuple[Weights, Mapping[str, Any]]:
    """Give weights the zero-shot head of their own text tower, for the classes of another model's trained head.

    exp(logit_scale) is part of its weight and the bias is 0: it scores as the model without a head does, and is what
    WiSE-FT interpolates from.

    Args:
        weights: one checkpoint with a text tower and without a head.
        tuned: records the classes and prompts that its head was trained on.

    Returns:
        The weights with the head, and what it is made of: "base" (a digest), "model", "templates", "classes", "bias".

    Raises:
        MismatchError: `tuned` does not record the classes of its head, or `weights` have no text tower.

    Source: Wortsman et al. 2022, arXiv 2109.01903, section 3.
    """
    recipe = head_recipe(weights, tuned, model)
    return rebuild_head(recipe, weights).completed_from(weights), recipe


def head_recipe(weights: Weights, tuned: Weights, model: "ModelSpec | str | None" = None) -> dict[str, Any]:
    """Return what the head of `with_zero_shot_head` is made of, as records hold it."""
    rows = tuned.tensor(f"{HEAD}.weight").shape[0]
    entries = [entry for entry in tuned.prompts if len(entry.get("classes", ())) == rows]
    if len(entries) != 1:
        raise MismatchError(
            f"{tuned!r} has a trained head and does not record its {rows} classes, {weights!r} has no head",
            hint="finetune with --save-start, and interpolate from NAME.run/NAME.start.safetensors, which has one",
        )
    if not any(name.startswith(("transformer.", "text.")) for name in weights.names):
        raise MismatchError(
            f"{weights!r} has neither a head nor a text tower to build one from",
            hint="take the model that was finetuned, with its text tower, as the base",
        )
    return {
        "base": content_digest(as_checkpoint(weights)),
        "model": resolve_model(model, weights, tuned).to_metadata(),
        "templates": list(check_templates(entries[0]["templates"], repr(tuned))),
        "classes": list(entries[0]["classes"]),
        "bias": f"{HEAD}.bias" in tuned.names,
    }


def rebuild_head(recipe: Mapping[str, Any], weights: Weights) -> Weights:
    """Build the head of a recipe from the text tower of these weights: a checkpoint of the head alone."""
    spec = ModelSpec.from_metadata(recipe["model"])
    net: Any = build_model(spec)
    load_weights(net, weights)
    with torch.no_grad():
        head = zero_shot_head(net, get_tokenizer(spec), recipe["classes"], recipe["templates"])
        tensors = {f"{HEAD}.weight": head * net.logit_scale.exp()}
    if recipe["bias"]:
        tensors[f"{HEAD}.bias"] = torch.zeros(len(head))
    record = {"format": FORMAT, "total": 1, HEAD_OF: dict(recipe)}
    return from_state_dict(tensors, "zero_shot_head", write_record(record))
