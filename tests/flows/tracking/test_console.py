"""Rate and time left, as those who watch long work read them."""

import pytest

from flows.tracking.console import Pace


class Clock:
    """A monotonic clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


def test_progress_rate_starts_with_the_first_report_of_each_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A clock by hand: a test may not depend on how fast this machine is.
    clock, total = Clock(monkeypatch), 2000
    pace = Pace()
    assert pace.due(500, total), "the first"
    clock.now += 20
    assert pace.due(700, total)
    assert pace.words(700, total) == "10/s, 2:10 left", "what a resumed run had before does not count"
    clock.now += 1
    assert not pace.due(710, total), "a line a second is too much"
    clock.now += 1000
    assert pace.due(100, total), "another run of the same kind"
    clock.now += 10
    assert pace.due(300, total)
    assert pace.words(300, total) == "20/s, 1:25 left"
    assert pace.due(total, total), "the last"


def test_slow_work_has_a_rate_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pace = Clock(monkeypatch), Pace()
    assert pace.due(0, 100)
    clock.now += 100
    assert pace.words(30, 100) == "0.3/s, 3:53 left"
