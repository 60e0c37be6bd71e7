"""Positional embeddings brought to a base's grid: open_clip's own loader says what is right."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import clipmerge
from clipmerge.errors import MismatchError
from clipmerge.weights.positions import resize_positions
from clipmerge.weights.weights import load, mean
from clipmerge_cli.app import main


def clip(image_size: int = 16, context: int = 12, **more: Any) -> Any:
    from open_clip import CLIP

    torch.manual_seed(image_size + context)
    vision = {"image_size": image_size, "layers": 1, "width": 64, "patch_size": 4}
    text = {"context_length": context, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    model = CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text, **more)
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text, **more}
    return model, {
        "name": f"at{image_size}",
        "config": config,
        "preprocess": {"size": image_size, "mean": [0.5] * 3},
    }


@pytest.fixture
def files(tmp_path: Path) -> Mapping[str, Path]:
    """A base, a finetuned model at another image size, one of another context, one of both."""
    from clipmerge.weights.record import write_record

    paths = {}
    for name, sizes in {"base": (16, 12), "larger": (24, 12), "longer": (16, 20), "both": (8, 7)}.items():
        model, record = clip(*sizes)
        paths[name] = tmp_path / f"{name}.safetensors"
        save_file(model.state_dict(), paths[name], write_record({"format": 1, "total": 1, "model": record}))
    return paths


@pytest.mark.parametrize("name", ["larger", "longer", "both"])
def test_positions_are_those_of_open_clips_loader(name: str, files: Mapping[str, Path]) -> None:
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    right, (model, _) = load_file(files[name]), clip()
    resize_pos_embed(right, model)
    resize_text_pos_embed(right, model)
    ours = resize_positions(load(files[name]), load(files["base"])).state_dict()
    assert ours.keys() == right.keys()
    assert all(torch.equal(ours[key], right[key]) for key in right)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_kept(dtype: torch.dtype, files: Mapping[str, Path], tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in load_file(files["larger"]).items()}
    save_file(state, tmp_path / "half.safetensors")
    ours = resize_positions(load(tmp_path / "half.safetensors"), load(files["base"])).state_dict()
    full = resize_positions(load(files["larger"]), load(files["base"])).state_dict()
    assert {tensor.dtype for tensor in ours.values()} == {dtype}
    name = "visual.positional_embedding"
    torch.testing.assert_close(ours[name].float(), full[name], rtol=1e-2, atol=1e-3)


def test_what_needs_no_change_stays_the_same_checkpoint(files: Mapping[str, Path]) -> None:
    base = load(files["base"])
    assert resize_positions(base, base) is base


def test_resizing_is_linear_so_vectors_take_it_too(files: Mapping[str, Path], tmp_path: Path) -> None:
    base, larger = load(files["base"]), load(files["larger"])
    other = {name: tensor * 3 for name, tensor in load_file(files["larger"]).items()}
    save_file(other, tmp_path / "other.safetensors")
    there = load(tmp_path / "other.safetensors")
    (there - larger).save(tmp_path / "vector.safetensors")
    vector = resize_positions(load(tmp_path / "vector.safetensors"), base)
    assert vector.kind() == 0
    right = (resize_positions(there, base) - resize_positions(larger, base)).state_dict()
    for name, tensor in vector.state_dict().items():
        torch.testing.assert_close(tensor, right[name])


@pytest.mark.parametrize("name", ["larger", "longer", "both"])
@pytest.mark.parametrize(
    "words",
    [
        ("interpolate", "BASE", "OTHER", "--alpha", "0.5"),
        ("soup", "BASE", "OTHER"),
        ("add", "BASE", "OTHER", "--scale", "0.5"),
        ("merge", "b + 0.5*(o - b)", "b=BASE", "o=OTHER"),
    ],
)
def test_the_command_names_the_cause_and_the_option(
    words: tuple[str, ...],
    name: str,
    files: Mapping[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.safetensors"
    places = (("BASE", str(files["base"])), ("OTHER", str(files[name])))
    given = [word.replace(*places[0]).replace(*places[1]) for word in words]
    assert main([*given, "-o", str(out)]) == 1
    said = capsys.readouterr().err
    assert "image sizes (or context lengths) differ" in said
    assert "--resize-positions" in said
    assert main([*given, "-o", str(out), "--resize-positions"]) == 0
    base, other = load(files["base"]), load(files[name])
    right = mean([base, resize_positions(other, base)]).state_dict()
    written = load_file(out)
    assert all(torch.equal(written[key], right[key]) for key in right)
    model = clipmerge.load(out).model or {}
    assert (model["config"]["vision_cfg"]["image_size"], model["config"]["text_cfg"]["context_length"]) == (
        16,
        12,
    )
    assert model["preprocess"] == {"size": 16, "mean": [0.5] * 3}
    assert main(["verify", str(out)]) == 0


def test_what_no_resizing_bridges_is_refused(files: Mapping[str, Path], tmp_path: Path) -> None:
    state = load_file(files["larger"])
    save_file({**state, "visual.positional_embedding": torch.ones(13, 64)}, tmp_path / "odd.safetensors")
    with pytest.raises(MismatchError, match="has 13 positions, the base 17: one of the grids is not square"):
        resize_positions(load(tmp_path / "odd.safetensors"), load(files["base"]))
    save_file({**state, "visual.positional_embedding": torch.ones(17, 32)}, tmp_path / "wide.safetensors")
    with pytest.raises(MismatchError, match="another width"):
        resize_positions(load(tmp_path / "wide.safetensors"), load(files["base"]))
