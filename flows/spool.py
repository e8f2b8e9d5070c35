"""What a training says of itself, kept on disk until MLflow has it: a server that is down never stops a training."""

import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
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

from diffusion.errors import DarkroomError
from diffusion.files import is_full_disk, make_folder, sync_file, sync_folder, write_bytes, write_json
from diffusion.grids import save_png
from flows.tracking import RunTracker, picture_marker

AT_ONCE = 500
"""Figures that are delivered together: MLflow takes a thousand."""
PAUSE = 5.0
"""Seconds between tries while MLflow does not answer."""
PATIENCE = 120.0
"""Seconds that the end of a training waits for what is not delivered yet."""

UNANSWERED = (MlflowException, OSError, BotoCoreError, Boto3Error, ClientError)
"""What is raised while MLflow, or the store of its pictures, does not answer as it should."""

logger = logging.getLogger(__name__)


@dataclass
class Spool:
    """Records in the order in which they came, in a folder of their own, and how many of them MLflow has.

    A training that was killed repeats what came after its last checkpoint. What it says again is on record with the
    time of the first, so that MLflow, which keeps equal points once, has each once, whenever the kill came.
    """

    folder: Path
    run_id: str
    """The run on MLflow that the records are of."""
    records: list[dict[str, Any]] = field(default_factory=list)
    delivered: int = 0

    @classmethod
    def open(cls, folder: Path, run_id: str, anew: bool) -> "Spool":
        """Go on with what lies in ``folder``, or ``anew``, with nothing; to another ``run_id`` nothing is delivered."""
        if anew:
            shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder)
        spool = cls(folder, run_id)
        if spool._log.is_file():
            data = spool._log.read_bytes()
            # A last line that a kill cut short was never said, nor were the zeros that a power cut may leave.
            said = data.split(b"\0")[0]
            whole = said[: said.rfind(b"\n") + 1]
            if whole != data:
                write_bytes(spool._log, whole)
            spool.records = [json.loads(line) for line in whole.splitlines()]
        if spool._mark.is_file():
            mark = json.loads(spool._mark.read_text())
            spool.delivered = min(mark["delivered"], len(spool.records)) if mark["run_id"] == run_id else 0
        spool.advance(0)
        return spool

    def add(self, records: list[dict[str, Any]]) -> None:
        """Take in what is not on record yet, by name and step."""
        known = {(record["name"], record["step"]) for record in self.records}
        fresh = [record for record in records if (record["name"], record["step"]) not in known]
        with self._log.open("a") as file:
            file.write("".join(f"{json.dumps(record)}\n" for record in fresh))
        self.records += fresh

    def sync(self) -> None:
        """Make all records so far durable."""
        if self._log.is_file():
            sync_file(self._log)
            sync_folder(self.folder)

    def advance(self, count: int) -> None:
        """So many more are delivered."""
        self.delivered += count
        write_json(self._mark, {"run_id": self.run_id, "delivered": self.delivered})

    @property
    def _log(self) -> Path:
        return self.folder / "records.jsonl"

    @property
    def _mark(self) -> Path:
        return self.folder / "delivered.json"


