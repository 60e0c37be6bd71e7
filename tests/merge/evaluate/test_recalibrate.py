"""BatchNorm's running statistics of merged weights, taken again on images."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import TINY
from torch.nn import functional as F

import clipmerge as cm
from clipmerge.data.pixels import mean_and_std, pixels
from clipmerge.errors import MismatchError, ModelError
from clipmerge_cli.app import main

DATA = "digits#train[:40]"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two tiny ResNets with statistics of their own."""
    folder = tmp_path_factory.mktemp("resnets")
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "patch_size": None}
    (folder / "resnet.json").write_text(json.dumps({"model_cfg": {**TINY, "vision_cfg": vision}}))
    spec = cm.resolve_model(folder / "resnet.json")
    paths = []
    for seed in (0, 1):
        state = dict(cm.build_model(spec, seed=seed).state_dict())
        noise = torch.Generator().manual_seed(seed)
        state |= {n: torch.rand(t.shape, generator=noise) + 0.1 for n, t in state.items() if "running" in n}
        paths.append(folder / f"m{seed}.safetensors")
        cm.from_state_dict(state).save(paths[-1], metadata={"model": spec.to_metadata()})
    return paths[0], paths[1]


def statistics_by_hand(weights: Any, batches: list[int]) -> list[dict[str, torch.Tensor]]:
    """Mean and unbiased variance of what reaches the first BatchNorm, in each batch."""
    spec = cm.resolve_model(None, weights)
    images = torch.from_numpy(pixels(cm.open_split(DATA), spec.preprocess)).float() / 255
    mean, std = mean_and_std(spec.preprocess, "cpu")
    filters = weights.state_dict()["visual.conv1.weight"]
    reached = F.conv2d((images - mean) / std, filters, stride=2, padding=1)
    return [
        {"mean": piece.mean((0, 2, 3)), "var": piece.var((0, 2, 3), unbiased=True)}
        for piece in reached.split(batches)
    ]


def test_statistics_are_the_mean_over_batches_of_what_the_images_give(models: tuple[Path, Path]) -> None:
    soup = cm.mean([cm.load(path) for path in models])
    for size, batches in ((40, [40]), (30, [20, 20])):
        taken = cm.recalibrate(soup, DATA, batch_size=size)
        by_hand = statistics_by_hand(soup, batches)
        for what in ("mean", "var"):
            expected = sum(batch[what] for batch in by_hand) / len(by_hand)
            torch.testing.assert_close(taken[f"visual.bn1.running_{what}"], expected, rtol=1e-4, atol=1e-5)
    assert {name.rsplit(".", 1)[1] for name in taken} == {"running_mean", "running_var"}
    assert taken.keys() == {name for name in soup.names if "running" in name}


def test_commands_recalibrate_what_they_write_and_verify_knows(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = list(map(str, models))
    commands = {
        "soup": ["soup", *files],
        "interpolate": ["interpolate", *files, "--alpha", "0.3"],
        "merge": ["merge", "a + 0.5*(b - a)", f"a={files[0]}", f"b={files[1]}"],
    }
    for name, command in commands.items():
        out, plain = tmp_path / f"{name}.safetensors", tmp_path / f"{name}-plain.safetensors"
        assert main([*command, "-o", str(plain)]) == 0
        assert main([*command, "--recalibrate", DATA, "-o", str(out)]) == 0
        assert "running statistics of BatchNorm on 40 images" in capsys.readouterr().err
        before, after = cm.load(plain).state_dict(), cm.load(out).state_dict()
        differ = {n for n in before if not torch.equal(before[n], after[n])}
        assert differ == {n for n in before if "running" in n}
        expected = cm.recalibrate(cm.load(plain), DATA)
        assert all(torch.equal(after[n], value) for n, value in expected.items())
        entry = cm.load(out).record["recalibrated"]
        assert (entry["images"], entry["tensors"]) == (40, sorted(expected))
        verdict = cm.verify(out, [models[0].parent])
        assert verdict.status == "verified"
        assert f"but for {len(expected)} running statistics" in verdict.reason


def test_a_record_excuses_no_other_tensor(models: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    out = tmp_path / "soup.safetensors"
    soup = cm.mean([cm.load(path) for path in models])
    soup.save(out, statistics=cm.recalibrate(soup, DATA))
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    record = json.loads(metadata["clipmerge"])
    record["recalibrated"]["tensors"].append("visual.conv1.weight")
    tensors = load_file(out)
    tensors["visual.conv1.weight"] += 1
    save_file(tensors, out, {**metadata, "clipmerge": json.dumps(record)})
    assert cm.verify(out, [models[0].parent]).tensor == "visual.conv1.weight"


def test_what_has_no_statistics_is_refused(
    models: tuple[Path, Path], tiny_checkpoints: Any, tiny_spec: Any, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="has no BatchNorm"):
        cm.recalibrate(cm.load(tiny_checkpoints["base"]), DATA, model=tiny_spec)
    with pytest.raises(MismatchError, match="no running statistic"):
        cm.load(models[0]).save(
            tmp_path / "x.safetensors", statistics={"visual.conv1.weight": torch.zeros(1)}
        )
    assert not (tmp_path / "x.safetensors").exists()
