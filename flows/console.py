"""How far long work is, for whoever sits before it: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn

SECONDS_BETWEEN_LINES = 10.0


@dataclass
class Pace:
    """Rate and time left of one kind of work, and when its next line is due."""

    started: float = field(default_factory=time.monotonic)
    started_at: int | None = None
    """Units done when it was first heard of: what a resumed run had before it does not count as speed."""
    last_line: float = float("-inf")

    def due(self, done: int, total: int | None) -> bool:
        """Whether a line is due: first, last, and now and then between."""
        now = time.monotonic()
        if self.started_at is None:
            self.started, self.started_at = now, done
        if done != total and now - self.last_line < SECONDS_BETWEEN_LINES:
            return False
        self.last_line = now
        return True

    def words(self, done: int, total: int | None) -> str:
        """Rate and time left, as far as they can be known."""
        rate = (done - (self.started_at or 0)) / max(time.monotonic() - self.started, 1e-9)
        if rate <= 0:
            return ""
        if total is None or done >= total:
            return f"{rate:,.0f}/s"
        minutes, seconds = divmod(round((total - done) / rate), 60)
        return f"{rate:,.0f}/s, {minutes}:{seconds:02d} left"


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
        """Nothing is left to be done."""

    def write(self, line: str) -> None:
        """Put ``line`` where it is read."""
        print(line, file=sys.stderr, flush=True)


class Bars:
    """Bars on a terminal, one for each kind of work."""

    def __init__(self) -> None:
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
            TextColumn("{task.fields[note]}", style="dim"),
            console=Console(stderr=True),
        )
        self.bars: dict[str, tuple[TaskID, Pace]] = {}

    def __call__(self, what: str, done: int, total: int | None, note: str = "") -> None:
        """Move the bar of ``what``."""
        if what not in self.bars:
            self.progress.start()
            self.bars[what] = self.progress.add_task(what, total=total, pace="", note=""), Pace()
        bar, pace = self.bars[what]
        pace.due(done, total)
        self.progress.update(bar, completed=done, total=total, pace=pace.words(done, total), note=note)
        if self.progress.finished:
            self.close()

    def close(self) -> None:
        """Give the terminal back."""
        self.progress.stop()