class SpooledTracker:
    """Implements ``diffusion.training.tracker.Tracker``: writes into a spool, from which a thread delivers in order."""

    def __init__(self, tracker: RunTracker, folder: Path, anew: bool = False) -> None:
        self.tracker = tracker
        self.spool = Spool.open(folder, tracker.run_id, anew)
        self._machine = Machine()
        self._change = threading.Condition()
        self._closing = False
        self._abandoned = threading.Event()
        self._trouble = ""
        self._thread = threading.Thread(target=self._deliver, name="to MLflow", daemon=True)
        self._thread.start()

    def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
        """Keep ``metrics`` at step ``images``."""
        now = int(time.time() * 1000)
        finite = {
            name: float(value)
            for name, value in (*metrics.items(), *self._machine.figures().items())
            if math.isfinite(value)
        }
        self._add([{"name": name, "value": value, "time": now, "step": images} for name, value in finite.items()])

    def log_picture(self, name: str, picture: Image.Image, images: int) -> None:
        """Keep ``picture`` as the image ``name`` at step ``images``."""
        path = self.spool.folder / f"{name}-{images:010d}.png"
        save_png(path, picture)
        self._add([{"name": picture_marker(name), "picture": name, "file": path.name, "step": images}])

    def sync(self) -> None:
        """Make what was kept so far durable."""
        with self._change:
            self.spool.sync()

    def close(self) -> None:
        """Deliver what is left; raises DarkroomError if MLflow does not take it within two minutes."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        while self._thread.is_alive():
            before = self.spool.delivered
            self._thread.join(PATIENCE)
            if self.spool.delivered == before:
                break
        left = len(self.spool.records) - self.spool.delivered
        if left:
            raise DarkroomError(
                f"MLflow does not take what is left of the run's record ({left} figures in {self.spool.folder}): "
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

    def _add(self, records: list[dict[str, Any]]) -> None:
        with self._change:
            self.spool.add(records)
            self._change.notify_all()

    def _deliver(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closing or self.spool.delivered < len(self.spool.records))
                left = self.spool.records[self.spool.delivered :]
            if not left or self._abandoned.is_set():
                return
            try:
                count = self._send(left)
            except UNANSWERED as error:
                trouble = " ".join(str(error).split())[:300]
                if trouble != self._trouble:
                    logger.warning("MLflow takes no figures; they wait in %s: %s", self.spool.folder, trouble)
                self._trouble = trouble
                time.sleep(PAUSE)
                continue
            if self._trouble:
                logger.warning("MLflow takes figures again")
                self._trouble = ""
            with self._change:
                # Else it would move a mark that belongs to the next try by now: what was sent is sent again, and equal.
                if self._abandoned.is_set():
                    return
                try:
                    self.spool.advance(count)
                except OSError as error:
                    if not is_full_disk(error):
                        raise
                    # The mark only saves sending again what MLflow has; training itself ends with the line.
                    logger.warning("how far MLflow has the metrics cannot be written: %s", error)

    def _send(self, left: list[dict[str, Any]]) -> int:
        """Deliver the first few of ``left``; returns how many."""
        first = left[0]
        if "picture" in first:
            with Image.open(self.spool.folder / first["file"]) as picture:
                self.tracker.log_picture(first["picture"], picture, first["step"])
            return 1
        figures = []
        for record in left[:AT_ONCE]:
            if "picture" in record:
                break
            figures.append(Metric(record["name"], record["value"], record["time"], record["step"]))
        # Another machine that trains the same writes to the same run.
        last = self.tracker.last_steps()
        fresh = [figure for figure in figures if figure.step > last.get(figure.key, -1)]
        if fresh:
            self.tracker.client.log_batch(self.tracker.run_id, metrics=fresh)
        return len(figures)


EVERY = 10.0
"""Seconds between two looks."""


class Machine:
    """Processors, memory, disk and, where there are any, GPUs."""

    def __init__(self) -> None:
        self.monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor()]  # type: ignore[no-untyped-call]
        # Without NVIDIA's library and driver there is no GPU to look at.
        with suppress(ImportError, RuntimeError):
            self.monitors.append(GPUMonitor())  # type: ignore[no-untyped-call]
        self.looked = time.monotonic()

    def figures(self) -> dict[str, float]:
        """How it is, unless that was asked for a moment ago."""
        if time.monotonic() - self.looked < EVERY:
            return {}
        self.looked = time.monotonic()
        figures: dict[str, float] = {}
        for monitor in self.monitors:
            monitor.collect_metrics()  # type: ignore[no-untyped-call]
            now = monitor.aggregate_metrics()  # type: ignore[no-untyped-call]
            monitor.clear_metrics()  # type: ignore[no-untyped-call]
            figures |= {f"system/{name}": float(value) for name, value in now.items()}
        return figures
