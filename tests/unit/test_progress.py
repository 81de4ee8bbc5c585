"""Progress off a terminal: lines, few of them, and right."""

from __future__ import annotations

import pytest

from common import progress as module
from common.progress import progress


def test_work_that_is_soon_done_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(100, "loading") as bar:
        bar.update(100)
    assert capsys.readouterr() == ("", "")


def test_lines_say_how_far(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINE_INTERVAL_S", 0.0)
    with progress(2_000_000, "loading") as bar:
        bar.update(500_000)
        bar.update(500_000)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.rpartition(",")[0] for line in err.splitlines()] == [
        "loading: 25%, 500 kB of 2 MB",
        "loading: 50%, 1 MB of 2 MB",
    ]


def test_disabled_says_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINE_INTERVAL_S", 0.0)
    with progress(10, "loading", enabled=False) as bar:
        bar.update(10)
    assert capsys.readouterr() == ("", "")
