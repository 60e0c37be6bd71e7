"""A merge as a TOML file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clipmerge.errors import RecipeError
from clipmerge.weights.recipe import load_named, parse_size, read_recipe

Put = Callable[..., Path]

FULL = """
expression = "base + 0.4*(a - base)"
output = "out/merged.safetensors"
dtype = "fp16"
shard_size = "5GB"

[checkpoints]
base = "models/base.safetensors"
a = "hf-hub:org/name"
b = "ViT-B-32:openai"
c = "/absolute/c.pt"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def test_everything_a_recipe_can_say(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, FULL))
    assert recipe.expression == "base + 0.4*(a - base)"
    assert recipe.output == tmp_path / "out/merged.safetensors"
    assert (recipe.dtype, recipe.shard_size) == ("fp16", 5_000_000_000)
    assert recipe.checkpoints == {
        "base": str(tmp_path / "models/base.safetensors"),
        "a": "hf-hub:org/name",
        "b": "ViT-B-32:openai",
        "c": "/absolute/c.pt",
    }


def test_files_are_found_relative_to_the_recipe(
    put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("r/a", x=np.float32([1.0]))
    put("r/b", x=np.float32([2.0]))
    path = write(
        tmp_path / "r",
        'expression = """\nmean([\n  a,\n  b,\n])\n"""\n[checkpoints]\na = "a.safetensors"\nb = "./b.safetensors"',
    )
    monkeypatch.chdir(tmp_path / "r" / "..")
    assert repr(read_recipe(path).weights()) == "mean([a, b])"
    assert repr(read_recipe("r/recipe.toml").weights()) == "mean([a, b])"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('expresion = "a"', "has the unknown key 'expresion'", "did you mean expression?"),
        ('expression = "a"\nzzz = 1', "has the unknown key 'zzz'", "known: expression, checkpoints"),
        ("expression = 3", "'expression' in", None),
        ('expression = "a"\ncheckpoints = "a.pt"', "must be a table of files", None),
        ('expression = "a"\n[checkpoints]\na = 3', "checkpoints.a in", None),
        ('[checkpoints]\na = "a.pt"', "has no expression", "expression ="),
        ('expression = "a', "is not TOML", None),
        ('expression = "a"\nshard_size = "many"', "'many' is not a size", "5GB"),
        ("expression = '" + "a" * 2_000_000 + "'", "is larger than a recipe can be", None),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str, hint: str | None) -> None:
    with pytest.raises(RecipeError) as refused:
        read_recipe(write(tmp_path, text))
    assert message in refused.value.message
    assert (hint or "") in (refused.value.hint or "")


def test_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml cannot be read: No such file"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="is not TOML"):
        read_recipe(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("1.5gib", 3 * 2**29), ("1000", 1000), ("2KiB", 2048)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 XB", "0", "1e9", "5GB5"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(RecipeError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize("name", ["1a", "lambda", "a b", ""])
def test_names_must_be_names(name: str) -> None:
    with pytest.raises(RecipeError, match=f"'{name}' is not a name"):
        load_named({name: "x.safetensors"})
