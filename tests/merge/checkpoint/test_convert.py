"""Conversion changes names and views, never bytes; there and back is the same file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipmerge.checkpoint.configs import from_huggingface_config, to_huggingface_config, why_untranslated
from clipmerge.checkpoint.convert import convert, convert_folder
from clipmerge.checkpoint.open import open_checkpoint
from clipmerge.errors import CheckpointError, MismatchError, OutputError

StateDict = Mapping[str, Any]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trips_are_bit_for_bit(dtype: torch.dtype, small: StateDict, tmp_path: Path) -> None:
    torch.save({name: value.to(dtype) for name, value in small.items()}, tmp_path / "in.pt")
    first = convert(open_checkpoint(tmp_path / "in.pt"), tmp_path / "a.safetensors", "open_clip")
    there = convert(open_checkpoint(first), tmp_path / "hf.safetensors", "huggingface")
    back = convert(open_checkpoint(there), tmp_path / "b.safetensors", "open_clip")
    again = convert(open_checkpoint(there), tmp_path / "hf2.safetensors", "huggingface")
    assert back.read_bytes() == first.read_bytes()
    assert again.read_bytes() == there.read_bytes()


def test_what_is_written_is_what_the_reference_implementation_reads(small: StateDict, tmp_path: Path) -> None:
    save_file(dict(small), tmp_path / "in.safetensors", metadata={"note": "kept"})
    path = convert(open_checkpoint(tmp_path / "in.safetensors"), tmp_path / "hf.safetensors", "huggingface")
    state = load_file(path)
    assert torch.equal(state["text_projection.weight"], small["text_projection"].T)
    assert torch.equal(state["visual_projection.weight"], small["visual.proj"].T)
    q, k, v = small["transformer.resblocks.0.attn.in_proj_weight"].chunk(3)
    layer = "text_model.encoder.layers.0.self_attn"
    for part, expected in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(state[f"{layer}.{part}_proj.weight"], expected)
    assert open_checkpoint(path).metadata == {"format": "pt", "note": "kept"}


def test_progress_reaches_the_end(small: StateDict, tmp_path: Path) -> None:
    save_file(dict(small), tmp_path / "in.safetensors")
    seen: list[tuple[str, int, int]] = []
    path = convert(
        open_checkpoint(tmp_path / "in.safetensors"),
        tmp_path / "out.safetensors",
        "open_clip",
        on_progress=lambda *report: seen.append(report),
    )
    assert seen[-1] == ("converting", path.stat().st_size, path.stat().st_size)


def test_nothing_is_replaced_or_left_behind(
    small: StateDict, tmp_path: Path, assert_same: Callable[..., None]
) -> None:
    save_file(dict(small), tmp_path / "in.safetensors")
    save_file({**small, "classification_head.weight": torch.ones(2)}, tmp_path / "headed.safetensors")
    checkpoint = open_checkpoint(tmp_path / "in.safetensors")
    with pytest.raises(OutputError, match="is also an input"):
        convert(checkpoint, tmp_path / "in.safetensors", "open_clip", force=True)
    with pytest.raises(OutputError, match="already exists"):
        convert(checkpoint, tmp_path / "headed.safetensors", "open_clip")
    with pytest.raises(MismatchError, match=r"classification_head\.weight"):
        convert(open_checkpoint(tmp_path / "headed.safetensors"), tmp_path / "x.safetensors", "huggingface")
    with pytest.raises(CheckpointError, match="no layout 'onnx'"):
        convert(checkpoint, tmp_path / "x.safetensors", "onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["headed.safetensors", "in.safetensors"]
    assert_same(open_checkpoint(tmp_path / "in.safetensors"), small)


@pytest.fixture
def vit_record(small_clip: Any) -> dict[str, Any]:
    """The model record of `small_clip`."""
    vision = {"image_size": 8, "layers": 2, "width": 16, "head_width": 8, "patch_size": 4, "mlp_ratio": 2.0}
    text = {"context_length": 8, "vocab_size": 64, "width": 12, "heads": 2, "layers": 1, "mlp_ratio": 2.0}
    config = {"embed_dim": 6, "vision_cfg": vision, "text_cfg": text, "quick_gelu": True}
    preprocess = {
        "size": 8, "mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1],
        "interpolation": "bilinear", "resize_mode": "shortest",
    }  # fmt: skip
    return {"name": "small", "config": config, "preprocess": preprocess}


def test_a_hugging_face_folder_comes_back_as_a_folder_that_open_clip_loads(
    small_clip: Any, small: StateDict, vit_record: dict[str, Any], tmp_path: Path
) -> None:
    import open_clip

    save_file(dict(small), tmp_path / "in.safetensors")
    theirs = convert_folder(
        open_checkpoint(tmp_path / "in.safetensors"), tmp_path / "hf", "huggingface", vit_record
    )
    assert sorted(file.name for file in theirs.iterdir()) == [
        "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip
    opened = open_checkpoint(theirs)
    found = opened.extra["model"]
    assert found["config"] == vit_record["config"]
    steps = {"resize": 8, "crop": [8, 8]}  # transformers crops half a pixel to the other side
    assert found["preprocess"] == {**vit_record["preprocess"], "steps": steps}
    ours = convert_folder(opened, tmp_path / "oc", "open_clip", {**found, "config": {**found["config"]}})
    model = open_clip.create_model(f"local-dir:{ours}").eval()
    image, text = torch.randn(2, 3, 8, 8), torch.randint(1, 63, (2, 8))
    quick = open_clip.CLIP(**vit_record["config"]).eval()
    quick.load_state_dict(dict(small))
    with torch.no_grad():
        assert torch.equal(model.encode_image(image), quick.encode_image(image))
        assert torch.equal(model.encode_text(text), quick.encode_text(text))
        assert not torch.equal(model.encode_image(image), small_clip.encode_image(image))


def test_a_folder_is_converted_whole_or_not_at_all(
    small: StateDict, vit_record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(dict(small), tmp_path / "in.safetensors")
    opened = open_checkpoint(tmp_path / "in.safetensors")
    with pytest.raises(OutputError, match="does not exist"):
        convert_folder(opened, tmp_path / "no" / "hf", "huggingface", vit_record)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("clipmerge.checkpoint.convert.write_at", full)
        with pytest.raises(OutputError, match=r"No space left") as refused:
            convert_folder(opened, tmp_path / "hf", "huggingface", vit_record)
    assert "clipmerge-tmp" not in refused.value.message
    assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]
    convert_folder(opened, tmp_path / "hf", "huggingface", vit_record)
    with pytest.raises(OutputError, match="already exists"):
        convert_folder(opened, tmp_path / "hf", "huggingface", vit_record)
    assert convert_folder(opened, tmp_path / "hf", "huggingface", vit_record, force=True) == tmp_path / "hf"


def test_configurations_agree_with_the_published_ones() -> None:
    """openai/clip-vit-base-patch32 and laion/CLIP-ViT-H-14 on the Hub, and open_clip's own."""
    import open_clip

    b32 = {"model_type": "clip", "projection_dim": 512, "text_config": {}, "vision_config": {}}
    found = from_huggingface_config(b32)
    vision = {
        "image_size": 224,
        "layers": 12,
        "width": 768,
        "head_width": 64,
        "patch_size": 32,
        "mlp_ratio": 4,
    }
    text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4}
    assert found == {
        **open_clip.get_model_config("ViT-B-32-quickgelu"),
        "vision_cfg": vision,
        "text_cfg": text,
    }
    huge = to_huggingface_config(open_clip.get_model_config("ViT-H-14"))
    assert huge is not None
    assert {key: huge["vision_config"][key] for key in ("hidden_size", "num_attention_heads", "hidden_act")} == {
        "hidden_size": 1280, "num_attention_heads": 16, "hidden_act": "gelu",
    }  # fmt: skip
    assert huge["text_config"]["num_hidden_layers"] == 24
    back = from_huggingface_config(huge)
    assert back is not None
    assert to_huggingface_config(back) == huge
    tanh = {**b32, "vision_config": {"hidden_act": "gelu_new"}, "text_config": {"hidden_act": "gelu"}}
    found = from_huggingface_config(tanh)
    assert found is not None
    assert (found["vision_cfg"]["act_kwargs"], found["quick_gelu"]) == ({"approximate": "tanh"}, False)
    assert "act_kwargs" not in found["text_cfg"]
    written = to_huggingface_config(found)
    assert written is not None
    assert written["vision_config"]["hidden_act"] == "gelu_pytorch_tanh"
    assert written["text_config"]["hidden_act"] == "gelu"
    for other in ("RN50", "coca_ViT-B-32", "convnext_base"):
        assert to_huggingface_config(open_clip.get_model_config(other)) is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model_type": "blip"}, None),
        ({"text_config": None}, "has sizes that"),
        ({"text_config": {"hidden_act": "relu"}, "vision_config": {"hidden_act": "relu"}}, "has hidden_act 'relu'"),
        ({"vision_config": {"hidden_act": "gelu"}}, "has gelu in the image tower and quick_gelu in the text tower"),
        ({"text_config": {"hidden_act": "gelu_new"}}, "has quick_gelu in the image tower and gelu_new in the text"),
        ({"vision_config": {"layer_norm_eps": 1e-6}}, "has layer_norm_eps 1e-06"),
        ({"vision_config": {"hidden_size": "768"}}, "has sizes that"),
        ({"vision_config": {"hidden_size": 0}}, "has sizes that"),
        ({"vision_config": {"num_attention_heads": 0}}, "has sizes that"),
        ({"vision_config": {"hidden_act": ["gelu"]}}, "has hidden_act"),
        ({"model_type": "siglip", "vision_config": {"hidden_act": "relu"}}, "has hidden_act 'relu'"),
        ({"model_type": "siglip", "text_config": {"layer_norm_eps": 1e-5}, "vision_config": {"num_channels": 1}},
         "has layer_norm_eps 1e-05"),
    ],
)  # fmt: skip
def test_configurations_that_open_clip_has_no_model_for_give_none_and_say_why(
    change: dict[str, Any], why: str | None
) -> None:
    base: dict[str, Any] = {"model_type": "clip", "text_config": {}, "vision_config": {}}
    assert from_huggingface_config({**base, **change}) is None
    told = why_untranslated({**base, **change})
    assert told is None if why is None else why in str(told)
