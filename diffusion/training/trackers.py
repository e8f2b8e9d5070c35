"""Trackers besides the caller's, chosen by ``training.log_to``: TensorBoard, and Weights & Biases.

Both keep their files in the folder ``trackers`` of the run. A training that resumes logs the steps after its last
checkpoint again; each of them counts once.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from diffusion.common.errors import UserError, install_hint
from diffusion.common.files import make_folder, write_bytes
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
        self.writer = SummaryWriter(str(folder), purge_step=images + 1)  # type: ignore[no-untyped-call]
        if is_new:
            self.writer.add_text("configuration", f"```json\n{json.dumps(fields, indent=2)}\n```", 0)  # type: ignore[no-untyped-call]

    def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
        """Write scalars."""
        for name, value in metrics.items():
            if math.isfinite(value):
                self.writer.add_scalar(f"train/{name}", value, images)  # type: ignore[no-untyped-call]

    def log_image(self, name: str, image: Image.Image, images: int) -> None:
        """Write an image."""
        import numpy as np

        self.writer.add_image(name, np.asarray(image.convert("RGB")), images, dataformats="HWC")  # type: ignore[no-untyped-call]

    def sync(self) -> None:
        """Hand all events to the operating system, which keeps them when the process is killed."""
        self.writer.flush()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Close the file."""
        self.writer.close()  # type: ignore[no-untyped-call]


class WeightsAndBiases:
    """Run of Weights & Biases, which the variables WANDB_* configure; a resumed training continues it.

    A journal names the steps that were handed over, since W&B itself would show them twice, or drop what follows.
    """

    def __init__(self, folder: Path, images: int, fields: Mapping[str, Any]) -> None:
        import wandb

        make_folder(folder)
        self.journal, name = folder / "logged.txt", folder / "run_id.txt"
        if not name.is_file():  # a training that is begun again is another run
            write_bytes(name, wandb.util.generate_id().encode())
        self.logged = set(self.journal.read_text().splitlines()) if self.journal.is_file() else set[str]()
        try:
            self.run = wandb.init(
                id=name.read_text(),
                resume="allow",
                dir=folder,
                project=os.environ.get("WANDB_PROJECT", "darkroom"),
                name=os.environ.get("WANDB_NAME", f"{fields['dataset']}-{name.read_text()}"),
                config=dict(fields),
            )
        except wandb.Error as error:
            raise UserError(
                f"training.log_to: W&B takes no run ({' '.join(str(error).split())[:300]}): run `wandb login`, set "
                "WANDB_MODE=offline, or leave wandb out"
            ) from error
        self.image = wandb.Image
        self.run.define_metric("*", step_metric="images")

    def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
        """Log finite metrics over the number of images."""
        self._log({f"train/{name}": value for name, value in metrics.items() if math.isfinite(value)}, images)

    def log_image(self, name: str, image: Image.Image, images: int) -> None:
        """Log an image."""
        self._log({name: self.image(image)}, images)

    def _log(self, values: Mapping[str, Any], images: int) -> None:
        new = {name: value for name, value in values.items() if f"{images} {name}" not in self.logged}
        if not new:
            return
        lines = [f"{images} {name}" for name in new]
        with self.journal.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))
        self.logged.update(lines)
        self.run.log(new | {"images": images})

    def sync(self) -> None:
        """Do nothing: a process of W&B's own, which outlives a killed training, has all that was logged."""

    def close(self) -> None:
        """End the run, after all was sent."""
        self.run.finish()


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
