"""Progress of long work: bars on a terminal, plain lines elsewhere, and the log and artifacts of a Prefect run."""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from uuid import UUID

import rich.console
import rich.progress
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn

from diffusion.common.escaping import escape_controls
from diffusion.common.progress import Progress
from flows.environment import settings
from flows.tracking.json_logs import Formatter, collect_ids

logger = logging.getLogger(__name__)

PACKAGES = ("diffusion", "flows")


EVERY = 30.0
"""Seconds between two lines where there is no terminal."""
SETTLED = 3.0
"""Seconds after which a rate says something: before, it is mostly start-up."""


def align_columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table, whose columns are as wide as their longest cells."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(map(str.ljust, row, widths)).rstrip()


@dataclass
class Pace:
    """Rate and remaining time of one kind of work, from its later half: start-up and slow beginnings count no more."""

    seen: deque[tuple[float, int]] = field(default_factory=deque)
    """Times and units done at reports, the oldest first."""
    started: float = field(default_factory=lambda: time.monotonic())
    last: float = field(default_factory=lambda: time.monotonic())
    """Time of the last line or update, from the start on."""

    def add(self, done: int) -> None:
        """Take a report of ``done`` units into account."""
        now = time.monotonic()
        # A smaller number belongs to the next of several runs.
        if self.seen and done < self.seen[-1][1]:
            self.seen.clear()
            self.started = now
        self.seen.append((now, done))
        while len(self.seen) > 2 and self.seen[1][0] <= now - max(EVERY, (now - self.started) / 2):
            self.seen.popleft()

    def is_report_due(self, seconds: float) -> bool:
        """Whether these ``seconds`` have passed since the last report; if so, the next interval begins now."""
        now = time.monotonic()
        if now - self.last < seconds:
            return False
        self.last = now
        return True

    @property
    def rate(self) -> float | None:
        """Units per second; None while it is unknown."""
        (start, start_count), (now, count) = self.seen[0], self.seen[-1]
        is_known = now - self.started >= SETTLED and count > start_count and now > start
        return (count - start_count) / (now - start) if is_known else None

    def estimate_remaining_seconds(self, total: int | None) -> float | None:
        """Remaining seconds; None while they are unknown, and at the end."""
        rate, (_, count) = self.rate, self.seen[-1]
        return None if rate is None or total is None or count >= total else (total - count) / rate

    def words(self, total: int | None) -> str:
        """Rate and remaining time as text; empty while they are unknown."""
        if (rate := self.rate) is None:
            return ""
        per_second = f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"
        seconds = self.estimate_remaining_seconds(total)
        return per_second if seconds is None else f"{per_second}, {clock(seconds)} left"


def clock(seconds: float) -> str:
    """Format a duration as minutes and seconds, or hours, minutes and seconds."""
    minutes, remainder = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{remainder:02d}" if hours else f"{minutes}:{remainder:02d}"


def _print(line: str) -> None:
    print(escape_controls(line), file=sys.stderr, flush=True)


def _log_json(line: str) -> None:
    # The log of a Prefect run has its lines already.
    if "flow_run_id" not in collect_ids():
        logger.info(line)


def _log_in_run(line: str) -> None:
    if "flow_run_id" in collect_ids():
        from prefect.logging import get_run_logger

        get_run_logger().info(escape_controls(line))


class Lines:
    """Plain progress lines, by default on standard error: one at the end of each phase, and one every half a minute."""

    def __init__(self, write: Callable[[str], None] = _print) -> None:
        self.write, self.phase, self.pace = write, "", Pace()
        self.paces = dict[str, Pace]()
        self.own, self.later = 0.0, 0.0
        """Expected seconds of this phase, and of those after it; 0 if unknown."""

    def __call__(self, what: str, done: int, total: int | None, note: str = "") -> None:
        """Write a line that ``done`` of ``total`` units of ``what`` are done, if one is due."""
        pace = self.paces.setdefault(what, Pace())
        pace.add(done)
        # The end of what took long; in a phase, the phase's end says it.
        is_end = done == total and not self.phase and time.monotonic() - pace.started >= EVERY
        if is_end or (done != total and self.pace.is_report_due(EVERY)):
            count = f"{done:,}" if total is None else f"{done:,} of {total:,}"
            title = f"{self.phase}: {what}" if self.phase else what
            self.write(", ".join(filter(None, (f"{title}: {count}", self.words(pace, total), note))))

    def words(self, pace: Pace, total: int | None) -> str:
        """Rate and remaining time of a work of ``pace``, and of all phases together where they are expected."""
        seconds, own_seconds = (
            pace.estimate_remaining_seconds(total),
            self.own and max(self.own - (time.monotonic() - self.pace.started), 0),
        )
        if not self.later or (seconds is None and not own_seconds):
            return pace.words(total)
        total_text = f"about {clock(max(seconds or 0, own_seconds) + self.later)} left in all"
        return ", ".join(filter(None, (pace.words(total), total_text)))

    def begin(self, phase: str, own: float = 0, later: float = 0) -> None:
        """Begin a phase: the work that is reported from now on is part of it.

        ``own`` and ``later``: expected seconds of the phase and of those after it; 0 if unknown.
        """
        self.phase, self.pace, self.own, self.later = phase, Pace(), own, later
        self.paces.clear()

    def end(self, seconds: float) -> None:
        """End the phase, which took this long."""
        self.write(f"{self.phase:<10} done in {clock(seconds)}")
        self.phase, self.own, self.later = "", 0, 0

    def close(self) -> None:
        """End the display."""


