"""The journal: append-only lines that survive a kill, and answer for what was paid."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from clipmerge.errors import SelectionError
from clipmerge.evaluate.journal import Journal


def test_what_was_put_is_there_for_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "new" / "scores.jsonl"
    Journal(path).put("k", {"correct": 3, "n": 4})
    assert dict(Journal(path).get("k") or {}) == {"key": "k", "correct": 3, "n": 4}
    assert Journal(path).get("other") is None


def test_fresh_ignores_the_file_and_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    Journal(path).put("old", {"correct": 1})
    fresh = Journal(path, fresh=True)
    assert fresh.get("old") is None
    fresh.put("new", {"correct": 2})
    assert fresh.get("new") is not None
    assert len(Journal(path)) == 2


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_passed_over_and_does_not_spoil_the_next(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "scores.jsonl"
    journal = Journal(path)
    journal.put("a", {"correct": 1})
    journal.put("b", {"correct": 2})
    path.write_bytes(path.read_bytes()[:-cut])
    torn = Journal(path)
    assert torn.get("a") is not None
    torn.put("c", {"correct": 3})
    after = Journal(path)
    assert after.get("a") is not None
    assert after.get("c") is not None


def test_lines_that_are_not_ours_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text('not json\n[1]\n{"no": "key"}\n{"key": 5}\n\n{"key": "k", "correct": 1}\n')
    assert len(Journal(path)) == 1


@pytest.mark.parametrize(
    "content", ["a,b\n1,2\n", '{"event": "step", "loss": 1.0}\n', "# Notes\n\n", "\x08\x00{}"]
)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.md"
    path.write_text(content)
    for fresh in (False, True):
        with pytest.raises(SelectionError, match=r"notes\.md is not a journal"):
            Journal(path, fresh=fresh)
    assert path.read_text() == content


def test_it_tells_once_that_a_search_goes_on_and_nothing_of_what_it_was_just_given(tmp_path: Path) -> None:
    path, told = tmp_path / "scores.jsonl", list[str]()
    journal = Journal(path, on_resume=lambda: told.append("again"))
    journal.put("k", {"n": 4})
    assert journal.get("k")
    assert told == []
    again = Journal(path, on_resume=lambda: told.append("again"))
    assert again.get("other") is None
    assert told == []
    assert again.get("k")
    assert again.get("k")
    assert told == ["again"]


def test_a_full_score_is_not_replaced_by_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    journal = Journal(path)
    journal.put("k", {"correct": 3, "n": 4})
    journal.put("k", {"at_most": 0.5, "n": 4})
    for known in (journal, Journal(path)):
        assert (known.get("k") or {})["correct"] == 3


WRITE_MANY = """
import sys
from clipmerge.evaluate.journal import Journal
journal = Journal(sys.argv[1])
for i in range(200):
    journal.put(f"{sys.argv[2]}-{i}", {"correct": i, "bits": "x" * 500})
"""


def test_processes_share_one_journal_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITE_MANY, path, who]) for who in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    lines = path.read_text().splitlines()
    assert len(lines) == len({json.loads(line)["key"] for line in lines}) == 400


def test_a_journal_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SelectionError, match="cannot be"):
        Journal(tmp_path / "file" / "scores.jsonl").put("k", {})
    with pytest.raises(SelectionError, match="is a folder"):
        Journal(tmp_path)
