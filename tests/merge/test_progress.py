"""The ready-made progress: one bar per kind of work, closed when it is done."""

import pytest

from clipmerge.progress import _bars, progress_bar


def test_bars_say_what_how_far_and_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    for done in (0, 3, 10):
        progress_bar("ranking", done, 10)
    progress_bar("waiting", 0, 0)
    shown = capsys.readouterr().err
    assert "ranking:   0%" in shown
    assert "10/10" in shown
    assert list(_bars) == ["waiting"]
    _bars.pop("waiting").close()
