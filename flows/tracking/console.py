"""Progress on the console: bars on a terminal, plain lines elsewhere."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn

from diffusion.common.escaping import escape_controls
from flows.environment import settings

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
OURS = ("diffusion", "flows")
"""The loggers of our packages."""


@dataclass
class Pace:
    """Rate and remaining time of one kind of work, and the rate limit of its lines."""

    started: float = field(default_factory=time.monotonic)
    started_at: int | None = None
    """Units done at the first report; the earlier part of a resumed run does not count as speed."""
    reached: int = 0
    """Units done at the last report."""
    last_line: float = float("-inf")

    def due(self, done: int, total: int | None) -> bool:
        """Whether a line is due: the first, the last, and one every ten seconds."""
        now = time.monotonic()
        # A smaller number belongs to the next of several runs.
        if self.started_at is None or done < self.reached:
            self.started, self.started_at = now, done
        self.reached = done
        if done != total and now - self.last_line < SECONDS_BETWEEN_LINES:
            return False
        self.last_line = now
        return True

    def words(self, done: int, total: int | None) -> str:
        """Rate and remaining time as text; empty if unknown."""
        rate = (done - (self.started_at or 0)) / max(time.monotonic() - self.started, 1e-9)
        if rate <= 0:
            return ""
        per_second = f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"
        if total is None or done >= total:
            return per_second
        minutes, seconds = divmod(round((total - done) / rate), 60)
        return f"{per_second}, {minutes}:{seconds:02d} left"


class Console(Protocol):
    """Display of progress and log lines."""

    def __call__(self, what: str, done: int, total: int | None, note: str = "") -> None:
        """Show that ``done`` of ``total`` units of ``what`` are done."""

    def write(self, line: str) -> None:
        """Show ``line``."""

    def close(self) -> None:
        """End the display."""


class ConsoleHandler(logging.Handler):
    """Log handler that shows the records of our packages on the console."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Show the message, marked if it is a warning."""
        mark = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        self.console.write(mark + record.getMessage())


@contextmanager
def console() -> Iterator[Console]:
    """Bars on a terminal, plain lines elsewhere, JSON lines with DARKROOM_LOG=json; also shows our log records."""
    shown, handler = _json_console() if settings().log == "json" else _text_console()
    ours = [logging.getLogger(name) for name in OURS]
    before = [(each.level, each.propagate) for each in ours]
    for each in ours:
        each.addHandler(handler)
        each.setLevel(logging.INFO)
        # Prefect's own console would write the same lines of JSON again.
        each.propagate = each.propagate and not isinstance(shown, LogLines)
    try:
        yield shown
    finally:
        for each, (level, propagate) in zip(ours, before, strict=True):
            each.removeHandler(handler)
            each.setLevel(level)
            each.propagate = propagate
        shown.close()


def _text_console() -> tuple[Console, logging.Handler]:
    shown: Console = Bars() if sys.stderr.isatty() else Lines()
    return shown, ConsoleHandler(shown)


def _json_console() -> tuple[Console, logging.Handler]:
    from flows.tracking.json_logs import Formatter

    handler = logging.StreamHandler()
    handler.setFormatter(Formatter())
    return LogLines(), handler


class Lines:
    """Plain lines, to standard error or to ``write``."""

    def __init__(self) -> None:
        self.paces: dict[str, Pace] = {}

    def __call__(self, what: str, done: int, total: int | None, note: str = "") -> None:
        """Write a line if one is due."""
        pace = self.paces.setdefault(what, Pace())
        if pace.due(done, total):
            count = f"{done:,}" if total is None else f"{done:,} of {total:,}"
            self.write(", ".join(part for part in (f"{what}: {count}", pace.words(done, total), note) if part))

    def close(self) -> None:
        """Do nothing."""

    def write(self, line: str) -> None:
        """Print ``line`` to standard error."""
        print(escape_controls(line), file=sys.stderr, flush=True)


class LogLines(Lines):
    """Progress lines in the log, as JSON."""

    def write(self, line: str) -> None:
        """Log ``line``, unless the log of a Prefect run has it already."""
        from flows.tracking.json_logs import about

        if "flow_run_id" not in about():
            logger.info(line)


class Bars:
    """Bars on a terminal, one for each kind of work."""

    def __init__(self) -> None:
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}", markup=False),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=rich.console.Console(stderr=True),
        )
        self.bars: dict[str, tuple[TaskID, Pace]] = {}

    def __call__(self, what: str, done: int, total: int | None, note: str = "") -> None:
        """Move the bar of ``what``."""
        if what not in self.bars:
            self.progress.start()
            self.bars[what] = self.progress.add_task(what, total=total, pace="", note=""), Pace()
        note = escape_controls(note)
        bar, pace = self.bars[what]
        pace.due(done, total)
        self.progress.update(bar, completed=done, total=total, pace=pace.words(done, total), note=note)
        if self.progress.finished:
            self.close()

    def write(self, line: str) -> None:
        """Print ``line`` above the bars."""
        self.progress.console.print(escape_controls(line), markup=False, highlight=False)

    def close(self) -> None:
        """Stop the live display."""
        self.progress.stop()
