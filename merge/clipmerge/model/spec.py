"""Resolve which model is meant: an open_clip name, a configuration, or what weights record about themselves."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipmerge.errors import ModelError
from clipmerge.model.guess import guess_model
from clipmerge.text import did_you_mean
from clipmerge.weights.record import needs_quick_gelu

if TYPE_CHECKING:
    from clipmerge.weights.weights import Weights

__all__ = ["ModelSpec", "resolve_model"]

_SECTIONS = ("embed_dim", "vision_cfg", "text_cfg")


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
        return json.loads(  # type: ignore[no-any-return]
            json.dumps({"name": self.name, "config": dict(self.config), "preprocess": dict(self.preprocess)})
        )

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
    if isinstance(model, ModelSpec):
        return model
    if model is None:
        spec = _recorded(weights)
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
        names = (
            guess_model({n: t.shape for n, t in weights[0].checkpoints[0].tensors.items()}) if weights else []
        )
        raise ModelError(
            "no model is named, and the checkpoints do not record theirs",
            hint=f"their sizes are those of {' or '.join(names)}: name the right one (--model)"
            if names
            else "name it (--model): an open_clip name such as ViT-B-32, or an open_clip JSON config",
        )
    for other in specs[1:]:
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
        problem = (
            f"cannot be read: {error.strerror}" if isinstance(error, OSError) else f"is not JSON: {error}"
        )
        raise ModelError(
            f"{path} {problem}", hint="check the path: --model takes an open_clip JSON config"
        ) from error
    document = document if isinstance(document, dict) else {}
    config = document.get("model_cfg", document)
    missing = [key for key in _SECTIONS if not isinstance(config, dict) or key not in config]
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
        otherwise = "an open_clip name such as ViT-B-32, or a JSON config"
        raise ModelError(
            f"there is no model {name!r}", hint=did_you_mean(name, open_clip.list_models(), otherwise)
        )
    return _spec(known, config, _common_preprocess(known))


def _common_preprocess(name: str) -> dict[str, Any] | None:
    """Return what all pretrained weights of this name agree on (SigLIP's mean and std, say), else None."""
    import open_clip

    configs = [
        open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)
    ]
    keys = ("mean", "std", "interpolation", "resize_mode")
    chosen = [{key: c[key] for key in keys if c.get(key) is not None} for c in configs]
    return chosen[0] if chosen and all(other == chosen[0] for other in chosen) else None


def _spec(name: str, config: Mapping[str, Any], preprocess: Mapping[str, Any] | None) -> ModelSpec:
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    plain = json.loads(json.dumps(dict(config)))
    size = plain.get("vision_cfg", {}).get("image_size", 224)
    base = {**asdict(PreprocessCfg()), "size": size}
    return ModelSpec(name, plain, merge_preprocess_dict(base, dict(preprocess or {})))
