"""Weights ↔ open_clip models: the only room that knows how open_clip builds, names and preprocesses."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from clipmerge.errors import ModelError, nearest

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from clipmerge.weights.expression import Weights

    Transform = Callable[[Image.Image], torch.Tensor]
    Tokenizer = Callable[[list[str]], torch.Tensor]

__all__ = [
    "ModelSpec",
    "build_model",
    "eval_transform",
    "get_tokenizer",
    "known_models",
    "load_weights",
    "resolve_model",
    "save_model",
    "train_transform",
    "weights_of",
]

HEAD = "classification_head"
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
        raise ModelError(
            "no model is named, and the checkpoints do not record theirs",
            hint="name it (--model): an open_clip name such as ViT-B-32, or an open_clip JSON config",
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
    return any(c.layout == "openai" or c.extra.get("quick_gelu") is True for c in weights.checkpoints)


def _with_quick_gelu(spec: ModelSpec) -> ModelSpec:
    return ModelSpec(spec.name, {**spec.config, "quick_gelu": True}, spec.preprocess)


def build_model(
    spec: ModelSpec, device: "str | torch.device" = "cpu", *, seed: int | None = None
) -> "torch.nn.Module":
    """An open_clip model in fp32 and eval mode.

    Args:
        seed: None skips every random initialisation, for weights that are loaded next (ViT-B-32: 0.02 s, not
            2.2 s; what is random holds whatever the memory held). A number gives open_clip's own
            initialisation, the same for the same number, without touching torch's global generator.
    """
    import torch

    try:
        if seed is None:
            with torch.device(device), _random_values_skipped():
                model = _construct(spec)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = _construct(spec)
    except (TypeError, KeyError, ValueError, AssertionError) as error:
        raise ModelError(
            f"open_clip cannot build {spec.name}: {error}",
            hint="compare the config with one of open_clip's own",
        ) from error
    return model.to(device).eval()


def _construct(spec: ModelSpec) -> "torch.nn.Module":
    from open_clip import CLIP, CoCa, CustomTextCLIP
    from open_clip.model import set_model_preprocess_cfg

    config = deepcopy(dict(spec.config))
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    custom = bool(config.pop("custom_text", False))
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
        custom = True
    kind = CLIP if not custom else CoCa if "multimodal_cfg" in config else CustomTextCLIP
    model = kind(**config)
    set_model_preprocess_cfg(model, dict(spec.preprocess))
    return cast("torch.nn.Module", model)


@contextmanager
def _random_values_skipped() -> Iterator[None]:
    """Within, random fills leave memory as it is; constants, masks and buffers are made as always."""
    import torch
    from torch.overrides import TorchFunctionMode

    names = ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_",
             "xavier_uniform_", "xavier_normal_", "orthogonal_")  # fmt: skip
    fills = {getattr(torch.nn.init, name) for name in names}
    fills |= {torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_}
    makers = {torch.randn, torch.rand}

    class Skip(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func in fills:
                return args[0] if args else (kwargs or {})["tensor"]
            return (torch.empty if func in makers else func)(*args, **(kwargs or {}))

    with Skip():
        yield


def get_tokenizer(spec: ModelSpec) -> "Tokenizer":
    """Prompts → token ids, shape (prompts, context length)."""
    import open_clip
    from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, SimpleTokenizer

    text = spec.config["text_cfg"]
    length = text.get("context_length", 77)
    kwargs = dict(text.get("tokenizer_kwargs") or {})
    if text.get("hf_tokenizer_name"):
        mode = text.get("tokenizer_mode")
        return cast(
            "Tokenizer",
            HFTokenizer(text["hf_tokenizer_name"], context_length=length, tokenizer_mode=mode, **kwargs),
        )
    if "siglip" in spec.name.lower() and spec.name in open_clip.list_models():
        low = spec.name.lower()
        variant = "gemma" if "siglip2" in low else "mc4" if "i18n" in low else "c4-en"
        return cast("Tokenizer", SigLipTokenizer(variant, context_length=length))
    return cast("Tokenizer", SimpleTokenizer(context_length=length, **kwargs))


def eval_transform(spec: ModelSpec) -> "Transform":
    """open_clip's own transform for scoring: PIL image → float tensor (3, H, W)."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return cast("Transform", image_transform_v2(PreprocessCfg(**spec.preprocess), is_train=False))


def train_transform(spec: ModelSpec, augment: Mapping[str, Any] | None = None) -> "Transform":
    """open_clip's own transform for training; `augment` is its AugmentationCfg (scale, color_jitter …)."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    cfg = PreprocessCfg(**spec.preprocess)
    return cast("Transform", image_transform_v2(cfg, is_train=True, aug_cfg=dict(augment or {})))


def load_weights(model: "torch.nn.Module", weights: "Weights") -> None:
    """Write weights into an open_clip model in place.

    A trained head in the weights becomes `model.classification_head`; the text tower may be absent where
    there is such a head (model-soups' checkpoints), and then keeps what it held.

    Raises:
        ModelError: names or shapes differ; missing and unexpected ones are listed all at once.
    """
    names = weights.names
    _fit_head(model, weights)
    weights.load_into(_without_absent_text(model, names) if _has_head(names) else model)


def _has_head(names: Sequence[str]) -> bool:
    return f"{HEAD}.weight" in names


def _fit_head(model: "torch.nn.Module", weights: "Weights") -> None:
    """Give the model the trained head's shape, or take away a head that these weights do not have."""
    import torch

    names = weights.names
    if not _has_head(names):
        if hasattr(model, HEAD):
            delattr(model, HEAD)
        return
    classes, width = weights.checkpoints[0].tensors[f"{HEAD}.weight"].shape
    bias = f"{HEAD}.bias" in names
    now = getattr(model, HEAD, None)
    if now is None or tuple(now.weight.shape) != (classes, width) or (now.bias is not None) != bias:
        device = next(model.parameters()).device
        model.add_module(HEAD, torch.nn.Linear(width, classes, bias=bias, device=device))


def _without_absent_text(model: "torch.nn.Module", names: Sequence[str]) -> "torch.nn.Module":
    """A view of the model (its own tensors) without the parts of the text tower that no name reaches."""
    import torch

    present = {name.split(".", 1)[0] for name in names}
    view = torch.nn.Module()
    for name, child in model.named_children():
        if name in present or name == "visual":
            view.add_module(name, child)
    for name, parameter in model.named_parameters(recurse=False):
        if name in present:
            view.register_parameter(name, parameter)
    return view


def weights_of(model: "torch.nn.Module", spec: ModelSpec, name: str = "model") -> "Weights":
    """The model's tensors as weights that record which model they are for."""
    from clipmerge.weights.expression import from_state_dict
    from clipmerge.weights.record import FORMAT, write_record

    record = {"format": FORMAT, "total": 1, "model": spec.to_metadata()}
    return from_state_dict(model.state_dict(), name, write_record(record))


def save_model(
    model: "torch.nn.Module",
    spec: ModelSpec,
    path: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write the model as `.safetensors` in open_clip's names, with the model's record; the path written."""
    name = Path(path).stem
    return weights_of(model, spec, name).save(path, metadata=dict(metadata or {}), force=force)
