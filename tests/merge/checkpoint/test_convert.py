"""Conversion changes names and views, never bytes; there and back is the same file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipmerge.checkpoint.convert import convert
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
