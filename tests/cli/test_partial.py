"""Published encoders (no text tower) beside a whole base, as a user types it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clipmerge_cli.app import main

VAL = "digits#val"


@pytest.fixture
def files(
    tiny_checkpoints: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, dict[str, Any]]:
    """full.safetensors, and as task_vectors publishes them (no `transformer.*`) v0.pt, va.pt and vb.pt."""
    monkeypatch.chdir(tmp_path)
    states = {n: load_file(tiny_checkpoints[f]) for n, f in {"v0": "base", "va": "ft0", "vb": "ft1"}.items()}
    (tmp_path / "full.safetensors").symlink_to(tiny_checkpoints["base"])
    for name, state in states.items():
        encoder = {f"model.{n}": t for n, t in state.items() if not n.startswith("transformer.")}
        torch.save(encoder, f"{name}.pt")
    return states


def test_encoders_are_added_to_a_whole_base(
    files: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["add", "full.safetensors", "va.pt", "vb.pt", "--base", "v0.pt", "-o", "out.safetensors"]) == 0
    )
    assert "v0, va, vb have no text transformer: kept as in full" in capsys.readouterr().err
    v0, va, vb, merged = (*files.values(), load_file("out.safetensors"))
    for name, tensor in v0.items():
        moved = (
            tensor if name.startswith("transformer.") else tensor + 0.4 * (va[name] + vb[name] - 2 * tensor)
        )
        torch.testing.assert_close(merged[name], moved, rtol=0, atol=1e-6)
        assert torch.equal(merged[name], tensor) == name.startswith("transformer.")
    assert main(["verify", "out.safetensors"]) == 0


@pytest.mark.parametrize("alpha", [0.5, 1])
def test_an_encoder_is_interpolated_over_a_whole_base(
    files: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str], alpha: float
) -> None:
    words = ["interpolate", "full.safetensors", "va.pt", "--alpha", str(alpha), "-o", "out.safetensors"]
    assert main(words) == 0
    assert "va has no text transformer: kept as in full" in capsys.readouterr().err
    merged = load_file("out.safetensors")
    for name, tensor in files["v0"].items():
        tuned = tensor if name.startswith("transformer.") else files["va"][name]
        torch.testing.assert_close(merged[name], (1 - alpha) * tensor + alpha * tuned, rtol=0, atol=1e-6)


def test_an_encoder_is_patched_in_negated_and_searched_over_a_whole_base(
    files: dict[str, dict[str, Any]], tiny_model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(tiny_model_file), "--limit", "30"]
    out = ["-o", "out.safetensors", "--force", *model]
    roles = ["--patch", VAL, "--supported", "digits#train"]
    assert main(["patch", "full.safetensors", "va.pt", *roles, "--alphas", "0,0.5,1", *out]) == 0
    assert "va has no text transformer: kept as in full" in capsys.readouterr().err
    assert load_file("out.safetensors").keys() == files["v0"].keys()
    val = ["--val", VAL, "--val", VAL, "--scale", "auto", "--scales", "0,1", "--base", "v0.pt"]
    assert main(["add", "full.safetensors", "va.pt", "vb.pt", *val, *out]) == 0
    assert load_file("out.safetensors").keys() == files["v0"].keys()
    assert main(["negate", "full.safetensors", "va.pt", "--base", "v0.pt", "--scale", "1", *out]) == 0
    negated = load_file("out.safetensors")["visual.proj"]
    torch.testing.assert_close(negated, 2 * files["v0"]["visual.proj"] - files["va"]["visual.proj"])
