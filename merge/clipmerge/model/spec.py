"""Resolve which model is meant: an open_clip name, a configuration, or what weights record about themselves."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipmerge.checkpoint.processors import OWN_KEYS
from clipmerge.errors import ClipmergeWarning, MismatchError, ModelError
from clipmerge.text import and_more, did_you_mean
from clipmerge.weights.model_records import combined
from clipmerge.weights.names import lone_tower
from clipmerge.weights.record import model_record, needs_quick_gelu

if TYPE_CHECKING:
    from clipmerge.checkpoint.tensors import Checkpoint
    from clipmerge.weights.weights import Weights

__all__ = ["ModelSpec", "resolve_model"]


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """Everything needed to build a model and to prepare its images and prompts.

    Attributes:
        name: open_clip's name, or the stem of the file that the configuration came from.
        config: open_clip's model_cfg (embed_dim, vision_cfg, text_cfg, quick_gelu, custom_text …).
        preprocess: open_clip's preprocess_cfg (size, mean, std, interpolation, resize_mode, fill_color), and where an
            image processor of transformers' does more than that can say, its "steps".
        stated: the part of `preprocess` that somebody stated; the rest are open_clip's defaults. None: all of it.
    """

    name: str
    config: Mapping[str, Any]
    preprocess: Mapping[str, Any]
    stated: Mapping[str, Any] | None = None

    def to_metadata(self, *, stated: bool = False) -> dict[str, Any]:
        """Return the "model" record that files written by clipmerge carry.

        Args:
            stated: leave out of the preprocessing what nobody stated, so that it competes with nothing later.
        """
        shown = self.stated if stated and self.stated is not None else self.preprocess
        record = {"name": self.name, "config": dict(self.config), "preprocess": dict(shown)}
        return json.loads(json.dumps(record))  # type: ignore[no-any-return]

    @classmethod
    def from_metadata(cls, record: Mapping[str, Any]) -> "ModelSpec":
        """Return the model that a file's "model" record names; one without a configuration is looked up by name."""
        if not isinstance(record.get("config"), Mapping):
            return resolve_model(str(record.get("name", "")))
        return _spec(str(record.get("name", "model")), record["config"], record.get("preprocess") or {})


def resolve_model(model: "str | Path | ModelSpec | None", *weights: "Weights") -> ModelSpec:
    """Return the model that `model` names, or the one that the weights' own metadata records.

    Preprocessing is taken, key by key, from what `model` states, else from what the weights state, else from what all
    of open_clip's weights of that name agree on, else it is open_clip's default.

    Args:
        model: an open_clip name, "hf-hub:org/repo", the path of an open_clip JSON configuration (bare, or
            with "model_cfg" and "preprocess_cfg" as in open_clip_config.json), or None: what weights record.
        weights: where to look when `model` is None; also what says that the weights need QuickGELU.

    Raises:
        ModelError: no such model, an unreadable configuration, or weights that name none or different ones.

    Warns:
        ClipmergeWarning: nothing states the preprocessing, and open_clip's weights of that name do not agree on it.
    """
    checkpoints = list(dict.fromkeys(c for w in weights for c in w.checkpoints))
    quick = any(needs_quick_gelu(checkpoint) for checkpoint in checkpoints)
    if isinstance(model, ModelSpec):
        return replace(model, config={**model.config, "quick_gelu": True}) if quick else model
    preprocess: Mapping[str, Any]
    if model is None:
        name, config, preprocess = _recorded(weights)
        stated: Mapping[str, Any] = {}
    else:
        name, config, preprocess = _read(model)
        stated = _stated(checkpoints, preprocess)
        records = [record.get("config") for c in checkpoints if (record := model_record(c))]
        said = any(isinstance(c, Mapping) and c.get("quick_gelu") for c in records)
        quick = quick or (said and "quick_gelu" not in config)
    if quick:
        config = {**config, "quick_gelu": True}
    is_name = isinstance(model, str) and not preprocess
    spec = _spec(name, config, {**(_common_preprocess(name) if is_name else {}), **stated, **preprocess})
    if is_name:
        _warn_of_defaults(name, spec)
    return spec


def _recorded(weights: Sequence["Weights"]) -> tuple[str, Mapping[str, Any], Mapping[str, Any]]:
    """Name, configuration and preprocessing that all the weights agree on."""
    try:
        said = combined([(repr(w), record) for w in weights if (record := w.model)])
    except MismatchError as error:
        hint = "score them apart, or name the model that fits all of them with --model"
        raise ModelError(
            f"the checkpoints were made by different models: {error.message}", hint=hint
        ) from error
    config, name = (said or {}).get("config"), (said or {}).get("name")
    if isinstance(config, Mapping) and {"vision_cfg", "text_cfg"} <= config.keys():
        return str(name or "model"), config, said["preprocess"] if said and said.get("preprocess") else {}
    if name is not None and not isinstance(config, Mapping):
        known, config, _ = _named(str(name))
        return known, config, {**_common_preprocess(known), **((said or {}).get("preprocess") or {})}
    checkpoints = [c for w in weights for c in w.checkpoints]
    if untranslated := [(c, why) for c in checkpoints if (why := c.extra.get("untranslated"))]:
        (checkpoint, why), *_ = untranslated
        message = f"{checkpoint.path or checkpoint.name} is no model of open_clip's: {why}"
        raise ModelError(message, hint="it can be merged and inspected, not scored or finetuned")
    for each in weights:
        if (alone := lone_tower(each.names)) is not None:
            raise ModelError(
                f"{each!r} is {'an image' if alone == 'visual' else 'a text'} tower alone, and no model is named",
                hint="give the whole model; or name it (--model), an open_clip name such as ViT-B-32, where another "
                "checkpoint brings the other tower",
            )
    raise ModelError(
        "no model is named, and the checkpoints do not record theirs",
        hint="name it (--model): an open_clip name such as ViT-B-32, or an open_clip JSON config",
    )


