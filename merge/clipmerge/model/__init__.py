"""Weights ↔ open_clip models: the only room that knows how open_clip builds, names and preprocesses."""

from clipmerge.model.build import build_model, eval_transform, get_tokenizer
from clipmerge.model.load import load_weights, refuse_misfit, save_model, weights_of
from clipmerge.model.spec import ModelSpec, resolve_model

__all__ = [
    "ModelSpec",
    "build_model",
    "eval_transform",
    "get_tokenizer",
    "load_weights",
    "refuse_misfit",
    "resolve_model",
    "save_model",
    "weights_of",
]
