"""mergekit's YAML means what its documentation says, in our own expressions; what we do not have is refused."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

import clipmerge as cm
from clipmerge.errors import RecipeError
from clipmerge.weights.mergekit import read_mergekit

MODELS = """models:
- {model: a.safetensors, parameters: {weight: 1}}
- {model: b.safetensors, parameters: {weight: 3}}
"""


@pytest.fixture
def folder(tiny_checkpoints: Mapping[str, Path], tmp_path: Path) -> Path:
    for name, source in (("base", "base"), ("a", "ft0"), ("b", "ft1")):
        (tmp_path / f"{name}.safetensors").symlink_to(tiny_checkpoints[source])
    return tmp_path


def read(folder: Path, text: str) -> tuple[cm.Weights, str | None]:
    (folder / "merge.yml").write_text(text)
    return read_mergekit(folder / "merge.yml")


@pytest.mark.parametrize(
    ("text", "notation", "dtype"),
    [
        (f"merge_method: linear\n{MODELS}dtype: float16\n", "0.25*a + 0.75*b", "fp16"),
        (f"merge_method: task_arithmetic\nbase_model: base.safetensors\n{MODELS}parameters: {{lambda: 0.5}}\n",
         "-1*base + 0.5*a + 1.5*b", None),
        ("merge_method: slerp\nbase_model: base.safetensors\nparameters: {t: 0.3}\n"
         "models: [{model: base.safetensors}, {model: a.safetensors}]\n", "slerp(base, a, alpha=0.3)", None),
        (f"merge_method: model_stock\nbase_model: base.safetensors\n{MODELS}", "model_stock([base, a, b])", None),
        ("merge_method: ties\nbase_model: base.safetensors\nparameters: {density: 0.5, weight: 1}\n"
         "models: [{model: a.safetensors}, {model: b.safetensors}]\n",
         "base + ties([a - base, b - base], density=0.5)", None),
    ],
    ids=["linear", "task_arithmetic", "slerp", "model_stock", "ties"],
)  # fmt: skip
def test_a_method_that_we_have(folder: Path, text: str, notation: str, dtype: str | None) -> None:
    from clipmerge.weights.parse import parse

    weights, said = read(folder, text)
    names = {name: cm.load(folder / f"{name}.safetensors", name) for name in ("base", "a", "b")}
    names = {name: weights for name, weights in names.items() if re.search(rf"\b{name}\b", notation)}
    wanted = parse(notation, names).state_dict()
    made = weights.state_dict()
    assert all(made[name].equal(tensor) for name, tensor in wanted.items())
    assert said == dtype


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"merge_method: dare_ties\nbase_model: base.safetensors\n{MODELS}", "dare_ties with these parameters"),
        (f"merge_method: ties\nbase_model: base.safetensors\n{MODELS}", "ties with these parameters"),
        (f"merge_method: task_arithmetic\n{MODELS}", "task_arithmetic needs a base_model"),
        ("merge_method: slerp\nslices: []\n", "slices of mergekit cannot be read"),
        ("merge_method: linear\nmodels: [{model: a.safetensors, parameters: {weight: [0, 1]}}]\n",
         "weight must be one number for each model"),
        ("a: 1\n", "it has no merge_method"),
        ("a: [\n", "cannot be read as YAML"),
    ],
)  # fmt: skip
def test_what_we_do_not_have_is_refused(folder: Path, text: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why) as refused:
        read(folder, text)
    assert refused.value.hint
