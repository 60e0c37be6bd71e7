"""Resolve which model is meant: an open_clip name, a configuration, or what weights record about themselves."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipmerge.errors import ModelError
from clipmerge.text import did_you_mean
from clipmerge.weights.record import needs_quick_gelu

if TYPE_CHECKING:
    from clipmerge.weights.weights import Weights

__all__ = ["ModelSpec", "resolve_model"]


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """Everything needed to build a model and to prepare its images and prompts.

    Attributes:
        name: open_clip's name, or the stem of the file that the configuration came from.
        config: open_clip's model_cfg (embed_dim, vision_cfg, text_cfg, quick_gelu, custom_text …).
        preprocess: open_clip's preprocess_cfg (size, mean, std, interpolation, resize_mode, fill_color).
    """

    name: str
    config: Mapping[str, Any]
    preprocess: Mapping[str, Any]

    def to_metadata(self) -> dict[str, Any]:
        """Return the "model" record that files written by clipmerge carry."""
        record = {"name": self.name, "config": dict(self.config), "preprocess": dict(self.preprocess)}
        return json.loads(json.dumps(record))  # type: ignore[no-any-return]

    @classmethod
    def from_metadata(cls, record: Mapping[str, Any]) -> "ModelSpec":
        """Return the model that a file's "model" record names; one without a configuration is looked up by name."""
        if not isinstance(record.get("config"), Mapping):
            return _named(str(record.get("name", "")))
        return _spec(str(record.get("name", "model")), record["config"], record.get("preprocess"))


def resolve_model(model: "str | Path | ModelSpec | None", *weights: "Weights") -> ModelSpec:
    """Return the model that `model` names, or the one that the weights' own metadata records.

    Args:
        model: an open_clip name, "hf-hub:org/repo", the path of an open_clip JSON configuration (bare, or
            with "model_cfg" and "preprocess_cfg" as in open_clip_config.json), or None: what weights record.
        weights: where to look when `model` is None; also what says that the weights need QuickGELU.

    Raises:
        ModelError: no such model, an unreadable configuration, or weights that name none or different ones.
    """
    if model is None:
        spec = _recorded(weights)
    elif isinstance(model, ModelSpec):
        spec = model
    elif isinstance(model, Path) or model.endswith(".json") or Path(model).is_file():
        spec = _from_file(Path(model))
    else:
        spec = _named(model)
    if any(needs_quick_gelu(checkpoint) for w in weights for checkpoint in w.checkpoints):
        return ModelSpec(spec.name, {**spec.config, "quick_gelu": True}, spec.preprocess)
    return spec


def _recorded(weights: Sequence["Weights"]) -> ModelSpec:
    specs = [ModelSpec.from_metadata(record) for record in (w.model for w in weights) if record]
    if not specs:
        raise ModelError(
            "no model is named, and the checkpoints do not record theirs",
            hint="name it (--model): an open_clip name such as ViT-B-32, or an open_clip JSON config",
        )
    for other in specs[1:]:
        if other.config == specs[0].config and other.preprocess != specs[0].preprocess:
            differing = [key for key, value in other.preprocess.items() if value != specs[0].preprocess[key]]
            one, two = ({key: s.preprocess[key] for key in differing} for s in (specs[0], other))
            raise ModelError(
                f"the checkpoints were made with different preprocessing: {one} and {two}",
                hint="score them apart, or give the preprocessing for all: --model with a JSON config",
            )
        if other.config != specs[0].config:
            raise ModelError(
                f"the checkpoints were made by different models: {specs[0].name} and {other.name}",
                hint="score them apart, or name the model that fits all of them with --model",
            )
    return specs[0]


def _from_file(path: Path) -> ModelSpec:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else f"it is not JSON: {error}"
        hint = "check the path: --model takes an open_clip JSON config"
        raise ModelError(f"{path} cannot be read: {problem}", hint=hint) from error
    config = document.get("model_cfg", document) if isinstance(document, dict) else None
    config = config if isinstance(config, dict) else {}
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise ModelError(
            f"{path} is no open_clip model config: {', '.join(missing)} missing",
            hint="it needs embed_dim, vision_cfg and text_cfg, at the top or under model_cfg",
        )
    name = path.parent.name if path.stem == "open_clip_config" else path.stem
    return _spec(name, config, document.get("preprocess_cfg"))


def _named(name: str) -> ModelSpec:
    import open_clip

    if name.startswith("hf-hub:"):
        from open_clip.pretrained import download_pretrained_from_hf

        spec = _from_file(Path(download_pretrained_from_hf(name[7:], filename="open_clip_config.json")))
        return ModelSpec(name, spec.config, spec.preprocess)
    known = name.replace("/", "-")
    config = open_clip.get_model_config(known)
    if config is None:
        hint = did_you_mean(
            name, open_clip.list_models(), "an open_clip name such as ViT-B-32, or a JSON config"
        )
        raise ModelError(f"there is no model {name!r}", hint=hint)
    return _spec(known, config, _common_preprocess(known))


def _common_preprocess(name: str) -> dict[str, Any] | None:
    """Return what all pretrained weights of this name agree on (SigLIP's mean and std, say), else None."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    configs = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
    keys = ("mean", "std", "interpolation", "resize_mode")
    chosen = [{key: c[key] for key in keys if c.get(key) is not None} for c in configs]
    return chosen[0] if chosen and all(other == chosen[0] for other in chosen) else None


def _spec(name: str, config: Mapping[str, Any], preprocess: Mapping[str, Any] | None) -> ModelSpec:
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    plain = json.loads(json.dumps(dict(config)))
    size = plain.get("vision_cfg", {}).get("image_size", 224)
    base = {**asdict(PreprocessCfg()), "size": size}
    return ModelSpec(name, plain, merge_preprocess_dict(base, dict(preprocess or {})))
