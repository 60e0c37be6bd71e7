"""Folders that transformers' own classes save: under open_clip's names where these have a place, else as they are."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import clipmerge
from clipmerge.checkpoint.open import open_checkpoint
from clipmerge.errors import ModelError
from clipmerge.model import build_model, refuse_misfit, resolve_model
from clipmerge.report.model_folder import save_folder

SMALL = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 256}
WORDS = {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 98, "pad_token_id": 1}
TEXT = {**SMALL, **WORDS, "max_position_embeddings": 8, "projection_dim": 12}
VISION = {**SMALL, "projection_dim": 12, "image_size": 16, "patch_size": 8}


@pytest.fixture(scope="module")
def clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)).eval()


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_a_clip_model_computes_the_same_in_open_clip(clip: Any, tmp_path: Path) -> None:
    weights = clipmerge.load(saved(clip, tmp_path / "clip"))
    spec = resolve_model(None, weights)
    model = weights.load_into(build_model(spec)).eval()
    image, text = torch.randn(2, 3, 16, 16), torch.randint(2, 98, (2, 8))
    text[:, -1] = 98
    with torch.no_grad():
        theirs = clip(input_ids=text, pixel_values=image)
        pairs = (
            (model.encode_image(image), theirs.image_embeds),
            (model.encode_text(text), theirs.text_embeds),
        )
        for ours, right in pairs:
            ours = ours / ours.norm(dim=-1, keepdim=True)
            torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("vision", "text"),
    [("gelu_pytorch_tanh", "gelu_new"), ("gelu", "gelu_pytorch_tanh"), ("gelu_fast", "gelu")],
)
def test_each_tower_keeps_its_own_activation(vision: str, text: str, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    towers = {"text_config": {**TEXT, "hidden_act": text}, "vision_config": {**VISION, "hidden_act": vision}}
    clip = CLIPModel(CLIPConfig(**towers, projection_dim=12)).eval()
    weights = clipmerge.load(saved(clip, tmp_path / "clip"))
    model = weights.load_into(build_model(resolve_model(None, weights))).eval()
    image, words = 30 * torch.randn(2, 3, 16, 16), torch.randint(2, 98, (2, 8))
    words[:, -1] = 98
    with torch.no_grad():
        theirs = clip(input_ids=words, pixel_values=image)
        for ours, right in (
            (model.encode_image(image, normalize=True), theirs.image_embeds),
            (model.encode_text(words, normalize=True), theirs.text_embeds),
        ):
            torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("CLIPVisionModelWithProjection", "vision"), ("CLIPTextModelWithProjection", "text"),
        ("CLIPVisionModel", "vision"), ("CLIPTextModel", "text"),
    ],
)  # fmt: skip
def test_one_tower_is_that_part_of_the_model(name: str, tower: str, clip: Any, tmp_path: Path) -> None:
    import transformers

    whole = open_checkpoint(saved(clip, tmp_path / "whole"))
    part = getattr(transformers, name).from_pretrained(tmp_path / "whole")
    checkpoint = open_checkpoint(saved(part, tmp_path / name))
    assert checkpoint.layout == "huggingface"
    lost = {"visual.proj", "text_projection"} if "Projection" not in name else set()
    image = {n for n in whole.tensors if n.startswith("visual.")}
    expected = (image if tower == "vision" else whole.tensors.keys() - image - {"logit_scale"}) - lost
    assert checkpoint.tensors.keys() == expected
    assert {n: t.shape for n, t in checkpoint.tensors.items()} == {
        n: whole.tensors[n].shape for n in expected
    }
    said = checkpoint.extra["model"]["config"]
    config = whole.extra["model"]["config"]
    assert said == {"quick_gelu": True, f"{tower}_cfg": config[f"{tower}_cfg"]}
    full, alone = clipmerge.load(tmp_path / "whole"), clipmerge.load(tmp_path / name)
    both = full + 0.5 * (alone - full)
    assert (both.model or {})["config"] == config


@pytest.mark.parametrize(
    ("name", "sizes", "alone"),
    [
        ("CLIPTextModel", TEXT, "a text tower"), ("CLIPTextModelWithProjection", TEXT, "a text tower"),
        ("CLIPVisionModel", VISION, "an image tower"),
        ("SiglipTextModel", TEXT, "a text tower"), ("SiglipVisionModel", VISION, "an image tower"),
    ],
)  # fmt: skip
def test_a_tower_that_never_had_another_is_one(
    name: str, sizes: dict[str, Any], alone: str, tmp_path: Path
) -> None:
    """Its names begin without the tower's: no prefix of embeddings may take them for another set of weights."""
    import transformers

    torch.manual_seed(0)
    part = getattr(transformers, name)(
        getattr(transformers, name.partition("Model")[0] + "Config")(**sizes)
    ).eval()
    weights = clipmerge.load(saved(part, tmp_path / name))
    (checkpoint,) = weights.checkpoints
    assert checkpoint.layout == "huggingface"
    assert sum(t.numel for t in checkpoint.tensors.values()) == sum(p.numel() for p in part.parameters())
    with pytest.raises(ModelError, match=f"{name} is {alone} alone, and no model is named"):
        resolve_model(None, weights)
    if alone == "a text tower":
        digits = clipmerge.Evaluator({"digits": clipmerge.open_split("digits#test", limit=20)})
        with pytest.raises(ModelError, match="is a text tower, which no image can be scored by"):
            digits.setup(weights)


