"""Progress of long work: bars on a terminal, plain lines elsewhere, and the log and artifacts of a Prefect run."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from uuid import UUID

import rich.console
import rich.progress
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn

from diffusion.common.escaping import escape_controls
from diffusion.common.progress import Progress
from flows.environment import settings
from flows.tracking.json_logs import Formatter, about

logger = logging.getLogger(__name__)

OURS = ("diffusion", "flows")


@dataclass
class Pace:
    """Rate and remaining time of one kind of work, and the rate limit of its lines."""

    started: float = field(default_factory=time.monotonic)
    started_at: int | None = None
    """Units done at the first report; the earlier part of a resumed run does not count as speed."""
    reached: int = 0
    last_line: float = float("-inf")

    def due(self, done: int, total: int | None) -> bool:
        """Whether a line is due: the first, the last, and one every ten seconds."""
        now = time.monotonic()
        # A smaller number belongs to the next of several runs.
        if self.started_at is None or done < self.reached:
            self.started, self.started_at = now, done
        self.reached = done
        if done != total and now - self.last_line < 10.0:
            return False
        self.last_line = now
        return True

    def words(self, done: int, total: int | None) -> str:
        """Rate and remaining time as text; empty if unknown."""
        if (rate := (done - (self.started_at or 0)) / max(time.monotonic() - self.started, 1e-9)) <= 0:
            return ""
        per_second = f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"
        if total is None or done >= total:
            return per_second
        minutes, seconds = divmod(round((total - done) / rate), 60)
        return f"{per_second}, {minutes}:{seconds:02d} left"


def _print(line: str) -> None:
    print(escape_controls(line), file=sys.stderr, flush=True)


def _log_json(line: str) -> None:
    # The log of a Prefect run has its lines already.
    if "flow_run_id" not in about():
        logger.info(line)


def _log_in_run(line: str) -> None:
    if "flow_run_id" in about():
        from prefect.logging import get_run_logger

        get_run_logger().info(escape_controls(line))


class Lines:
    """Plain progress lines, by default on standard error."""

    def __init__(self, write: Callable[[str], None] = _print) -> None:
        self.write, self.paces = write, dict[str, Pace]()

    def __call__(self, what: str, done: int, total: int | None, note: str = "") -> None:
        """Write a line that ``done`` of ``total`` units of ``what`` are done, if one is due."""
        pace = self.paces.setdefault(what, Pace())
        if pace.due(done, total):
            count = f"{done:,}" if total is None else f"{done:,} of {total:,}"
            self.write(", ".join(filter(None, (f"{what}: {count}", pace.words(done, total), note))))

    def close(self) -> None:
        """End the display."""


class Bars(Lines):
    """Bars on a terminal, one for each kind of work."""

    def __init__(self) -> None:
        # Lines appear above the bars.
        super().__init__(lambda line: self.progress.console.print(escape_controls(line), markup=False, highlight=False))
        self.progress = rich.progress.Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}", markup=False),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=rich.console.Console(stderr=True),
        )
        self.bars: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int | None, note: str = "") -> None:
        """Move the bar of ``what``."""
        pace = self.paces.setdefault(what, Pace())
        if what not in self.bars:
            self.progress.start()
            self.bars[what] = self.progress.add_task(what, total=total, pace="", note="")
        pace.due(done, total)
        words, note = pace.words(done, total), escape_controls(note)
        self.progress.update(self.bars[what], completed=done, total=total, pace=words, note=note)
        if self.progress.finished:
            self.close()

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
    shown = Lines(_log_json) if as_json else Bars() if sys.stderr.isatty() else Lines()
    handler: logging.Handler = logging.StreamHandler() if as_json else ConsoleHandler(shown)
    if as_json:
        handler.setFormatter(Formatter())
    ours = [logging.getLogger(name) for name in OURS]
    before = [(each.level, each.propagate) for each in ours]
    for each in ours:
        each.addHandler(handler)
        each.setLevel(logging.INFO)
        # Prefect's own console would write the same lines of JSON again.
        each.propagate = each.propagate and not as_json
    token = CONSOLE.set(shown)
    try:
        yield shown
    finally:
        CONSOLE.reset(token)
        for each, (level, propagate) in zip(ours, before, strict=True):
            each.removeHandler(handler)
            each.setLevel(level)
            each.propagate = propagate
        shown.close()


def reporter() -> Progress:
    """Progress callback that writes to the log of the Prefect run, and to the console if there is one."""
    log, console = Lines(_log_in_run), CONSOLE.get()

    def report(what: str, done: int, total: int | None, note: str = "") -> None:
        log(what, done, total, note)
        if console is not None:
            console(what, done, total, note)

    return report


def bar(key: str) -> Progress:
    """Like ``reporter``, with a progress artifact on the current flow run that has rate and remaining time."""
    from prefect.artifacts import create_progress_artifact, update_progress_artifact

    report, pace = reporter(), Pace()
    artifact = create_progress_artifact(progress=0.0, key=key)
    assert isinstance(artifact, UUID)  # a coroutine only in async code

    def show(what: str, done: int, total: int | None, note: str = "") -> None:
        report(what, done, total, note)
        if total and pace.due(done, total):
            words = ", ".join(filter(None, (f"{done:,} of {total:,} {what}", pace.words(done, total), note)))
            update_progress_artifact(artifact, progress=100 * done / total, description=words)

    return show
