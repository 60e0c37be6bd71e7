"""AdaMerging: the gradient by finite differences, scales that stay in [0, 1], labels that nobody looks at."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import clipmerge as cm
from clipmerge.search.mixture import Mixture
from clipmerge_cli.app import main


@pytest.fixture
def evaluator(tiny_spec: Any) -> Any:
    splits = {"a": cm.open_split("digits#val", limit=24), "b": cm.open_split("digits#val@invert", limit=24)}
    return cm.Evaluator(splits, tiny_spec)


@pytest.fixture
def models(tiny_checkpoints: Any) -> list[Any]:
    return cm.load_all([tiny_checkpoints[name] for name in ("base", "ft0", "ft1")])


def entropy(evaluator: Any, weights: Any, split: str) -> float:
    p = evaluator.logits(weights, split).double().softmax(-1)
    return float(-(p * p.log()).sum(-1).mean())


def test_the_gradient_is_that_of_the_mean_entropy(evaluator: Any, models: list[Any]) -> None:
    evaluator.load(models[0])
    mixture = Mixture(evaluator, "a", models, ("*",))
    everything = torch.arange(24)
    shares = torch.tensor([[0.4, 0.3, 0.3]])
    gradient, _, loss = mixture.gradients(shares, 1.0, everything, labelled=False)
    base, one, two = models

    def at(x: float, y: float) -> float:
        return entropy(evaluator, base + x * (one - base) + y * (two - base), "a")

    assert loss == pytest.approx(at(0.3, 0.3), abs=1e-5)
    by_scale = (gradient[0, 1:] - gradient[0, 0]).tolist()
    step = 0.01
    expected = [(at(0.3 + step, 0.3) - at(0.3 - step, 0.3)) / (2 * step)]
    expected += [(at(0.3, 0.3 + step) - at(0.3, 0.3 - step)) / (2 * step)]
    assert by_scale == pytest.approx(expected, rel=0.02, abs=1e-5)


def test_it_lowers_the_entropy_within_bounds_and_says_what_it_made(evaluator: Any, models: list[Any]) -> None:
    base, one, two = models
    result = cm.adamerging(base, {"a": one, "b": two}, evaluator, steps=30, lr=0.05)
    scales = dict(result.coefficients or {})
    assert all(0 <= scale <= 1 for scale in scales.values())
    made = base + scales["a"] * (one - base) + scales["b"] * (two - base)
    for name, tensor in made.state_dict().items():
        torch.testing.assert_close(result.weights.state_dict()[name], tensor, rtol=0, atol=1e-6)
    start = base + 0.3 * (one - base) + 0.3 * (two - base)
    assert sum(entropy(evaluator, result.weights, s) for s in "ab") < sum(
        entropy(evaluator, start, s) for s in "ab"
    )
    again = cm.adamerging(base, {"a": one, "b": two}, evaluator, steps=30, lr=0.05)
    assert again.coefficients == result.coefficients
    fast = cm.adamerging(base, {"a": one, "b": two}, evaluator, steps=3, lr=10)
    assert set(dict(fast.coefficients or {}).values()) <= {0.0, 1.0}


def test_labels_are_not_looked_at(tiny_spec: Any, models: list[Any]) -> None:
    split = cm.open_split("digits#val", limit=24)
    turned = replace(split, labels=np.ascontiguousarray(split.labels[::-1]))
    results = [
        cm.adamerging(models[0], {"a": models[1]}, cm.Evaluator({"a": s}, tiny_spec), steps=5).coefficients
        for s in (split, turned)
    ]
    assert results[0] == results[1]


def test_test_images_make_it_transductive(tiny_spec: Any, models: list[Any]) -> None:
    evaluator = cm.Evaluator({"a": cm.open_split("digits#test", limit=12)}, tiny_spec)
    result = cm.adamerging(models[0], {"a": models[1]}, evaluator, steps=2, per="tower")
    assert result.transductive
    assert result.to_json()["transductive"]
    assert "transductive" in repr(result)
    assert set(result.coefficients or {}) == {"visual", "text", "*"}


def test_the_command_learns_writes_and_verifies(
    tiny_checkpoints: Any, tiny_model_file: Path, tmp_path: Path, capsys: Any
) -> None:
    files = [str(tiny_checkpoints[name]) for name in ("base", "ft0", "ft1")]
    out = tmp_path / "both.safetensors"
    data = ["--val", "digits#val[:16]", "--val", "digits#val[:16]@invert", "--model", str(tiny_model_file)]
    command = ["add", *files, "--adamerging", "--steps", "2", "--per", "tensor", *data, "-o", str(out)]
    assert main(["--help"]) == 0
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "adamerging"
    assert len(document["coefficients"]) == len(cm.load(files[0]).names)
    assert cm.verify(out, [Path(files[0]).parent]).status == "verified"
    assert main(["add", *files, "--adamerging", "--scales", "0:1:0.5", *data, "-o", str(out), "--force"]) == 2
    assert "learns the scales" in capsys.readouterr().err
