"""Decisions of ``darkroom gc``: items with their fates, and the table that shows them."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from diffusion.common.config import Config
from diffusion.evaluation.reports.html import count, storage

Fate = Literal["stays", "set aside", "goes"]
"""Decision on an item; ``set aside`` items are unreferenced and go once ``retention.grace_hours`` have passed."""
FATES: tuple[Fate, ...] = ("goes", "set aside", "stays")


class Item(Config):
    """Candidate for deletion."""

    kind: str
    """Kind in the plural, such as ``runs``."""
    name: str
    bytes: int | None
    """Size in bytes; None if it is unknown."""
    fate: Fate
    why: str


@dataclass(frozen=True)
class Sweep:
    """Items of one kind, with the action that deletes those that need not stay."""

    items: list[Item]
    act: Callable[[], None]
    """Action that applies each item's fate if it still holds; a repeated call continues an interrupted one."""


def older(moment: datetime, days: float | None, now: datetime) -> bool:
    """Whether ``moment`` lies ``days`` or more before ``now``; always false if ``days`` is None."""
    return days is not None and now - moment >= timedelta(days=days)


def age(moment: datetime, now: datetime) -> str:
    """Age of ``moment`` in words."""
    days = max(0.0, (now - moment).total_seconds() / 86400)
    return f"{days:.0f} days old" if days >= 2 else f"{days * 24:.0f} hours old"


def table(items: Iterable[Item]) -> Iterator[str]:
    """Yield lines of a table: each item that goes or is set aside, and counts of those that stay by reason."""
    shown = sorted(items, key=lambda item: (FATES.index(item.fate), item.kind, item.name))
    rows = [("fate", "what", "size", "name", "why")]
    rows += [
        (item.fate, item.kind, "" if item.bytes is None else storage(item.bytes), item.name, item.why)
        for item in shown
        if item.fate != "stays"
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows if len(rows) > 1 else ():
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    staying = Counter((item.kind, item.why) for item in shown if item.fate == "stays")
    for (kind, why), number in sorted(staying.items()):
        yield f"stays      {count(number)} {kind}: {why}"
    going = [item for item in shown if item.fate == "goes"]
    aside = sum(item.fate == "set aside" for item in shown)
    freed = sum(item.bytes or 0 for item in going)
    yield f"{count(len(going))} go, {storage(freed)}; {count(aside)} are set aside; {count(sum(staying.values()))} stay"
