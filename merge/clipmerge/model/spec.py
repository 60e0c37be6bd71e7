"""Which model: an open_clip name, a configuration, or what weights record about themselves."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipmerge.errors import ModelError
from clipmerge.text import nearest
from clipmerge.weights.record import needs_quick_gelu

if TYPE_CHECKING:
    from clipmerge.weights.weights import Weights

__all__ = ["ModelSpec", "known_models", "resolve_model"]

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
        """The "model" record that files written by clipmerge carry."""
        return json.loads(  # type: ignore[no-any-return]
            json.dumps({"name": self.name, "config": dict(self.config), "preprocess": dict(self.preprocess)})
        )

    @classmethod
    def from_metadata(cls, record: Mapping[str, Any]) -> "ModelSpec":
        """The model that a file's "model" record names; one without a configuration is looked up by name."""
        if not isinstance(record.get("config"), Mapping):
            return _named(str(record.get("name", "")))
        return _spec(str(record.get("name", "model")), record["config"], record.get("preprocess"))


def known_models() -> list[str]:
    """Every model name that open_clip knows."""
    import open_clip

    return list(open_clip.list_models())


def resolve_model(model: "str | Path | ModelSpec | None", *weights: "Weights") -> ModelSpec:
    """The model that `model` names, or the one that the weights' own metadata records.

    Args:
        model: an open_clip name, "hf-hub:org/repo", the path of an open_clip JSON configuration (bare, or
            with "model_cfg" and "preprocess_cfg" as in open_clip_config.json), or None: what weights record.
        weights: where to look when `model` is None; also what says that the weights need QuickGELU.

    Raises:
        ModelError: no such model, an unreadable configuration, or weights that name none or different ones.
    """
    if isinstance(model, ModelSpec):
        return model
    spec = _recorded(weights) if model is None else _find(model)
    return _with_quick_gelu(spec) if any(_trained_with_quick_gelu(w) for w in weights) else spec


def _recorded(weights: Sequence["Weights"]) -> ModelSpec:
    found = [record for record in (w.model for w in weights) if record]
    if not found:
        from clipmerge.model.alike import alike

        names = alike(weights[0]) if weights else []
        raise ModelError(
            "no model is named, and the checkpoints do not record theirs",
            hint=f"their sizes are those of {' or '.join(names)}: name the right one (--model)"
            if names
            else "name it (--model): an open_clip name such as ViT-B-32, or an open_clip JSON config",
        )
    specs = [ModelSpec.from_metadata(record) for record in found]
    for other in specs[1:]:
        if other.config != specs[0].config:
            raise ModelError(
                f"the checkpoints were made by different models: {specs[0].name} and {other.name}",
                hint="score them apart, or name the model that fits all of them with --model",
            )
    return specs[0]


def _find(model: str | Path) -> ModelSpec:
    path = Path(model)
    if isinstance(model, Path) or path.suffix == ".json" or path.is_file():
        return _from_file(path)
    return _named(model)


def _from_file(path: Path) -> ModelSpec:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror}", hint="check the path of the model config"
        ) from error
    except ValueError as error:
        raise ModelError(
            f"{path} is not JSON: {error}", hint="--model takes an open_clip JSON config"
        ) from error
    inner = document.get("model_cfg", document) if isinstance(document, dict) else {}
    preprocess = document.get("preprocess_cfg") if isinstance(document, dict) else None
    missing = [key for key in _SECTIONS if not isinstance(inner, dict) or key not in inner]
    if missing:
        raise ModelError(
            f"{path} is no open_clip model config: {', '.join(missing)} missing",
            hint="it needs embed_dim, vision_cfg and text_cfg, at the top or under model_cfg",
        )
    name = path.parent.name if path.stem == "open_clip_config" else path.stem
    return _spec(name, inner, preprocess)


def _named(name: str) -> ModelSpec:
    import open_clip

    if name.startswith("hf-hub:"):
        from open_clip.pretrained import download_pretrained_from_hf

        found = _from_file(Path(download_pretrained_from_hf(name[7:], filename="open_clip_config.json")))
        return ModelSpec(name, found.config, found.preprocess)
    config = open_clip.get_model_config(name.replace("/", "-"))
    if config is None:
        close = nearest(name, known_models())
        raise ModelError(
            f"there is no model {name!r}",
            hint=f"did you mean {close}?"
            if close
            else "an open_clip name such as ViT-B-32, or a JSON config",
        )
    return _spec(name.replace("/", "-"), config, _common_preprocess(name.replace("/", "-")))


def _common_preprocess(name: str) -> dict[str, Any] | None:
    """What all pretrained weights of this name agree on (SigLIP's mean and std, say), else None."""
    import open_clip

    wanted = ("mean", "std", "interpolation", "resize_mode")
    seen = []
    for tag in open_clip.list_pretrained_tags_by_model(name):
        tagged = open_clip.get_pretrained_cfg(name, tag)
        seen.append({key: tagged[key] for key in wanted if tagged.get(key) is not None})
    return seen[0] if seen and all(other == seen[0] for other in seen) else None


def _spec(name: str, config: Mapping[str, Any], preprocess: Mapping[str, Any] | None) -> ModelSpec:
    from dataclasses import asdict

    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    plain = json.loads(json.dumps(dict(config)))
    size = plain.get("vision_cfg", {}).get("image_size", 224)
    base = {**asdict(PreprocessCfg()), "size": size}
    return ModelSpec(name, plain, merge_preprocess_dict(base, dict(preprocess or {})))


def _trained_with_quick_gelu(weights: "Weights") -> bool:
    return any(needs_quick_gelu(checkpoint) for checkpoint in weights.checkpoints)


def _with_quick_gelu(spec: ModelSpec) -> ModelSpec:
    return ModelSpec(spec.name, {**spec.config, "quick_gelu": True}, spec.preprocess)
