"""Every layout is saved as its authors save it and comes out as open_clip's names and bytes."""

import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clipmerge.checkpoint.huggingface import from_huggingface, to_huggingface
from clipmerge.checkpoint.open import open_checkpoint
from clipmerge.errors import MismatchError

Same = Callable[..., None]
StateDict = Mapping[str, Any]


def to_hugging_names(state: StateDict) -> dict[str, Any]:
    """transformers' own conversion (convert_clip_original_pytorch_to_hf.py), the other way around from ours."""
    out: dict[str, Any] = {"logit_scale": state["logit_scale"]}
    out["text_projection.weight"] = state["text_projection"].T.contiguous()
    out["visual_projection.weight"] = state["visual.proj"].T.contiguous()
    out["text_model.embeddings.token_embedding.weight"] = state["token_embedding.weight"]
    out["text_model.embeddings.position_embedding.weight"] = state["positional_embedding"]
    out["vision_model.embeddings.class_embedding"] = state["visual.class_embedding"]
    out["vision_model.embeddings.patch_embedding.weight"] = state["visual.conv1.weight"]
    out["vision_model.embeddings.position_embedding.weight"] = state["visual.positional_embedding"]
    norms = {"text_model.final_layer_norm": "ln_final", "vision_model.pre_layrnorm": "visual.ln_pre",
             "vision_model.post_layernorm": "visual.ln_post"}  # fmt: skip
    for new, old in norms.items():
        for kind in ("weight", "bias"):
            out[f"{new}.{kind}"] = state[f"{old}.{kind}"]
    for tower, prefix in (("text_model", "transformer"), ("vision_model", "visual.transformer")):
        count = len([name for name in state if name.startswith(prefix) and name.endswith("ln_1.weight")])
        for i in range(count):
            new, old = f"{tower}.encoder.layers.{i}", f"{prefix}.resblocks.{i}"
            for kind in ("weight", "bias"):
                q, k, v = state[f"{old}.attn.in_proj_{kind}"].chunk(3)
                out[f"{new}.self_attn.q_proj.{kind}"] = q.contiguous()
                out[f"{new}.self_attn.k_proj.{kind}"] = k.contiguous()
                out[f"{new}.self_attn.v_proj.{kind}"] = v.contiguous()
                out[f"{new}.self_attn.out_proj.{kind}"] = state[f"{old}.attn.out_proj.{kind}"]
                out[f"{new}.layer_norm1.{kind}"] = state[f"{old}.ln_1.{kind}"]
                out[f"{new}.layer_norm2.{kind}"] = state[f"{old}.ln_2.{kind}"]
                out[f"{new}.mlp.fc1.{kind}"] = state[f"{old}.mlp.c_fc.{kind}"]
                out[f"{new}.mlp.fc2.{kind}"] = state[f"{old}.mlp.c_proj.{kind}"]
    return out


def test_open_clip(small: StateDict, tmp_path: Path, assert_same: Same) -> None:
    save_file(dict(small), tmp_path / "a.safetensors")
    torch.save(dict(small), tmp_path / "open_clip_pytorch_model.bin")
    training = {"epoch": 3, "name": "run", "state_dict": {f"module.{k}": v for k, v in small.items()}}
    torch.save(training, tmp_path / "epoch_3.pt")
    torch.save({f"_orig_mod.module.{k}": v for k, v in small.items()}, tmp_path / "compiled.pt")
    for name in ("a.safetensors", "open_clip_pytorch_model.bin", "epoch_3.pt", "compiled.pt"):
        checkpoint = open_checkpoint(tmp_path / name)
        assert_same(checkpoint, small)
        assert checkpoint.layout == "open_clip"
    assert open_checkpoint(tmp_path / "epoch_3.pt").extra["saved"] == {"epoch": 3, "name": "run"}


class Archive(nn.Module):
    """What OpenAI's archives are: the model traced, three numbers beside it, a mask that is no state."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        for name, child in model.named_children():
            if name != "visual":
                self.add_module(name, child)
        self.visual = model.visual
        for name in ("positional_embedding", "text_projection", "logit_scale"):
            self.register_parameter(name, getattr(model, name))
        for name, value in (("input_resolution", 8), ("context_length", 8), ("vocab_size", 64)):
            self.register_buffer(name, torch.tensor(value))
        self.attn_mask = torch.ones(2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.visual(image) * self.logit_scale.exp()  # type: ignore[no-any-return, operator]


def test_openai_torchscript(small_clip: Any, small: StateDict, tmp_path: Path, assert_same: Same) -> None:
    import copy

    model = Archive(copy.deepcopy(small_clip)).half().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, torch.ones(1, 3, 8, 8).half(), check_trace=False).save(
            tmp_path / "ViT-B-32.pt"
        )
    checkpoint = open_checkpoint(tmp_path / "ViT-B-32.pt")
    assert_same(checkpoint, {name: tensor.half() for name, tensor in small.items()})
    assert checkpoint.layout == "openai"
    assert checkpoint.name == "ViT_B_32"
    assert checkpoint.extra["dropped"] == ("context_length", "input_resolution", "vocab_size")


def with_head(state: StateDict, classes: int = 3) -> dict[str, Any]:
    """The image tower and a trained head, under open_clip's names."""
    head = torch.randn(classes, 6, generator=torch.Generator().manual_seed(1))
    kept = {
        name: value for name, value in state.items() if name.startswith("visual.") or name == "logit_scale"
    }
    return {**kept, "classification_head.weight": head, "classification_head.bias": torch.zeros(classes)}


