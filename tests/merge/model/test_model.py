"""Weights ↔ open_clip models."""

import json
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file

from clipmerge.errors import ClipmergeWarning, ModelError
from clipmerge.model import (
    ModelSpec,
    build_model,
    eval_transform,
    get_tokenizer,
    load_weights,
    resolve_model,
    save_model,
    weights_of,
)
from clipmerge.weights.record import write_record
from clipmerge.weights.weights import from_state_dict, interpolate, load, mean


def test_a_name_is_open_clips():
    spec = resolve_model("ViT-B-32")
    assert spec.name == "ViT-B-32"
    assert spec.config == open_clip.get_model_config("ViT-B-32")
    assert spec.preprocess["size"] == 224
    assert spec.preprocess["mean"] == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert resolve_model("ViT-B/32").name == "ViT-B-32"


def test_a_name_that_leaves_the_preprocessing_open_says_what_was_taken(tiny_model_config, tmp_path):
    with pytest.warns(
        ClipmergeWarning, match=r"mean and std of this ViT-L-14: .*laion2b_s32b_b82k has others"
    ):
        spec = resolve_model("ViT-L-14")
    assert spec.stated == {"interpolation": "bicubic", "resize_mode": "shortest"}
    with pytest.warns(ClipmergeWarning, match="resize_mode of this ViT-H-14"):
        assert resolve_model("ViT-H-14").preprocess["resize_mode"] == "shortest"
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    stated = from_state_dict({"a": torch.ones(1)}, "a", write_record({"model": {"preprocess": half}}))
    assert (
        resolve_model("ViT-L-14", stated).preprocess["mean"] == [0.5] * 3
    )  # said by the weights: no question


def test_a_names_weights_may_agree_on_another_preprocessing():
    spec = resolve_model("ViT-B-16-SigLIP")
    assert list(spec.preprocess["mean"]) == [0.5, 0.5, 0.5]
    assert spec.preprocess["resize_mode"] == "squash"


def test_a_config_file_bare_or_whole(tmp_path, tiny_model_file, tiny_model_config):
    spec = resolve_model(tiny_model_file)
    assert spec.name == "tiny"
    assert spec.config == tiny_model_config
    assert spec.preprocess["size"] == 16
    assert spec.preprocess["mean"] == [0.5, 0.5, 0.5]
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(tiny_model_config))
    assert resolve_model(str(bare)).config == tiny_model_config
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(tiny_model_file.read_text())
    assert resolve_model(folder / "open_clip_config.json").name == "own"


def test_the_metadata_of_weights(tiny_spec, tiny_checkpoints, tmp_path):
    model = build_model(tiny_spec, seed=0)
    a = load(save_model(model, tiny_spec, tmp_path / "a.safetensors"))
    spec = resolve_model(None, a)
    assert (spec.name, spec.config, spec.preprocess) == (
        tiny_spec.name,
        tiny_spec.config,
        tiny_spec.preprocess,
    )
    merged = load(mean([a, load(tiny_checkpoints["base"])]).save(tmp_path / "merged.safetensors"))
    assert resolve_model(None, merged).config == tiny_spec.config, (
        "the record goes on to what is merged from it"
    )
    with pytest.raises(ModelError, match="no model is named, and the checkpoints do not record theirs"):
        resolve_model(None, load(tiny_checkpoints["base"]))


def test_different_models_do_not_mix(tiny_spec, tmp_path):
    wider = ModelSpec("wider", {**tiny_spec.config, "embed_dim": 8}, tiny_spec.preprocess)
    a = load(save_model(build_model(tiny_spec, seed=0), tiny_spec, tmp_path / "a.safetensors"))
    b = load(save_model(build_model(wider, seed=0), wider, tmp_path / "b.safetensors"))
    with pytest.raises(
        ModelError, match=r"different models: a was made for tiny, b for wider: .*embed_dim: 16 and 8"
    ):
        resolve_model(None, a, b)


