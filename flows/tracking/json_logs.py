"""JSON log lines of Darkroom and Prefect, with the IDs of flow run, task run, MLflow run and data set.

``DARKROOM_LOG=json`` enables them for a command; the environment of Prefect workers and their runs needs ``VARIABLES``.
"""

import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from logging import LogRecord
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from diffusion.common.escaping import escape_controls

VARIABLES: Mapping[str, str] = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_FORMATTER": "json",
    "PREFECT_LOGGING_FORMATTERS_JSON_CLASS": "flows.tracking.json_logs.Formatter",
    "PREFECT_LOGGING_COLORS": "false",
}
"""Variables that make Prefect write its log, and Darkroom's during a run, in this format."""

RUN_ID: ContextVar[str | None] = ContextVar("run_id", default=None)


class Formatter(JsonFormatter):
    """Time (UTC), level, logger and message; flow run, task run, data set and MLflow run if there are any."""

    def __init__(self, *_: object, **__: object) -> None:
        # Prefect passes the format of its own formatter class.
        super().__init__(json_ensure_ascii=False)

    def format(self, record: LogRecord) -> str:
        """JSON line of ``record``, with control characters escaped."""
        return escape_controls(super().format(record))

    def add_fields(self, log_data: dict[str, Any], record: LogRecord, message_dict: dict[str, Any]) -> None:
        """Add the fields to ``log_data``."""
        log_data |= {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        super().add_fields(log_data, record, message_dict)
        # Fields about the display and delivery of a line.
        for name in ("send_to_api", "color_message", "taskName"):
            log_data.pop(name, None)
        for name, value in collect_ids().items():
            log_data.setdefault(name, value)


def collect_ids() -> dict[str, str]:
    """IDs of the current runs and data set."""
    fields: dict[str, Any] = {"run_id": RUN_ID.get()}
    # A command without flows does not import Prefect for its log.
    if "prefect.context" in sys.modules:
        from prefect.context import FlowRunContext, TaskRunContext

        flow, task = FlowRunContext.get(), TaskRunContext.get()
        if task is not None:
            fields |= {"task_run_id": task.task_run.id, "flow_run_id": task.task_run.flow_run_id}
        if flow is not None and flow.flow_run is not None:
            fields |= {"flow_run_id": flow.flow_run.id, "flow_name": flow.flow and flow.flow.name}
        for parameters in (task and task.parameters, flow and flow.parameters):
            if training := getattr((parameters or {}).get("params"), "training", None):
                fields |= {"dataset": training.dataset}
    return {name: str(value) for name, value in fields.items() if value is not None}