class Bars(Lines):
    """Live display on a terminal: a bar for each phase, or for each kind of work outside of phases."""

    def __init__(self) -> None:
        # Lines appear above the bars.
        super().__init__(lambda line: self.progress.console.print(escape_controls(line), markup=False, highlight=False))
        self.progress = rich.progress.Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[words]}", markup=False),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=rich.console.Console(stderr=True),
        )
        self.bars: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int | None, note: str = "") -> None:
        """Move the bar of the phase, or of ``what``."""
        pace = self.paces.setdefault(what, Pace())
        pace.add(done)
        count = f"{done:,}" if total is None else f"{done:,} of {total:,}"
        pace_text, note = ", ".join(filter(None, (count, self.words(pace, total)))), escape_controls(note)
        title = f"{self.phase}: {what}" if self.phase else what
        bar = self._bar(self.phase or what)
        if self.phase:
            # Other work of the same phase may follow.
            share = min(done / total, 0.99) if total else 0.0
            self.progress.update(bar, description=title, completed=share, total=1.0, words=pace_text, note=note)
            return
        self.progress.update(bar, description=title, completed=done, total=total, words=pace_text, note=note)
        if done == total and time.monotonic() - pace.started < SETTLED:
            self.progress.remove_task(self.bars.pop(what))
        if self.progress.finished:
            self.close()

    def _bar(self, name: str) -> TaskID:
        if name not in self.bars:
            self.progress.start()
            self.bars[name] = self.progress.add_task(name, total=None, words="", note="")
        return self.bars[name]

    def begin(self, phase: str, own: float = 0, later: float = 0) -> None:
        """Begin a phase, with a bar of its own."""
        super().begin(phase, own, later)
        self._bar(phase)

    def end(self, seconds: float) -> None:
        """End the phase, whose bar says how long it took."""
        bar = self._bar(self.phase)
        self.progress.update(bar, description=self.phase, completed=1, total=1, words=clock(seconds), note="")
        self.phase, self.own, self.later = "", 0, 0

    def close(self) -> None:
        """Stop the live display."""
        self.progress.stop()


class ConsoleHandler(logging.Handler):
    """Log handler that shows the records of our packages on the console."""

    def __init__(self, console: Lines) -> None:
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Show the message, marked if it is a warning."""
        mark = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        self.console.write(mark + record.getMessage())


CONSOLE: ContextVar[Lines | None] = ContextVar("console", default=None)
"""Console of the command line; flows on a worker have none."""


@contextmanager
def console() -> Iterator[Lines]:
    """Bars on a terminal, plain lines elsewhere, JSON lines with DARKROOM_LOG=json; also shows our log records."""
    as_json = settings().log == "json"
    lines = Lines(_log_json) if as_json else Bars() if sys.stderr.isatty() else Lines()
    handler: logging.Handler = logging.StreamHandler() if as_json else ConsoleHandler(lines)
    if as_json:
        handler.setFormatter(Formatter())
    loggers = [logging.getLogger(name) for name in PACKAGES]
    states = [(package_logger.level, package_logger.propagate) for package_logger in loggers]
    for package_logger in loggers:
        package_logger.addHandler(handler)
        package_logger.setLevel(logging.INFO)
        # Prefect's own console would write the same lines of JSON again.
        package_logger.propagate = package_logger.propagate and not as_json
    token = CONSOLE.set(lines)
    try:
        yield lines
    finally:
        CONSOLE.reset(token)
        for package_logger, (level, propagate) in zip(loggers, states, strict=True):
            package_logger.removeHandler(handler)
            package_logger.setLevel(level)
            package_logger.propagate = propagate
        lines.close()


def reporter() -> Progress:
    """Progress callback that writes to the log of the Prefect run, and to the console if there is one."""
    log, console = Lines(_log_in_run), CONSOLE.get()

    def report(what: str, done: int, total: int | None, note: str = "") -> None:
        log(what, done, total, note)
        if console is not None:
            console(what, done, total, note)

    return report


@contextmanager
def phase(name: str, seconds: dict[str, float], expected: Mapping[str, float] = {}) -> Iterator[None]:
    """Context of a phase of a long command, which the console shows; its duration is added to ``seconds``.

    ``expected``: seconds that it and the phases after it will probably take, by name, as far as they are known.
    """
    start, console = time.monotonic(), CONSOLE.get()
    if console is not None:
        later_seconds = sum(
            duration for phase_name, duration in expected.items() if phase_name != name and phase_name not in seconds
        )
        console.begin(name, expected.get(name, 0), later_seconds)
    yield
    seconds[name] = time.monotonic() - start
    if console is not None:
        console.end(seconds[name])


def bar(key: str) -> Progress:
    """Like ``reporter``, with a progress artifact on the current flow run that has rate and remaining time."""
    from prefect.artifacts import create_progress_artifact, update_progress_artifact

    report, pace = reporter(), Pace()
    artifact = create_progress_artifact(progress=0.0, key=key)
    assert isinstance(artifact, UUID)  # a coroutine only in async code

    def show(what: str, done: int, total: int | None, note: str = "") -> None:
        report(what, done, total, note)
        pace.add(done)
        if total and (done == total or pace.is_report_due(10.0)):
            text = ", ".join(filter(None, (f"{done:,} of {total:,} {what}", pace.words(total), note)))
            update_progress_artifact(artifact, progress=100 * done / total, description=text)

    return show
