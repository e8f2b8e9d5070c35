"""Trackers besides the caller's, chosen by ``training.log_to``: TensorBoard, and Weights & Biases.

Both keep their files in the folder ``trackers`` of the run. A training that resumes logs the steps after its last
checkpoint again; each of them counts once.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from PIL import Image

from diffusion.common.errors import UserError, install_hint
from diffusion.common.files import make_folder, sync_file, write_bytes
from diffusion.common.image_grids import save_png
from diffusion.training.config import TrackerName
from diffusion.training.logging import Tracker

TRACKERS = "trackers"
"""Subfolder of a run with what its trackers write; deleted with the run."""


class ClosableTracker(Tracker, Protocol):
    """A tracker that ends with the training."""

    def close(self) -> None:
        """Write all that was logged, and end."""


class TensorBoard:
    """Event files for TensorBoard; those of steps that are logged again are hidden by its own mark of a restart."""

    def __init__(self, folder: Path, images: int, fields: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        is_new = not folder.exists()
        self.writer = SummaryWriter(str(folder), purge_step=images + 1)
        if is_new:
            self.writer.add_text("configuration", f"```json\n{json.dumps(fields, indent=2)}\n```", 0)

    def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
        """Write scalars."""
        for name, value in metrics.items():
            if math.isfinite(value):
                self.writer.add_scalar(f"train/{name}", value, images)

    def log_image(self, name: str, image: Image.Image, images: int) -> None:
        """Write an image."""
        import numpy as np

        self.writer.add_image(name, np.asarray(image.convert("RGB")), images, dataformats="HWC")

    def sync(self) -> None:
        """Hand all events to the operating system, which keeps them when the process is killed."""
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()


class WeightsAndBiases:
    """Run of Weights & Biases, which the variables WANDB_* configure; a resumed training continues it.

    A killed process of W&B loses what it has not written. So all is kept in a journal, whose records have W&B's step
    numbers, and what W&B lacks of it is logged again: offline, all of it to a folder that replaces the one before.
    """

    def __init__(self, folder: Path, images: int, fields: Mapping[str, Any]) -> None:
        import wandb

        make_folder(folder)
        self.folder, self.journal, name = folder, folder / "records.jsonl", folder / "run_id.txt"
        if not name.is_file():  # a training that is begun again is another run
            write_bytes(name, uuid4().hex.encode())
        # A kill may leave an incomplete line, and a power cut zeros after the synced data.
        text = self.journal.read_text().partition("\0")[0] if self.journal.is_file() else ""
        write_bytes(self.journal, text[: text.rfind("\n") + 1].encode())
        self.records: list[dict[str, Any]] = [json.loads(line) for line in self.journal.read_text().splitlines()]
        self.known = set(map(_names, self.records))
        for replaced in (folder / "wandb").glob("offline-run-*"):
            shutil.rmtree(replaced)
        try:
            self.run = wandb.init(
                id=name.read_text(),
                resume="allow",
                dir=folder,
                project=os.environ.get("WANDB_PROJECT", "darkroom"),
                name=os.environ.get("WANDB_NAME", f"{fields['dataset']}-{name.read_text()[:8]}"),
                config=dict(fields),
                # What the command line prints is not W&B's, and stays as it is.
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise UserError(
                f"training.log_to: W&B takes no run ({' '.join(str(error).split())[:300]}): run `wandb login`, set "
                "WANDB_MODE=offline, or leave wandb out"
            ) from error
        self.image = wandb.Image
        self.run.define_metric("*", step_metric="images")
        for number in range(self.run.step, len(self.records)):
            self._send(number)

    def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
        """Log finite metrics over the number of images."""
        values = {f"train/{name}": float(value) for name, value in metrics.items() if math.isfinite(value)}
        self._add({"images": images, "values": values})

    def log_image(self, name: str, image: Image.Image, images: int) -> None:
        """Log an image."""
        path = self.folder / f"{name}-{images:010d}.png"
        save_png(path, image)
        self._add({"images": images, "values": {}, "name": name, "file": path.name})

    def _add(self, record: dict[str, Any]) -> None:
        if (key := _names(record)) in self.known:
            return  # logged by an earlier process
        self.known.add(key)
        with self.journal.open("a") as file:
            file.write(f"{json.dumps(record)}\n")
        self.records.append(record)
        self._send(len(self.records) - 1)

    def _send(self, number: int) -> None:
        record = self.records[number]
        if "file" in record:
            with Image.open(self.folder / record["file"], formats=("PNG",)) as image:
                values = {record["name"]: self.image(image)}
        else:
            values = record["values"]
        self.run.log(values | {"images": record["images"]}, step=number)

    def sync(self) -> None:
        """Flush the journal to disk."""
        sync_file(self.journal)

    def close(self) -> None:
        """End the run, after all was sent."""
        self.run.finish()


def _names(record: Mapping[str, Any]) -> tuple[object, ...]:
    """What a record logs, without values."""
    return record["images"], record.get("name", ""), *record["values"]


CLASSES: Mapping[TrackerName, type[TensorBoard] | type[WeightsAndBiases]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def require_trackers(names: Sequence[TrackerName] | None) -> None:
    """Raise UserError if the package of one is not installed."""
    for name in names or ():
        if find_spec(name) is None:
            raise UserError(f"training.log_to: {name} is not installed: {install_hint(name)}")


@contextmanager
def open_trackers(
    names: Sequence[TrackerName] | None, output: Path, images: int, fields: Mapping[str, Any]
) -> Iterator[list[ClosableTracker]]:
    """Open the trackers ``names`` of the run in the folder ``output``, which has seen ``images`` images.

    ``fields`` describe the run.
    """
    with ExitStack() as stack:
        yield [
            stack.enter_context(closing(CLASSES[name](output / TRACKERS / name, images, fields)))
            for name in dict.fromkeys(names or ())
        ]
