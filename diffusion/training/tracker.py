"""What training wants of whoever keeps its records."""

from collections.abc import Mapping
from typing import Protocol

from PIL import Image

SPOOL = "spool"
"""The folder of a run for what a tracker keeps; it goes with the run."""
ANEW = "anew"
"""A file in it that says that the run before was thrown away, until a tracker has heard of it."""


class Tracker(Protocol):
    """Receives figures and pictures while training runs; positions are counted in images seen."""

    def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
        """Keep ``metrics`` as they were after ``images`` pictures."""

    def log_picture(self, name: str, picture: Image.Image, images: int) -> None:
        """Keep ``picture`` under ``name`` as it was after ``images`` pictures."""

    def sync(self) -> None:
        """Make what was kept so far durable: a checkpoint follows, and what came before it never comes again."""


class NoTracker:
    """Keeps nothing: the run's folder holds what training itself writes."""

    def __init__(self, anew: bool = True) -> None:
        """Whether a run begins ``anew`` makes no difference here."""

    def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
        """Drop ``metrics``."""

    def log_picture(self, name: str, picture: Image.Image, images: int) -> None:
        """Drop ``picture``."""

    def sync(self) -> None:
        """Nothing was kept."""
