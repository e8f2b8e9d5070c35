"""Disk-buffered MLflow logger: training survives server outages, and no metric is lost."""

import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from PIL import Image

from diffusion.common.errors import DarkroomError
from diffusion.common.files import make_folder, sync_file, sync_folder, write_bytes
from diffusion.common.image_grids import save_png
from flows.tracking.runs import RunTracker, image_marker, training_metric

AT_ONCE = 500  # metrics per request; MLflow accepts a thousand
PAUSE = 5.0  # seconds between retries while MLflow does not answer
PATIENCE = 120.0  # seconds without progress after which ``close`` gives up
EVERY = 10.0  # seconds between two measurements of system metrics

UNANSWERED = (MlflowException, OSError, BotoCoreError, Boto3Error, ClientError)
"""Exceptions raised while MLflow or its artifact store is unavailable."""

logger = logging.getLogger(__name__)

Record = dict[str, Any]
"""A metric (``name``, ``value``, ``time``, ``step``) or an image (``name``, ``image``, ``file``, ``step``)."""


class BufferedTracker:
    """Implements ``diffusion.training.logging.Tracker``: appends to a file, which a thread delivers in order.

    A resumed training logs the points after its last checkpoint again; each counts once, with its first timestamp.
    Each process delivers the whole file except what MLflow has already, so that another server gets everything.
    """

    def __init__(self, tracker: RunTracker, folder: Path, restart: bool = False) -> None:
        if restart:
            shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder)
        self.tracker, self.folder = tracker, folder
        self.log = folder / "records.jsonl"
        self.records = self._read_records()
        self.delivered = 0
        self._known = {(record["name"], record["step"]) for record in self.records}
        # Never started: its own thread would end when MLflow is unavailable.
        self._monitor = SystemMetricsMonitor(tracker.run_id)  # type: ignore[no-untyped-call]
        self._measured = time.monotonic()
        self._change = threading.Condition()
        self._closing = False
        self._abandoned = threading.Event()
        self._trouble = ""
        self._thread = threading.Thread(target=self._deliver, name="to MLflow", daemon=True)
        self._thread.start()

    def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
        """Record ``metrics`` at step ``images``, and system metrics every ten seconds."""
        now = int(time.time() * 1000)
        figures = {training_metric(name): value for name, value in metrics.items()}
        if time.monotonic() - self._measured >= EVERY:
            self._measured = time.monotonic()
            self._monitor.collect_metrics()  # type: ignore[no-untyped-call]
            system_metrics = self._monitor.aggregate_metrics()  # type: ignore[no-untyped-call]
            figures |= {f"system/{name}": value for name, value in system_metrics.items()}
            for monitor in self._monitor.monitors:
                monitor.clear_metrics()  # type: ignore[no-untyped-call]
        finite = {name: float(value) for name, value in figures.items() if math.isfinite(value)}
        self._add([{"name": name, "value": value, "time": now, "step": images} for name, value in finite.items()])

    def log_image(self, name: str, image: Image.Image, images: int) -> None:
        """Record ``image`` as the image ``name`` at step ``images``."""
        path = self.folder / f"{name}-{images:010d}.png"
        save_png(path, image)
        self._add([{"name": image_marker(name), "image": name, "file": path.name, "step": images}])

    def sync(self) -> None:
        """Flush the records to disk."""
        if self.log.is_file():
            sync_file(self.log)
            sync_folder(self.folder)

    def close(self) -> None:
        """Deliver all records; raises DarkroomError if MLflow accepts none within two minutes."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        while self._thread.is_alive():
            count = self.delivered
            self._thread.join(PATIENCE)
            if self.delivered == count:
                break
        if backlog := len(self.records) - self.delivered:
            raise DarkroomError(
                f"MLflow does not accept the rest of the run's metrics ({backlog} figures in {self.folder}): "
                f"{self._trouble or 'it does not answer'}. Training itself is done; give the same command again when "
                "MLflow is back"
            )

    def abandon(self) -> None:
        """Stop delivery; the remaining records are delivered by the next process."""
        with self._change:
            self._abandoned.set()
            self._closing = True
            self._change.notify_all()
        # A client that retries an unreachable server may take much longer.
        self._thread.join(2 * PAUSE)

    def _add(self, records: list[Record]) -> None:
        with self._change:
            new_records = [record for record in records if (record["name"], record["step"]) not in self._known]
            with self.log.open("a") as file:
                file.write("".join(f"{json.dumps(record)}\n" for record in new_records))
            self._known |= {(record["name"], record["step"]) for record in new_records}
            self.records += new_records
            self._change.notify_all()

    def _deliver(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closing or self.delivered < len(self.records))
                backlog = self.records[self.delivered :]
            if not backlog or self._abandoned.is_set():
                return
            try:
                count = self._send(backlog)
            except UNANSWERED as error:
                if (trouble := " ".join(str(error).split())[:300]) != self._trouble:
                    logger.warning("MLflow is unavailable; metrics are buffered in %s: %s", self.folder, trouble)
                self._trouble = trouble
                time.sleep(PAUSE)
                continue
            if self._trouble:
                logger.warning("MLflow is available again")
                self._trouble = ""
            self.delivered += count

    def _send(self, backlog: list[Record]) -> int:
        record = backlog[0]
        if "image" in record:
            with Image.open(self.folder / record["file"]) as image:
                self.tracker.log_image(record["image"], image, record["step"])
            return 1
        metrics = takewhile(lambda record: "image" not in record, backlog[:AT_ONCE])
        points = [Metric(point["name"], point["value"], point["time"], point["step"]) for point in metrics]
        self.tracker.log_points(points)
        return len(points)

    def _read_records(self) -> list[Record]:
        """Records of earlier processes; an incomplete last line is removed from the file."""
        data = self.log.read_bytes() if self.log.is_file() else b""
        # A power failure may leave zeros at the end.
        lines = data.split(b"\0")[0]
        if (lines := lines[: lines.rfind(b"\n") + 1]) != data:
            write_bytes(self.log, lines)
        return [json.loads(line) for line in lines.splitlines()]
