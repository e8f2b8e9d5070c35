"""Rate and time left, and the lines of long work, as those who watch it read them."""

import pytest

from flows.tracking.console import CONSOLE, Lines, Pace, clock, phase


class Clock:
    """A monotonic clock that is set by hand: a test may not depend on how fast this machine is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_progress_rate_starts_with_the_first_report_of_each_run(hands: Clock) -> None:
    pace = Pace()
    pace.add(500)
    assert pace.words(2000) == "", "nothing is known yet"
    hands.now += 20
    pace.add(700)
    assert pace.words(2000) == "10/s, 2:10 left", "what a resumed run had before does not count"
    hands.now += 1000
    pace.add(100)
    assert pace.words(2000) == "", "another run of the same kind"
    hands.now += 10
    pace.add(300)
    assert pace.words(2000) == "20/s, 1:25 left"


def test_a_slow_start_does_not_spoil_the_estimate(hands: Clock) -> None:
    pace, done = Pace(), 0
    for second in range(300):
        hands.now += 1
        done += 1 if second < 100 else 10
        pace.add(done)
    assert pace.words(done + 1000) == "10/s, 1:40 left"


def test_work_of_a_second_has_no_rate(hands: Clock) -> None:
    pace = Pace()
    pace.add(0)
    hands.now += 1
    pace.add(500)
    assert pace.words(500) == pace.words(1000) == ""


def test_slow_work_has_a_rate_of_its_own(hands: Clock) -> None:
    pace = Pace()
    pace.add(0)
    hands.now += 100
    pace.add(30)
    assert pace.words(100) == "0.3/s, 3:53 left"


def test_lines_without_a_terminal_come_every_half_minute(hands: Clock) -> None:
    messages: list[str] = []
    lines = Lines(messages.append)
    for done in range(0, 501, 50):
        hands.now += 0.1
        lines("images sampled", done, 500)
    assert messages == []
    for done in range(0, 901, 10):
        hands.now += 1
        lines("images trained on", done, 900, "loss 0.1")
    assert len(messages) == 4
    assert messages[0] == "images trained on: 280 of 900, 10/s, 1:02 left, loss 0.1"
    assert messages[-1] == "images trained on: 900 of 900, 10/s, loss 0.1", "the end of what took long"


def test_a_phase_ends_with_one_line_and_its_duration(hands: Clock) -> None:
    messages: list[str] = []
    lines, seconds = Lines(messages.append), dict[str, float]()
    token = CONSOLE.set(lines)
    try:
        with phase("train", seconds):
            for done in range(0, 401, 10):
                hands.now += 1
                lines("images trained on", done, 400)
        with phase("evaluate", seconds):
            hands.now += 5
            lines("KID of halves", 500, 500)
    finally:
        CONSOLE.reset(token)
    assert messages == [
        "train: images trained on: 290 of 400, 10/s, 0:11 left",
        "train      done in 0:41",
        "evaluate   done in 0:05",
    ]
    assert seconds == {"train": 41, "evaluate": 5}


def test_time_left_covers_expected_later_phases(hands: Clock) -> None:
    messages: list[str] = []
    lines, seconds, expected = Lines(messages.append), dict[str, float](), {"evaluate": 60.0, "promote": 20.0}
    token = CONSOLE.set(lines)
    try:
        with phase("train", seconds, expected):
            for done in range(0, 301, 10):
                hands.now += 1
                lines("images trained on", done, 400)
        with phase("evaluate", seconds, expected):
            # Other work of the phase follows: what it took last time says more than the pace of this one.
            for done in range(0, 301, 10):
                hands.now += 1
                lines("images sampled", done, 400)
        with phase("promote", seconds, expected):
            for done in range(0, 301, 10):
                hands.now += 1
                lines("images sampled", done, 400)
    finally:
        CONSOLE.reset(token)
    assert [line for line in messages if "done in" not in line] == [
        "train: images trained on: 290 of 400, 10/s, 0:11 left, about 1:31 left in all",
        "evaluate: images sampled: 290 of 400, 10/s, 0:11 left, about 0:50 left in all",
        "promote: images sampled: 290 of 400, 10/s, 0:11 left",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3600, "1:00:00"), (59.6, "1:00")])
def test_durations_are_minutes_and_seconds(seconds: float, text: str) -> None:
    assert clock(seconds) == text
