"""Progress where there is no terminal: lines, seldom, with what is left."""

from __future__ import annotations

import logging
import sys

import pytest

from sqft import progress as module
from sqft.progress import progress


class Clock:
    """Stands still until it is set."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_a_line_now_and_then_says_how_far_it_is_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with caplog.at_level(logging.INFO, "sqft"), progress(1000, "generating", "answer") as advance:
        for seconds, more in ((10, 90), (31, 10), (45, 100), (62, 100), (3_600, 100), (40_000, 600)):
            clock.now = seconds
            advance(more)
    assert [record.getMessage() for record in caplog.records] == [
        "generating: 100 of 1000 answers, about 5 min left",
        "generating: 300 of 1000 answers, about 2 min left",
        "generating: 400 of 1000 answers, about 1.5 h left",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(3, "3 s"), (89, "89 s"), (90, "2 min"), (5_400, "1.5 h")])
def test_durations_are_short(seconds: float, text: str) -> None:
    assert module._duration(seconds) == text


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress(2, "merging", "linear") as advance:
        advance(2)
    assert "merging:   0%" in capsys.readouterr().err
