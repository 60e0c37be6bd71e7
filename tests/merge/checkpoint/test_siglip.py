"""SigLIP as transformers' own class saves it, in open_clip's model: transformers is the referee."""

import json
import warnings
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

import clipmerge
from clipmerge.checkpoint.configs import from_huggingface_config, to_huggingface_config
from clipmerge.checkpoint.siglip import TIMM_ARGS, for_open_clip_alone
from clipmerge.errors import ClipmergeWarning, MismatchError, ModelError
from clipmerge.model import build_model, eval_transform, get_tokenizer, resolve_model
from clipmerge.report.model_folder import check_save
from clipmerge_cli.app import main

WORDS = ["a", "photo", "of", "the", "number", "digit", *"0123456789"]
VISION = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 43,
          "image_size": 20, "patch_size": 8}  # fmt: skip
TEXT = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 1, "intermediate_size": 50,
        "projection_size": 32, "max_position_embeddings": 8, "vocab_size": 20,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip


def make(seed: int = 0, act: str = "gelu_pytorch_tanh") -> Any:
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(seed)
    config = SiglipConfig(
        text_config={**TEXT, "hidden_act": act}, vision_config={**VISION, "hidden_act": act}
    )
    model = SiglipModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # transformers starts biases at 0, where an exchange is not seen
            parameter.normal_(std=0.3)
    return model


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="</s>", eos_token="</s>")
    fast.save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "siglip"
    make().save_pretrained(path)
    save_tokenizer(path)
    return path


def outputs(model: Any, image: torch.Tensor, text: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return dict(model(input_ids=text, pixel_values=image))


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu"])
def test_features_and_logits_are_those_of_transformers(act: str, tmp_path: Path) -> None:
    theirs = make(act=act)
    theirs.save_pretrained(tmp_path / "siglip")
    weights = clipmerge.load(tmp_path / "siglip")
    spec = resolve_model(None, weights)
    assert weights.checkpoints[0].layout == "huggingface"
    assert spec.config["vision_cfg"]["timm_pool"] == "map"
    model: Any = weights.load_into(build_model(spec)).eval()
    image, text = torch.randn(4, 3, 20, 20), torch.randint(0, 20, (5, 8))
    right = outputs(theirs, image, text)
    with torch.no_grad():
        pictures, words = model.encode_image(image, normalize=True), model.encode_text(text, normalize=True)
        logits = model.logit_scale.exp() * pictures @ words.T + model.logit_bias
    for ours, key in ((pictures, "image_embeds"), (words, "text_embeds"), (logits, "logits_per_image")):
        torch.testing.assert_close(ours, right[key], rtol=0, atol=1e-5)


def test_a_mean_goes_back_to_a_folder_that_transformers_loads(folder: Path, tmp_path: Path) -> None:
    from transformers import SiglipModel

    make(1).save_pretrained(tmp_path / "other")
    soup = tmp_path / "soup.safetensors"
    clipmerge.mean([clipmerge.load(folder), clipmerge.load(tmp_path / "other")]).save(soup)
    for source, name in ((folder, "same"), (soup, "mean")):
        assert main(["convert", str(source), "--to", "huggingface", "-o", f"{tmp_path / name}/"]) == 0
    states = [make(seed).state_dict() for seed in (0, 1)]
    same, mean = (SiglipModel.from_pretrained(tmp_path / name) for name in ("same", "mean"))
    for tower in ("vision_config", "text_config"):
        ours, right = (getattr(model.config, tower).to_dict() for model in (same, make()))
        tokens = (
            "dtype",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        )  # the model itself reads none of them
        assert {k: v for k, v in ours.items() if k not in tokens} == {
            k: v for k, v in right.items() if k not in tokens
        }
    for name, tensor in same.state_dict().items():
        torch.testing.assert_close(tensor, states[0][name], rtol=0, atol=0)
        right = sum(state[name].double() for state in states) / 2
        torch.testing.assert_close(mean.state_dict()[name], right.float(), rtol=0, atol=0)
    processor = json.loads((tmp_path / "same" / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.5] * 3
    assert processor["size"] == {"height": 20, "width": 20}


def test_prompts_and_images_are_prepared_as_by_transformers(folder: Path) -> None:
    import numpy as np
    from PIL import Image
    from transformers import AutoTokenizer
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    spec = resolve_model(None, clipmerge.load(folder))
    prompts = ["a photo of the number 3", "digit"]
    right = AutoTokenizer.from_pretrained(folder)(
        prompts, padding="max_length", max_length=8, truncation=True, return_tensors="pt"
    )
    assert torch.equal(get_tokenizer(spec)(prompts), right["input_ids"])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8))
    pixels = SiglipImageProcessorPil(size={"height": 20, "width": 20})(image, return_tensors="pt")
    torch.testing.assert_close(eval_transform(spec)(image), pixels["pixel_values"][0], rtol=0, atol=1e-6)


def test_the_folder_is_scored_and_finetuned(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(folder), "--data", "digits", "--json"]) == 0
    before = capsys.readouterr().out
    assert json.loads(before)
    trained = tmp_path / "ft.safetensors"
    assert (
        main(["finetune", "--base", str(folder), "--train", "digits", "--epochs", "1", "-o", str(trained)])
        == 0
    )
    capsys.readouterr()
    soup = tmp_path / "soup.safetensors"
    assert main(["interpolate", str(folder), str(trained), "--alpha", "0.5", "-o", str(soup)]) == 0
    assert main(["evaluate", str(soup), "--data", "digits"]) == 0


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "siglip")
    spec = resolve_model(None, clipmerge.load(tmp_path / "siglip"))
    with pytest.raises(ModelError, match="the tokenizer of siglip is neither in") as caught:
        get_tokenizer(spec)
    assert "tokenizer.json" in str(caught.value.hint)


