"""How long work tells how far it is, without knowing who is looking."""

from typing import Protocol


class Progress(Protocol):
    """Called now and then by long work; whoever watches derives rate and time left."""

    def __call__(self, what: str, done: int, total: int | None, note: str = "") -> None:
        """``done`` of ``total`` units (images, steps; None: unknown) of ``what`` are finished."""


def silent(what: str, done: int, total: int | None, note: str = "") -> None:
    """Nobody is looking."""
