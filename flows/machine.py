"""What the machine is doing while it trains, as MLflow's own page of system metrics wants it."""

import time
from contextlib import suppress

from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

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
