"""Class names × templates → prompts."""

from pathlib import Path

import pytest

from clipmerge.data.open import open_split
from clipmerge.data.prompts import CONTEXTS, context_templates, prompts, templates
from clipmerge.errors import DataError

from .conftest import MakeFolder


def test_every_template_with_every_name() -> None:
    assert prompts(["cat", "{dog}"], ["a {}.", "{} and {}"]) == [
        ["a cat.", "cat and cat"],
        ["a {dog}.", "{dog} and {dog}"],
    ]


def test_open_clips_templates() -> None:
    openai = templates("openai")
    assert len(openai) == 80
    assert openai[0] == "a bad photo of a {}."
    assert len(templates("simple")) == 7
    assert set(templates("simple")) <= set(openai)


def test_templates_as_text_and_from_a_file(tmp_path: Path) -> None:
    assert templates("a drawing of a {}.") == ("a drawing of a {}.",)
    assert templates(["a {}", "the {c}"]) == ("a {}", "the {}")
    (tmp_path / "t.txt").write_text("a {}.\n\n  the {c}!\n")
    assert templates(tmp_path / "t.txt") == ("a {}.", "the {}!")
    (tmp_path / "t.json").write_text('["one {}"]')
    assert templates(str(tmp_path / "t.json")) == ("one {}",)


def test_defaults(folder: MakeFolder) -> None:
    assert templates() == ("a photo of a {}.",)
    assert templates(None, open_split(folder(cat=1, dog=1))) == ("a photo of a {}.",)
    assert templates(None, open_split("digits#val@rotate:20")) == ('a photo of the number: "{}".',)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a cat", "'a cat'"), ("a {} on {place}", "'a {} on {place}'"), ("", "is empty")],
)
def test_templates_without_a_place_for_the_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(DataError) as caught:
        templates(tmp_path / "t.txt")
    assert message in caught.value.message
    assert (
        caught.value.hint
        == 'write templates as "a photo of a {}."; or openai, simple, or a file with one per line'
    )


def test_no_file_of_templates() -> None:
    with pytest.raises(DataError, match="templates cannot be read from opnai: No such file or directory"):
        templates("opnai")


def test_a_json_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("[1,")
    with pytest.raises(DataError, match="is not JSON"):
        templates(tmp_path / "t.json")


def test_contexts_of_car_ft() -> None:
    assert context_templates(["sketch", "ink drawing", "a bad {}"]) == (
        "a sketch of a {}.",
        "an ink drawing of a {}.",
        "a bad {}",
    )
    assert len(context_templates()) == len(CONTEXTS) == len(set(CONTEXTS))