@pytest.mark.parametrize("module", ["", "module."])
def test_model_soups(module: str, small: StateDict, tmp_path: Path, assert_same: Same) -> None:
    expected = with_head(small)
    saved = {
        f"{module}{'' if name.startswith('classification_head') else 'model.'}{name}": value
        for name, value in expected.items()
    }
    torch.save(saved, tmp_path / "model_0.pt")
    checkpoint = open_checkpoint(tmp_path / "model_0.pt")
    assert_same(checkpoint, expected)
    assert checkpoint.layout == "model-soups"


def preprocessing() -> Any:
    """open_clip's transform: lambdas and functions by name, an enum, PIL's constants."""
    from torchvision import transforms

    resize = transforms.Resize(8, interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([resize, transforms.CenterCrop(8), transforms.ToTensor()])


@pytest.mark.parametrize("save", ["torch.save", "pickle.dump"])
def test_wise_ft_and_patching(
    save: str, authors: Any, small_clip: Any, small: StateDict, tmp_path: Path, assert_same: Same
) -> None:
    expected = {**small, **with_head(small)}
    encoder = authors.ImageEncoder(small_clip, preprocessing())
    head = authors.ClassificationHead(expected["classification_head.weight"])
    classifier = authors.ImageClassifier(encoder, head)
    path = tmp_path / "checkpoint_1.pt"
    if save == "torch.save":
        torch.save(classifier, path)
    else:
        path.write_bytes(pickle.dumps(classifier))
    checkpoint = open_checkpoint(path)
    assert_same(checkpoint, expected)
    assert checkpoint.layout == "wise-ft"
    assert checkpoint.extra["class"] == "src.models.modeling.ImageClassifier"


def test_task_vectors_and_their_heads(
    authors: Any, small_clip: Any, small: StateDict, tmp_path: Path, assert_same: Same
) -> None:
    torch.save(authors.ImageEncoder(small_clip, preprocessing()), tmp_path / "finetuned.pt")
    encoder = open_checkpoint(tmp_path / "finetuned.pt")
    assert_same(encoder, small)
    assert encoder.layout == "task-vectors"
    torch.save({f"model.{name}": value for name, value in small.items()}, tmp_path / "nonlinear.pt")
    assert_same(open_checkpoint(tmp_path / "nonlinear.pt"), small)
    weight = torch.randn(5, 6)
    torch.save(authors.ClassificationHead(weight), tmp_path / "head_Cars.pt")
    head = open_checkpoint(tmp_path / "head_Cars.pt")
    assert head.layout == "head"
    assert_same(head, {"classification_head.weight": weight, "classification_head.bias": torch.zeros(5)})


@pytest.mark.parametrize("container", ["safetensors", "bin"])
def test_hugging_face(container: str, small: StateDict, tmp_path: Path, assert_same: Same) -> None:
    named = to_hugging_names(small)
    named["text_model.embeddings.position_ids"] = torch.arange(8).expand(1, -1)
    named["vision_model.embeddings.position_ids"] = torch.arange(5).expand(1, -1)
    path = tmp_path / ("model.safetensors" if container == "safetensors" else "pytorch_model.bin")
    if container == "safetensors":
        save_file({name: value.contiguous() for name, value in named.items()}, path)
    else:
        torch.save(named, path)
    checkpoint = open_checkpoint(path)
    assert_same(checkpoint, small)
    assert checkpoint.layout == "huggingface"
    assert len(checkpoint.extra["dropped"]) == 2


def test_names_to_hugging_face_and_back_are_the_same_bytes(
    small: StateDict, tmp_path: Path, assert_same: Same
) -> None:
    from dataclasses import replace

    save_file(dict(small), tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    there = to_huggingface(checkpoint.tensors)
    assert_same(replace(checkpoint, tensors=dict(sorted(there.items()))), to_hugging_names(small))
    back, dropped = from_huggingface(there)
    assert not dropped
    assert_same(replace(checkpoint, tensors=dict(sorted(back.items()))), small)
    assert all(tensor.strides is None for tensor in back.values())


def test_the_image_tower_of_hugging_face_alone(small: StateDict, tmp_path: Path, assert_same: Same) -> None:
    named = {n: t for n, t in to_hugging_names(small).items() if n.startswith(("vision", "visual"))}
    save_file(named, tmp_path / "model.safetensors")
    expected = {name: value for name, value in small.items() if name.startswith("visual.")}
    assert_same(open_checkpoint(tmp_path / "model.safetensors"), expected)


def test_hugging_face_names_that_have_no_place_stay_as_they_are(
    small: StateDict, tmp_path: Path, assert_same: Same
) -> None:
    named = to_hugging_names(small)
    named["text_model.head.weight"] = torch.ones(2)
    save_file(named, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    assert_same(checkpoint, named)
    assert checkpoint.layout == "transformers"
    assert checkpoint.extra["without_place"] == ("text_model.head.weight",)


def test_q_without_v_is_refused(small: StateDict, tmp_path: Path) -> None:
    named = to_hugging_names(small)
    del named["text_model.encoder.layers.0.self_attn.v_proj.bias"]
    save_file(named, tmp_path / "model.safetensors")
    with pytest.raises(MismatchError, match=r"transformer\.resblocks\.0\.attn\.in_proj_bias"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_a_head_has_no_place_in_hugging_face(small: StateDict, tmp_path: Path) -> None:
    save_file(with_head(small), tmp_path / "a.safetensors")
    with pytest.raises(MismatchError, match=r"classification_head\.bias"):
        to_huggingface(open_checkpoint(tmp_path / "a.safetensors").tensors)


def test_names_that_are_open_clips_are_left_alone(tmp_path: Path) -> None:
    names = ["visual.trunk.blocks.0.norm1.weight", "text.transformer.resblocks.0.ln_1.weight", "logit_bias"]
    save_file({name: torch.ones(1) for name in names}, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert sorted(checkpoint.tensors) == sorted(names)
    assert checkpoint.layout == "open_clip"