def test_sizes_that_open_clip_has_no_name_for_get_no_folder_of_its_own(folder: Path, tmp_path: Path) -> None:
    weights = clipmerge.load(folder)
    with pytest.raises(MismatchError, match="no name for an image tower of these sizes") as caught:
        check_save(weights, tmp_path / "out")
    assert "--to huggingface" in str(caught.value.hint)


SIGLIP = [name for name in open_clip.list_models() if "SigLIP" in name]
NO_PROJECTION = "ViT-SO400M-16-SigLIP-i18n-256"
"""Its text tower ends without the matrix that SiglipModel always has."""


@pytest.mark.parametrize("name", sorted(SIGLIP))
def test_published_models_are_found_again_by_their_sizes(name: str) -> None:
    """Our table of timm's towers against timm: widths, depths and the form of GELU are read off the model it builds."""
    published = open_clip.get_model_config(name)
    theirs = to_huggingface_config(published)
    if name == NO_PROJECTION:
        assert theirs is None
        return
    assert theirs is not None
    back = from_huggingface_config(theirs)
    assert back is not None
    assert back["vision_cfg"] == {**published["vision_cfg"], "timm_model_pretrained": False}
    words = {key: value for key, value in back["text_cfg"].items() if key != "hf_tokenizer_name"}
    right = {"mlp_ratio": 4.0, **published["text_cfg"]}
    right.pop("hf_tokenizer_name")
    assert words.pop("mlp_ratio") == pytest.approx(right.pop("mlp_ratio"), rel=1e-4)
    assert words == right
    trunk: Any = build_model(resolve_model(name), "meta").visual.trunk  # type: ignore[union-attr]
    vision = theirs["vision_config"]
    assert len(trunk.blocks) == vision["num_hidden_layers"]
    assert trunk.blocks[0].attn.num_heads == vision["num_attention_heads"]
    assert tuple(trunk.blocks[0].mlp.fc1.weight.shape) == (vision["intermediate_size"], vision["hidden_size"])
    assert trunk.pos_embed.shape[1] == (vision["image_size"] // vision["patch_size"]) ** 2
    tanh = "tanh" in repr(trunk.blocks[0].mlp.act).lower()
    assert tanh == (vision["hidden_act"] == "gelu_pytorch_tanh")


def test_the_base_model_of_transformers_is_open_clips_but_for_its_gelu() -> None:
    config = from_huggingface_config({"model_type": "siglip", "text_config": {}, "vision_config": {}})
    assert config is not None
    assert config["vision_cfg"]["timm_model_name"] == "vit_base_patch16_siglip_224"
    assert config["vision_cfg"][TIMM_ARGS] == {"act_layer": "gelu_tanh"}
    assert config["text_cfg"]["hf_tokenizer_name"] == "timm/ViT-B-16-SigLIP"
    config["text_cfg"]["hf_tokenizer_name"] = "/here/alone"
    with pytest.warns(ClipmergeWarning, match="computes GELU in another form"):
        alone = for_open_clip_alone(config)
    assert TIMM_ARGS not in alone["vision_cfg"]
    assert alone["text_cfg"]["hf_tokenizer_name"] == "timm/ViT-B-16-SigLIP"


@pytest.mark.parametrize(
    "change",
    [
        {"vision_config": {"vision_use_head": False}},
        {"vision_config": {"layer_norm_eps": 1e-5}},
        {"vision_config": {"hidden_act": "relu"}},
        {"vision_config": {"hidden_act": ["gelu"]}},
        {"vision_config": ["gelu"]},
        {"vision_config": {"hidden_size": "768"}},
        {"vision_config": {"image_size": [224, 256]}},
        {"text_config": {"projection_size": 512}},
        {"text_config": {"num_attention_heads": 0}},
    ],
)
def test_what_open_clips_model_cannot_do_gives_no_configuration(change: dict[str, Any]) -> None:
    base: dict[str, Any] = {"model_type": "siglip", "text_config": {}, "vision_config": {}}
    assert from_huggingface_config({**base, **change}) is None


def test_tensors_of_another_shape_keep_their_names(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = make().state_dict()
    state["logit_bias"] = torch.zeros(2)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    checkpoint = clipmerge.load(tmp_path / "model.safetensors").checkpoints[0]
    assert checkpoint.layout == "transformers"
    assert checkpoint.extra["without_place"] == ("logit_bias",)


@pytest.mark.parametrize("part", ["", "vision_model"])
def test_an_adapter_over_siglip_is_merged_as_by_peft(part: str, folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = make()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "fc1"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft calls what transformers has deprecated
        adapted = peft.get_peft_model(model.get_submodule(part), config)
        adapted.save_pretrained(tmp_path / "lora")
        merged = adapted.merge_and_unload()
    if part:
        setattr(model, part, merged)
    model.save_pretrained(tmp_path / "merged")
    ours = clipmerge.load(tmp_path / "lora", base=folder).state_dict()
    base, right = (clipmerge.load(path).state_dict() for path in (folder, tmp_path / "merged"))
    assert any(not torch.equal(base[name], tensor) for name, tensor in right.items())
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-6)


def test_an_image_tower_alone_is_that_part_of_the_model(folder: Path, tmp_path: Path) -> None:
    make().vision_model.save_pretrained(tmp_path / "tower")
    whole, part = (clipmerge.load(path).state_dict() for path in (folder, tmp_path / "tower"))
    image = {name: tensor for name, tensor in whole.items() if name.startswith("visual.")}
    torch.testing.assert_close(part, image, rtol=0, atol=0)
