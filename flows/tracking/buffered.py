"""Disk-buffered MLflow logger: a server that is down never stops a training, and gets all that it missed."""

import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from PIL import Image

from diffusion.common.errors import DarkroomError
from diffusion.common.files import make_folder, sync_file, sync_folder, write_bytes
from diffusion.common.image_grids import save_png
from flows.tracking.runs import RunTracker, image_marker

AT_ONCE = 500
"""Figures that are delivered together: MLflow takes a thousand."""
PAUSE = 5.0
"""Seconds between tries while MLflow does not answer."""
PATIENCE = 120.0
"""Seconds that the end of a training waits for what is not delivered yet."""
EVERY = 10.0
"""Seconds between two measurements of the machine."""

UNANSWERED = (MlflowException, OSError, BotoCoreError, Boto3Error, ClientError)
"""What is raised while MLflow, or the store of its images, does not answer as it should."""

logger = logging.getLogger(__name__)

Record = dict[str, Any]
"""A figure (``name``, ``value``, ``time``, ``step``) or an image (``name``, ``image``, ``file``, ``step``)."""


class BufferedTracker:
    """Implements ``diffusion.training.logging.Tracker``: appends to a file, from which a thread delivers in order.

    A training that was killed logs again what came after its last checkpoint: a figure counts once, with the time of
    its first record. Of the file all is delivered anew by each process, but what MLflow has already: so the file needs
    no mark of how far it was delivered, and another server gets all of it.
    """

    def __init__(self, tracker: RunTracker, folder: Path, anew: bool = False) -> None:
        if anew:
            shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder)
        self.tracker = tracker
        self.folder = folder
        self.records = _read_records(folder / "records.jsonl")
        self.delivered = 0
        self._known = {(record["name"], record["step"]) for record in self.records}
        self._monitors = _monitors()
        self._measured = time.monotonic()
        self._change = threading.Condition()
        self._closing = False
        self._abandoned = threading.Event()
        self._trouble = ""
        self._thread = threading.Thread(target=self._deliver, name="to MLflow", daemon=True)
        self._thread.start()

    def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
        """Keep ``metrics`` at step ``images``, and what the machine does, every ten seconds."""
        now = int(time.time() * 1000)
        figures = [*metrics.items(), *self._system_metrics().items()]
        self._add(
            [
                {"name": name, "value": float(value), "time": now, "step": images}
                for name, value in figures
                if math.isfinite(value)
            ]
        )

    def log_image(self, name: str, image: Image.Image, images: int) -> None:
        """Keep ``image`` as the image ``name`` at step ``images``."""
        path = self.folder / f"{name}-{images:010d}.png"
        save_png(path, image)
        self._add([{"name": image_marker(name), "image": name, "file": path.name, "step": images}])

    def sync(self) -> None:
        """Make what was kept so far durable."""
        if (log := self.folder / "records.jsonl").is_file():
            sync_file(log)
            sync_folder(self.folder)

    def close(self) -> None:
        """Deliver what is left; raises DarkroomError if MLflow does not take it within two minutes."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        while self._thread.is_alive():
            before = self.delivered
            self._thread.join(PATIENCE)
            if self.delivered == before:
                break
        if left := len(self.records) - self.delivered:
            raise DarkroomError(
                f"MLflow does not take what is left of the run's record ({left} figures in {self.folder}): "
                f"{self._trouble or 'it does not answer'}. Training itself is done; give the same command again when "
                "MLflow is back"
            )

    def abandon(self) -> None:
        """Deliver no more; what is left waits for the next time."""
        with self._change:
            self._abandoned.set()
            self._closing = True
            self._change.notify_all()
        # Not for as long as a client tries to reach a server that is away.
        self._thread.join(2 * PAUSE)

    def _add(self, records: list[Record]) -> None:
        with self._change:
            fresh = [record for record in records if (record["name"], record["step"]) not in self._known]
            with (self.folder / "records.jsonl").open("a") as file:
                file.write("".join(f"{json.dumps(record)}\n" for record in fresh))
            self._known |= {(record["name"], record["step"]) for record in fresh}
            self.records += fresh
            self._change.notify_all()

    def _deliver(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closing or self.delivered < len(self.records))
                left = self.records[self.delivered :]
            if not left or self._abandoned.is_set():
                return
            try:
                count = self._send(left)
            except UNANSWERED as error:
                trouble = " ".join(str(error).split())[:300]
                if trouble != self._trouble:
                    logger.warning("MLflow takes no figures; they wait in %s: %s", self.folder, trouble)
                self._trouble = trouble
                time.sleep(PAUSE)
                continue
            if self._trouble:
                logger.warning("MLflow takes figures again")
                self._trouble = ""
            self.delivered += count

    def _send(self, left: list[Record]) -> int:
        """Deliver the first few of ``left``; returns how many."""
        first = left[0]
        if "image" in first:
            with Image.open(self.folder / first["file"]) as image:
                self.tracker.log_image(first["image"], image, first["step"])
            return 1
        figures = []
        for record in left[:AT_ONCE]:
            if "image" in record:
                break
            figures.append(Metric(record["name"], record["value"], record["time"], record["step"]))
        # Another machine that trains the same writes to the same run.
        last = self.tracker.last_steps()
        fresh = [figure for figure in figures if figure.step > last.get(figure.key, -1)]
        if fresh:
            self.tracker.client.log_batch(self.tracker.run_id, metrics=fresh)
        return len(figures)

    def _system_metrics(self) -> dict[str, float]:
        """Processors, memory, disk and GPUs, as MLflow's page of system metrics wants them, unless measured of late."""
        if time.monotonic() - self._measured < EVERY:
            return {}
        self._measured = time.monotonic()
        figures: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()  # type: ignore[no-untyped-call]
            now = monitor.aggregate_metrics()  # type: ignore[no-untyped-call]
            monitor.clear_metrics()  # type: ignore[no-untyped-call]
            figures |= {f"system/{name}": float(value) for name, value in now.items()}
        return figures


def _monitors() -> list[BaseMetricsMonitor]:
    found: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor()]  # type: ignore[no-untyped-call]
    # Without NVIDIA's library and driver there is no GPU to look at.
    with suppress(ImportError, RuntimeError):
        found.append(GPUMonitor())  # type: ignore[no-untyped-call]
    return found


def _read_records(log: Path) -> list[Record]:
    """What a process before this one kept; a last line that a kill cut short is taken out of the file."""
    if not log.is_file():
        return []
    data = log.read_bytes()
    # Nor were the zeros ever logged that a power cut may leave.
    whole = data.split(b"\0")[0]
    whole = whole[: whole.rfind(b"\n") + 1]
    if whole != data:
        write_bytes(log, whole)
    return [json.loads(line) for line in whole.splitlines()]