def _stated(checkpoints: Sequence["Checkpoint"], preprocess: Mapping[str, Any]) -> Mapping[str, Any]:
    """What checkpoints state of their preprocessing, but for the keys that whoever named the model stated."""
    records = []
    for checkpoint in checkpoints:
        said = (model_record(checkpoint) or {}).get("preprocess")
        own = said if isinstance(said, Mapping) else {}
        settled = {
            *preprocess,
            *(OWN_KEYS if preprocess.keys() & {"size", "resize_mode", "interpolation"} else ()),
        }
        left = {key: value for key, value in own.items() if key not in settled}
        records.append((str(checkpoint.path or checkpoint.name), {"preprocess": left}))
    try:
        return (combined(records) or {}).get("preprocess") or {}
    except MismatchError as error:
        raise ModelError(error.message, hint=error.hint) from error


def _read(model: str | Path) -> tuple[str, Mapping[str, Any], Mapping[str, Any]]:
    """Name, configuration and stated preprocessing of what --model names."""
    if isinstance(model, Path) or model.endswith(".json") or Path(model).is_file():
        return _from_file(Path(model))
    return _named(model)


def _from_file(path: Path) -> tuple[str, Mapping[str, Any], Mapping[str, Any]]:
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
    preprocess = document.get("preprocess_cfg")
    return name, config, preprocess if isinstance(preprocess, dict) else {}


def _named(name: str) -> tuple[str, Mapping[str, Any], Mapping[str, Any]]:
    import open_clip

    if name.startswith("hf-hub:"):
        from open_clip.pretrained import download_pretrained_from_hf

        file = download_pretrained_from_hf(name[7:], filename="open_clip_config.json")
        return name, *_from_file(Path(file))[1:]
    known = name.replace("/", "-")
    config = open_clip.get_model_config(known)
    if config is None:
        hint = did_you_mean(
            name, open_clip.list_models(), "an open_clip name such as ViT-B-32, or a JSON config"
        )
        raise ModelError(f"there is no model {name!r}", hint=hint)
    return known, config, {}


def _common_preprocess(name: str) -> dict[str, Any]:
    """Return what all pretrained weights of this name agree on (SigLIP's mean and std, say), key by key."""
    configs = _published(name)
    keys = {key for config in configs.values() for key in config}
    values = {key: [config.get(key) for config in configs.values()] for key in keys}
    return {key: value[0] for key, value in values.items() if all(other == value[0] for other in value)}


def _published(name: str) -> dict[str, dict[str, Any]]:
    """What each of open_clip's pretrained weights of a name says of its images, by tag."""
    import open_clip

    keys = ("mean", "std", "interpolation", "resize_mode")
    configs = {
        tag: open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)
    }
    return {tag: {key: c[key] for key in keys if c.get(key) is not None} for tag, c in configs.items()}


def _warn_of_defaults(name: str, spec: ModelSpec) -> None:
    """Say which preprocessing was taken where open_clip's weights of a name have one or another."""
    published, stated = _published(name), spec.stated or {}
    keys = [k for k in ("mean", "std", "interpolation", "resize_mode") if k not in stated]
    others = {
        k: sorted(t for t, config in published.items() if config.get(k) != spec.preprocess[k]) for k in keys
    }
    open_questions = [key for key in keys if others[key]]
    if open_questions:
        tags = sorted({tag for key in open_questions for tag in others[key]})
        taken = ", ".join(f"{key} {_plain(spec.preprocess[key])}" for key in open_questions)
        warnings.warn(
            f"nothing states {' and '.join(open_questions)} of this {name}: taken are open_clip's defaults, {taken}; "
            f"{and_more([f'{name}:{tag}' for tag in tags])} {'has' if len(tags) == 1 else 'have'} others. "
            "State yours by --model CONFIG.json with a preprocess_cfg",
            ClipmergeWarning,
            stacklevel=3,
        )


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _spec(name: str, config: Mapping[str, Any], stated: Mapping[str, Any]) -> ModelSpec:
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    plain = json.loads(json.dumps(dict(config)))
    size = plain.get("vision_cfg", {}).get("image_size", 224)
    base = {**asdict(PreprocessCfg()), "size": size}
    own = {key: stated[key] for key in OWN_KEYS if stated.get(key) is not None}
    return ModelSpec(name, plain, merge_preprocess_dict(base, dict(stated)) | own, dict(stated))