def test_openais_own_files_need_quick_gelu(tiny_spec, tiny_checkpoints):
    from dataclasses import replace

    from clipmerge.weights.weights import Weights

    plain = load(tiny_checkpoints["base"])
    openai = replace(plain.checkpoints[0], layout="openai")
    weights = Weights({openai: plain.terms[plain.checkpoints[0]]}, openai)
    assert resolve_model("ViT-B-32", weights).config["quick_gelu"] is True
    assert "quick_gelu" not in resolve_model("ViT-B-32", plain).config


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("ViT-B-23", "there is no model 'ViT-B-23'", "did you mean ViT-B-32?"),
        ("zzzzzz", "there is no model 'zzzzzz'", "an open_clip name such as"),
        ("absent.json", "absent.json cannot be read: No such file", "check the path"),
    ],
)
def test_an_unknown_model(text, message, hint):
    with pytest.raises(ModelError) as caught:
        resolve_model(text)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_file_that_is_no_config(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(ModelError, match="it is not JSON"):
        resolve_model(path)
    path.write_text('{"embed_dim": 4, "text_cfg": {}}')
    with pytest.raises(ModelError, match="is no open_clip model config: vision_cfg missing"):
        resolve_model(path)
    path.write_text("[]")
    with pytest.raises(ModelError, match="embed_dim, vision_cfg, text_cfg missing"):
        resolve_model(path)
    path.write_text('{"embed_dim": 4, "text_cfg": {}, "vision_cfg": {"depth": 3}}')
    with pytest.raises(ModelError, match=r"open_clip cannot build x: .*depth"):
        build_model(resolve_model(path))


@pytest.mark.parametrize(
    "change", [{}, {"custom_text": True}, {"quick_gelu": True}, {"resnet": True}], ids=str
)
def test_skipping_random_values_keeps_everything_else(tiny_model_config, change):
    config = {**tiny_model_config, **{k: v for k, v in change.items() if k != "resnet"}}
    if "resnet" in change:
        config["vision_cfg"] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    spec = ModelSpec("tiny", config, {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3})
    made, skipped = build_model(spec, seed=0), build_model(spec)
    assert not skipped.training
    buffers = dict(made.named_buffers())
    for name, buffer in skipped.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    skipped.load_state_dict(made.state_dict())
    size = config["vision_cfg"]["image_size"]
    images, tokens = torch.rand(2, 3, size, size), get_tokenizer(spec)(["a", "b c"])
    with torch.no_grad():
        torch.testing.assert_close(skipped.encode_image(images), made.encode_image(images))
        torch.testing.assert_close(skipped.encode_text(tokens), made.encode_text(tokens))


def test_a_seed_is_open_clips_initialisation_and_leaves_the_generator_alone(tiny_spec):
    before = torch.random.get_rng_state()
    a, b, c = (build_model(tiny_spec, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["visual.proj"], c["visual.proj"])
    assert all(tensor.isfinite().all() for tensor in a.values())
    assert 0.01 < a["token_embedding.weight"].std() < 0.03


def test_transforms_are_open_clips(tiny_spec):
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    cfg = open_clip.transform.PreprocessCfg(**tiny_spec.preprocess)
    expected = open_clip.transform.image_transform_v2(cfg, is_train=False)(image)
    assert torch.equal(eval_transform(tiny_spec)(image), expected)


def test_tokenizers_are_open_clips(tiny_spec):
    ours = get_tokenizer(tiny_spec)(["a photo of a cat"])
    assert ours.shape == (1, 32)
    assert torch.equal(ours, open_clip.get_tokenizer("ViT-B-32")(["a photo of a cat"])[:, :32])


def test_names_that_do_not_fit_come_all_at_once(tiny_spec, tiny_checkpoints):
    tensors = load_file(tiny_checkpoints["base"])
    del tensors["ln_final.bias"], tensors["visual.proj"]
    tensors["visual.prij"] = torch.zeros(3)
    tensors["logit_scale"] = torch.zeros(2)
    with pytest.raises(ModelError) as caught:
        load_weights(build_model(tiny_spec), from_state_dict(tensors))
    for part in (
        "lack 'ln_final.bias'",
        "lack 'visual.proj'",
        "no 'visual.prij' (it has 'visual.proj')",
        "'logit_scale' is [2]",
    ):
        assert part in caught.value.message


def test_a_text_tower_is_missed_unless_there_is_a_head(tiny_spec, tiny_checkpoints):
    tensors = {
        k: v for k, v in load_file(tiny_checkpoints["base"]).items() if not k.startswith("transformer.")
    }
    model = build_model(tiny_spec)
    with pytest.raises(ModelError, match="the weights lack 'transformer"):
        load_weights(model, from_state_dict(tensors))
    tensors["classification_head.weight"] = torch.ones(5, 16)
    load_weights(model, from_state_dict(tensors))
    assert torch.equal(model.classification_head.weight, torch.ones(5, 16))
    assert model.classification_head.bias is None
    assert torch.equal(model.visual.proj, tensors["visual.proj"])
    del tensors["visual.proj"]
    with pytest.raises(ModelError, match=r"the weights lack 'visual.proj'"):
        load_weights(model, from_state_dict(tensors))
    load_weights(model, load(tiny_checkpoints["base"]))
    assert not hasattr(model, "classification_head")


def test_what_is_saved_loads_in_open_clip(tiny_spec, tiny_checkpoints, tmp_path):
    model = build_model(tiny_spec)
    load_weights(model, load(tiny_checkpoints["ft0"]))
    path = save_model(model, tiny_spec, tmp_path / "out.safetensors")
    config = tmp_path / "models"
    config.mkdir()
    (config / "tiny-clipmerge.json").write_text(json.dumps(tiny_spec.config))
    open_clip.add_model_config(config)
    loaded = open_clip.create_model("tiny-clipmerge", pretrained=str(path))
    expected = load_file(tiny_checkpoints["ft0"])
    assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())
    assert weights_of(model, tiny_spec).model == tiny_spec.to_metadata()


def test_a_merged_vit_b_32_loads_in_open_clip(tmp_path):
    """For real: open_clip's own configuration, 151 million parameters, in fp16 to spare the disk."""
    spec = resolve_model("ViT-B-32")
    state = {k: v.half() for k, v in build_model(spec, seed=0).state_dict().items()}
    a = from_state_dict(state, "a")
    b = from_state_dict({k: v * 3 for k, v in state.items()}, "b")
    path = interpolate(a, b, 0.25).save(tmp_path / "merged.safetensors")
    loaded = open_clip.create_model("ViT-B-32", pretrained=str(path)).state_dict()
    assert loaded.keys() == state.keys()
    for name in ("visual.conv1.weight", "transformer.resblocks.11.attn.in_proj_weight", "logit_scale"):
        tripled = (state[name] * 3).double()
        expected = (0.75 * state[name].double() + 0.25 * tripled).half()
        assert torch.equal(loaded[name], expected.float())


def test_importing_the_room_imports_no_model_library():
    code = "import clipmerge.model, sys; print([m for m in ('torch', 'open_clip', 'torchvision') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_building_a_model_leaves_every_generator_alone(tiny_spec, monkeypatch):
    reseeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    state = torch.random.get_rng_state()
    build_model(tiny_spec, seed=3)
    assert reseeded == [], "a GPU's generator would start again from the model's seed"
    assert torch.equal(torch.random.get_rng_state(), state)
