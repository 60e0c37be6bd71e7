import json
from pathlib import Path

import pytest

from clipmerge.errors import OutputError
from clipmerge.report.documents import markdown, write_json


def test_a_markdown_table_reads_as_plain_text_too() -> None:
    assert markdown(("model", "test"), [("a|b", 96.5), ("base", None)]) == (
        "| model | test |\n"
        "|-------|-----:|\n"
        "| a\\|b  | 96.5 |\n"
        "| base  |    – |\n"
    )  # fmt: skip


def test_json_keeps_its_order_and_its_letters(tmp_path: Path) -> None:
    path = write_json({"b": "α", "a": [1.5]}, tmp_path / "r.json")
    assert path.read_text(encoding="utf-8") == '{\n  "b": "α",\n  "a": [\n    1.5\n  ]\n}\n'
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": "α", "a": [1.5]}


def test_a_number_that_json_lacks_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_json({"a": float("nan")}, tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        write_json({}, tmp_path / "nowhere" / "r.json")
