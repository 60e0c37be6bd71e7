"""Build a model, its tokenizer and its eval transform as open_clip does, from a ModelSpec."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

from clipmerge.checkpoint.siglip import TIMM_ARGS
from clipmerge.errors import ModelError
from clipmerge.model.spec import ModelSpec
from clipmerge.model.transforms import ResizeAndCrop

if TYPE_CHECKING:
    import torch
    from PIL import Image

    Transform = Callable[[Image.Image], torch.Tensor]
    Tokenizer = Callable[[list[str]], torch.Tensor]

__all__ = ["build_model", "eval_transform", "get_tokenizer"]


def build_model(
    spec: ModelSpec, device: "str | torch.device" = "cpu", *, seed: int | None = None
) -> "torch.nn.Module":
    """Build an open_clip model in fp32 and eval mode.

    Args:
        seed: None skips every random initialisation, for weights that are loaded next (ViT-B-32: 0.02 s, not
            2.2 s; what is random holds whatever the memory held). A number gives open_clip's own
            initialisation, the same for the same number, without touching torch's global generators.
    """
    import torch

    try:
        if seed is None:
            with torch.device(device), _skip_random_values():
                model = _construct(spec)
        else:
            # Memory that nobody initialises (CoCa's decoder has some) is zero, not whatever was there.
            zero = _replace_functions({torch.empty: torch.zeros})
            with torch.random.fork_rng(devices=[]), zero:
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU as well
                model = _construct(spec)
    except (TypeError, KeyError, ValueError, AssertionError) as error:
        hint = "compare the config with one of open_clip's own"
        raise ModelError(f"open_clip cannot build {spec.name}: {error}", hint=hint) from error
    if torch.device(device).type == "cuda":
        from clipmerge.model.patches import embed_patches_by_matmul  # imports torch

        embed_patches_by_matmul(model)
    model = model.to(device).eval()
    if torch.device(device).type == "cpu" and any(
        isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()
    ):
        # Measured on a CPU, a training step: EfficientNet-Lite0 1.8 times as fast, RN50 1.1; ConvNeXt and ViT, which
        # have no BatchNorm, gain nothing.
        cast("torch.nn.Module", model.visual).to(memory_format=torch.channels_last)
    return model


def _construct(spec: ModelSpec) -> "torch.nn.Module":
    from open_clip import CLIP, CoCa, CustomTextCLIP
    from open_clip.model import set_model_preprocess_cfg

    config = deepcopy(dict(spec.config))
    args = config["vision_cfg"].pop(TIMM_ARGS, None)
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    custom = bool(config.pop("custom_text", False))
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
        custom = True
    kind = CLIP if not custom else CoCa if "multimodal_cfg" in config else CustomTextCLIP
    model = kind(**config)
    if args:  # open_clip hands timm nothing but the name
        import timm

        vision = config["vision_cfg"]
        known = {"num_classes": 0, "global_pool": vision["timm_pool"], "pretrained": False}
        model.visual.trunk = timm.create_model(vision["timm_model_name"], **known, **args)
    set_model_preprocess_cfg(model, dict(spec.preprocess))
    return cast("torch.nn.Module", model)


def _skip_random_values() -> AbstractContextManager[Any]:
    """Leave memory as it is where it would be filled at random; constants, masks and buffers are made as always."""
    import torch

    names = ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_",
             "xavier_uniform_", "xavier_normal_", "orthogonal_")  # fmt: skip
    fills = [getattr(torch.nn.init, name) for name in names]
    fills += [torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_]
    untouched = dict.fromkeys(fills, lambda tensor, *_, **__: tensor)
    return _replace_functions(untouched | {torch.randn: torch.empty, torch.rand: torch.empty})


def _replace_functions(functions: Mapping[Any, Callable[..., Any]]) -> AbstractContextManager[Any]:
    """Send calls of some of torch's functions to others, inside a `with`."""
    from torch.overrides import TorchFunctionMode

    class Replace(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            return functions.get(func, func)(*args, **(kwargs or {}))

    return Replace()


def get_tokenizer(spec: ModelSpec) -> "Tokenizer":
    """Return the function from prompts to token ids, shape (prompts, context length).

    Raises:
        ModelError: transformers' tokenizer that the configuration names is not there.
    """
    import open_clip
    from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, SimpleTokenizer

    text = spec.config["text_cfg"]
    length = text.get("context_length", 77)
    kwargs = dict(text.get("tokenizer_kwargs") or {})
    name = spec.name.lower()
    if text.get("hf_tokenizer_name"):
        kwargs["tokenizer_mode"] = text.get("tokenizer_mode")
        try:
            tokenizer = HFTokenizer(text["hf_tokenizer_name"], context_length=length, **kwargs)
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(
                f"the tokenizer of {spec.name} is neither in {text['hf_tokenizer_name']} nor in the Hub's cache",
                hint="put tokenizer.json and tokenizer_config.json into that folder, or name a configuration whose "
                "hf_tokenizer_name is a folder or repository that you have: --model CONFIG.json",
            ) from error
    elif "siglip" in name and spec.name in open_clip.list_models():
        variant = "gemma" if "siglip2" in name else "mc4" if "i18n" in name else "c4-en"
        tokenizer = SigLipTokenizer(variant, context_length=length)
    else:
        tokenizer = SimpleTokenizer(context_length=length, **kwargs)
    return cast("Tokenizer", tokenizer)


def eval_transform(spec: ModelSpec) -> "Transform":
    """Return the transform for scoring, PIL image → float tensor (3, H, W): open_clip's own, or transformers'.

    Raises:
        ModelError: the preprocessing asks for what nothing here does.
    """
    from open_clip.transform import MaybeToTensor, PreprocessCfg, image_transform_v2
    from torchvision.transforms import Compose, Normalize

    if unread := spec.preprocess.get("unread"):
        raise ModelError(
            f"the images of {spec.name or 'this model'} cannot be prepared: its processor asks for {unread}",
            hint="state the preprocessing in open_clip's words: --model CONFIG.json with a preprocess_cfg",
        )
    cfg = spec.preprocess
    if steps := cfg.get("steps"):
        shape = ResizeAndCrop(steps, cfg["interpolation"])
        return cast("Transform", Compose([shape, MaybeToTensor(), Normalize(cfg["mean"], cfg["std"])]))
    known = {key: value for key, value in cfg.items() if key in PreprocessCfg.__annotations__}
    return cast("Transform", image_transform_v2(PreprocessCfg(**known), is_train=False))
