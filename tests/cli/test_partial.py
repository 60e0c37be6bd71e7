"""Published encoders (no text tower) beside a whole base, as a user types it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

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
    written = ["-o", "out.safetensors", "--force", "--model", str(tiny_model_file)]
    out = [*written, "--limit", "30"]
    roles = ["--patch", VAL, "--supported", "digits#train"]
    assert main(["patch", "full.safetensors", "va.pt", *roles, "--alphas", "0,0.5,1", *out]) == 0
    assert "va has no text transformer: kept as in full" in capsys.readouterr().err
    assert load_file("out.safetensors").keys() == files["v0"].keys()
    val = ["--val", VAL, "--val", VAL, "--scale", "auto", "--scales", "0,1", "--base", "v0.pt"]
    assert main(["add", "full.safetensors", "va.pt", "vb.pt", *val, *out]) == 0
    assert load_file("out.safetensors").keys() == files["v0"].keys()
    assert main(["negate", "full.safetensors", "va.pt", "--base", "v0.pt", "--scale", "1", *written]) == 0
    negated = load_file("out.safetensors")["visual.proj"]
    torch.testing.assert_close(negated, 2 * files["v0"]["visual.proj"] - files["va"]["visual.proj"])


def test_task_vectors_that_do_not_say_so(
    files: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    for tuned in ("va", "vb"):
        torch.save({n: t - files["v0"][n] for n, t in files[tuned].items()}, f"{tuned}.tv.pt")
    two = ["add", "full.safetensors", "va.tv.pt", "vb.tv.pt", "-o", "out.safetensors"]
    assert main(two) == 1
    shown = capsys.readouterr().err
    assert "va.tv.pt is a difference (a task vector), not a model" in shown
    assert "hint: say that it is one: --vectors" in shown
    assert main([*two, "--vectors"]) == 0
    merged = load_file("out.safetensors")
    for name, start in files["v0"].items():
        added = start + 0.4 * (files["va"][name] + files["vb"][name] - 2 * start)
        torch.testing.assert_close(merged[name], added, rtol=0, atol=1e-6)
    assert main(["verify", "out.safetensors"]) == 0
    text = "full + 0.4*(vector(a) + vector(b))"
    named = ["full=full.safetensors", "a=va.tv.pt", "b=vb.tv.pt"]
    assert main(["merge", text, *named, "-o", "same.safetensors"]) == 0
    assert all(torch.equal(tensor, merged[name]) for name, tensor in load_file("same.safetensors").items())
    soup = [
        "soup",
        "va.tv.pt",
        "vb.tv.pt",
        "--base",
        "full.safetensors",
        "--vectors",
        "-o",
        "soup.safetensors",
    ]
    assert main(soup) == 0
    middle = (files["va"]["visual.proj"] + files["vb"]["visual.proj"]) / 2
    torch.testing.assert_close(load_file("soup.safetensors")["visual.proj"], middle, rtol=0, atol=1e-6)


@pytest.fixture
def loras(files: dict[str, dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Two adapters, one/ and two/, of one weight of full.safetensors: name → that weight's update."""
    weight = "visual.transformer.resblocks.0.mlp.c_fc"
    updates = {}
    for number, name in enumerate(("one", "two")):
        draw = torch.Generator().manual_seed(number)
        a, b = (torch.randn(shape, generator=draw) for shape in ((2, 16), (32, 2)))
        Path(name).mkdir()
        factors = {f"base_model.model.{weight}.lora_{letter}.weight": f for letter, f in (("A", a), ("B", b))}
        save_file(factors, f"{name}/adapter_model.safetensors")
        Path(f"{name}/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 1}')
        updates[name] = b @ a / 2
    return updates


@pytest.mark.parametrize(
    ("words", "shares"),
    [
        (["soup", "one", "two", "--base", "full.safetensors"], (0.5, 0.5)),
        (["interpolate", "full.safetensors", "one", "--alpha", "0.3"], (0.3, 0)),
        (["add", "full.safetensors", "one", "two/adapter_model.safetensors", "--scale", "0.4"], (0.4, 0.4)),
        (["add", "full.safetensors", "one", "--base", "v0.pt", "--scale", "0.4"], (0.4, 0)),
        (["negate", "full.safetensors", "one", "--scale", "0.5"], (-0.5, 0)),
        (
            ["merge", "full + 0.5*(one - full)", "full=full.safetensors", "one=one", "--base", "full"],
            (0.5, 0),
        ),
        (["merge", "mean([one, two])", "one=one", "two=two", "--base", "full.safetensors"], (0.5, 0.5)),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_adapters_are_ingredients(
    files: dict[str, dict[str, Any]],
    loras: dict[str, torch.Tensor],
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    shares: tuple[float, float],
) -> None:
    assert main([*words, "-o", "out.safetensors"]) == 0
    assert "LoRA adapter" in capsys.readouterr().err
    merged = load_file("out.safetensors")
    for name, tensor in files["v0"].items():
        update = sum(share * loras[n] for share, n in zip(shares, loras, strict=True))
        moved = tensor + (update if name == "visual.transformer.resblocks.0.mlp.c_fc.weight" else 0)
        torch.testing.assert_close(merged[name], moved, rtol=0, atol=1e-6)
    assert main(["verify", "out.safetensors", "--parents", "."]) == 0


def test_adapters_need_their_base_and_are_shown(
    loras: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["soup", "one", "two", "-o", "out.safetensors"]) == 1
    assert "one is a LoRA adapter: say which model it was trained from" in capsys.readouterr().err
    assert main(["inspect", "one"]) == 0
    assert "a LoRA adapter" in capsys.readouterr().out
    recipe = 'expression = "0.5*one + 0.5*two"\nbase = "full.safetensors"\n[checkpoints]\none = "one"\ntwo = "two"\n'
    Path("r.toml").write_text(recipe)
    assert main(["merge", "r.toml", "-o", "out.safetensors"]) == 0


@pytest.mark.parametrize("ingredients", [["va.pt", "vb.pt"], ["one", "two"]])
def test_encoders_and_adapters_are_chosen_on_images(
    loras: dict[str, torch.Tensor],
    tiny_model_file: Path,
    capsys: pytest.CaptureFixture[str],
    ingredients: list[str],
) -> None:
    images = ["--model", str(tiny_model_file), "--limit", "30"]
    soup = ["soup", *ingredients, "--base", "full.safetensors", "--greedy", "--val", VAL, *images]
    assert main([*soup, "-o", "soup.safetensors", "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)
    names = [name.removesuffix(".pt") for name in ingredients]
    assert sorted(step["name"] for step in chosen["history"]) == names
    assert main(["verify", "soup.safetensors", "--parents", "."]) == 0
    shown = ["evaluate", *ingredients, "--base", "full.safetensors", "--data", VAL, *images]
    capsys.readouterr()
    assert main(shown) == 0
    out = capsys.readouterr().out
    assert all(f" {name} " in out for name in names)


def test_a_towers_folder_is_inspected_without_a_models_name(
    files: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    tower = {name: tensor for name, tensor in files["va"].items() if name.startswith("visual.")}
    Path("tower").mkdir()
    save_file(tower, "tower/model.safetensors")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    record = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, **sizes}
    Path("tower/config.json").write_text(json.dumps(record))
    assert main(["inspect", "tower"]) == 0
    out = capsys.readouterr().out
    assert "a tower, without a name" in out
    assert "None" not in out
