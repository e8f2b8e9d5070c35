"""Progress callbacks of long-running work."""

from typing import Protocol


class Progress(Protocol):
    """Callback that long-running work calls from time to time; the receiver derives rate and time left."""

    def __call__(self, what: str, done: int, total: int | None, note: str = "") -> None:
        """Report ``done`` of ``total`` units (images, steps; None: unknown) of ``what``."""


def ignore_progress(what: str, done: int, total: int | None, note: str = "") -> None:
    """Ignore all progress."""