def test_a_text_tower_is_a_task_vector_over_its_whole_base(clip: Any, tmp_path: Path) -> None:
    from transformers import CLIPTextModel

    full = clipmerge.load(saved(clip, tmp_path / "whole"))
    text = CLIPTextModel.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        text.get_parameter("final_layer_norm.bias" if hasattr(text, "final_layer_norm") else
                           "text_model.final_layer_norm.bias").add_(2)  # fmt: skip
    both = full + 0.5 * (clipmerge.load(saved(text, tmp_path / "text")) - full)
    before, after = full.state_dict(), both.state_dict()
    assert before.keys() == after.keys()
    torch.testing.assert_close(after.pop("ln_final.bias"), before["ln_final.bias"] + 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_what_open_clip_has_no_activation_for_says_so(clip: Any, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    mixed = CLIPConfig(text_config={**TEXT, "hidden_act": "gelu"}, vision_config=VISION, projection_dim=12)
    weights = clipmerge.load(saved(CLIPModel(mixed), tmp_path / "mixed"))
    with pytest.raises(
        ModelError, match="quick_gelu in the image tower and gelu in the text tower"
    ) as refusal:
        resolve_model(None, weights)
    assert refusal.value.hint == "it can be merged and inspected, not scored or finetuned"


def siglip(seed: int) -> Any:
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(seed)
    return SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)).eval()


def siglip2(seed: int) -> Any:
    from transformers import Siglip2Config, Siglip2Model

    torch.manual_seed(seed)
    vision = {**SMALL, "num_patches": 4, "patch_size": 8}
    return Siglip2Model(Siglip2Config(text_config=TEXT, vision_config=vision)).eval()


def classifier(seed: int) -> Any:
    from transformers import CLIPConfig, CLIPForImageClassification

    torch.manual_seed(seed)
    return CLIPForImageClassification(CLIPConfig(text_config=TEXT, vision_config=VISION, num_labels=3)).eval()


def timm_tower(seed: int) -> Any:
    from transformers import TimmWrapperConfig, TimmWrapperModel

    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes)
    return TimmWrapperModel(config).eval()


@pytest.mark.parametrize("make", [siglip2, classifier, timm_tower])
def test_a_mean_of_any_architecture_is_loaded_by_its_own_class(
    make: Callable[[int], Any], tmp_path: Path
) -> None:
    models = [make(seed) for seed in (0, 1)]
    weights = [clipmerge.load(saved(model, tmp_path / str(i))) for i, model in enumerate(models)]
    (tmp_path / "soup").mkdir()
    shutil.copy(tmp_path / "0" / "config.json", tmp_path / "soup")
    clipmerge.mean(weights).save(tmp_path / "soup" / "model.safetensors")
    soup = type(models[0]).from_pretrained(tmp_path / "soup").state_dict()
    states = [model.state_dict() for model in models]
    for name, tensor in soup.items():
        right = (
            sum(state[name].double() for state in states) / 2
            if tensor.is_floating_point()
            else states[0][name]
        )
        torch.testing.assert_close(tensor, right.to(tensor.dtype), rtol=0, atol=0)


def test_why_a_model_cannot_be_scored_is_said(tmp_path: Path) -> None:
    weights = clipmerge.load(saved(siglip2(0), tmp_path / "siglip2"))
    assert weights.checkpoints[0].layout == "transformers"
    assert weights.model is None
    with pytest.raises(ModelError) as caught:
        refuse_misfit(weights, resolve_model("ViT-B-32"))
    assert (
        "keeps its own names, as open_clip has no place for 'vision_model.embeddings.patch_embedding.weight'"
        in str(caught.value.hint)
    )
    with pytest.raises(ModelError, match="cannot be scored") as caught:
        clipmerge.Evaluator({"digits": clipmerge.open_split("digits#test", limit=20)}).setup(weights)
    assert "it can be merged, not scored" in str(caught.value.hint)
    with pytest.raises(ModelError, match="keeps its own names, as open_clip has no such model") as caught:
        save_folder(weights, tmp_path / "out")
    assert "config.json" in str(caught.value.hint)


WORDS_TOWER = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1}
COCA = {
    "embed_dim": 16,
    "custom_text": True,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8,
                   "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": {**WORDS_TOWER, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**WORDS_TOWER, "attn_pooler_heads": 2},
}  # fmt: skip
TIMM = {
    "embed_dim": 16,
    "vision_cfg": {"timm_model_name": "test_convnext", "timm_model_pretrained": False, "timm_pool": "avg",
                   "timm_proj": "linear", "image_size": 32},
    "text_cfg": WORDS_TOWER,
}  # fmt: skip


@pytest.mark.parametrize(("config", "kind"), [(COCA, "CoCa"), (TIMM, "CLIP")], ids=["coca", "timm"])
def test_open_clips_own_folders_of_coca_and_timm_towers_compute_the_same(
    config: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    """The layout of open_clip's repositories on the Hub; what is written there again, open_clip itself loads."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    sizes = {key: value for key, value in config.items() if key != "custom_text"}
    right: Any = getattr(open_clip, kind)(**sizes).eval()
    with torch.no_grad():
        for (
            parameter
        ) in right.parameters():  # some of CoCa's decoder is memory that open_clip leaves as it was
            parameter.normal_(std=0.2)
    folder = tmp_path / "published"
    folder.mkdir()
    save_file(right.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    weights = clipmerge.load(folder)
    assert sorted(weights.names) == sorted(right.state_dict())
    ours = weights.load_into(build_model(resolve_model(None, weights)))
    save_folder(clipmerge.mean([weights, weights]), tmp_path / "soup")
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'soup'}")
    size = config["vision_cfg"]["image_size"]
    image, text = torch.randn(2, 3, size, size), torch.randint(1, 99, (2, 8))
    for model in (ours, theirs.eval()):
        assert type(model) is type(right)
        with torch.no_grad():
            torch.testing.assert_close(model.encode_image(image), right.encode_image(image), rtol=0, atol=0)
            torch.testing.assert_close(model.encode_text(text), right.encode_text(text), rtol=0, atol=0)
