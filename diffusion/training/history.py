"""Figures by images seen, in a CSV file that plots and people can read while training runs."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusion.files import sync_file, write_bytes


@dataclass(frozen=True)
class History:
    """A CSV file whose first column, ``images``, only grows."""

    path: Path
    columns: tuple[str, ...]

    def rewind(self, images: int) -> None:
        """Forget what lies beyond ``images``, and a last line that a kill cut short.

        Columns that an earlier version did not write become ``nan``.
        """
        columns = ("images", *self.columns)
        kept = [",".join(columns)]
        if self.path.is_file():
            # A power cut may leave zeros behind what was synced.
            complete = csv.DictReader(self.path.read_text().split("\0")[0].split("\n")[:-1], restval="nan")
            kept += [
                ",".join(row.get(name, "nan") for name in columns) for row in complete if int(row["images"]) <= images
            ]
        write_bytes(self.path, ("\n".join(kept) + "\n").encode())

    def append(self, images: int, figures: Mapping[str, float]) -> None:
        """Add a row."""
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([images, *(figures[name] for name in self.columns)])

    def sync(self) -> None:
        """Make all rows so far durable."""
        sync_file(self.path)


def read_rows(path: Path) -> list[dict[str, float]]:
    """All rows of a history, oldest first."""
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
