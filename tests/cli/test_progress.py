import io
import re
import sys

import pytest

from clipmerge_cli.options import Talk
from clipmerge_cli.progress import _count, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_nobody_watches_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as on_progress:
        assert on_progress is None
    assert "".join(capsys.readouterr()) == ""


def test_quiet_is_quiet_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress(quiet=True) as on_progress:
        assert on_progress is None
    assert terminal.getvalue() == ""


def test_bars_on_a_terminal_say_what_and_how_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with progress() as on_progress:
        assert on_progress is not None
        on_progress("scoring", 3, 10)
        on_progress("waiting", 0, 0)
    shown = terminal.getvalue()
    assert "scoring" in shown
    assert "3/10" in shown
    assert re.search(r"elapsed .*0:00:0\d", shown)
    assert re.search(r"about .*(-:--:--|0:\d\d:\d\d).* left", shown)


def test_before_the_first_bar_a_word_says_that_something_is_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with Talk().loading():
        pass
    assert "loading torch and the model …" in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress():
        pass
    assert "loading …" in terminal.getvalue()


def test_long_counts_are_percentages() -> None:
    assert (_count(3, 10), _count(5 * 10**8, 10**9), _count(0, 0), _count(7, 0)) == ("3/10", "50 %", "", "7")
