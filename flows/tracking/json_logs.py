"""Log lines that programs read: one JSON object each, ours and Prefect's alike, with the names of what they are about.

``DARKROOM_LOG=json`` turns them on for a command. Processes that are not ours to start, as Prefect's workers and what
they run, are told by ``VARIABLES`` in their environment.
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
"""With these Prefect writes its log, and what our packages say during a run, in this format."""

RUN_ID: ContextVar[str | None] = ContextVar("run_id", default=None)
"""The MLflow run that work is about from here on."""


class Formatter(JsonFormatter):
    """Time (UTC), level, logger and message; flow run, task run, data set and MLflow run as far as there are any."""

    def __init__(self, *_: object, **__: object) -> None:
        # What Prefect's configuration says of the format is meant for its own class.
        super().__init__(json_ensure_ascii=False)

    def format(self, record: LogRecord) -> str:
        """The line of ``record``, which a terminal can show."""
        return escape_controls(super().format(record))

    def add_fields(self, log_data: dict[str, Any], record: LogRecord, message_dict: dict[str, Any]) -> None:
        """Put the fields into ``log_data``."""
        log_data |= {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        super().add_fields(log_data, record, message_dict)
        # They say how a line is to be shown or sent, nothing about what happened.
        for name in ("send_to_api", "color_message", "taskName"):
            log_data.pop(name, None)
        for name, value in about().items():
            log_data.setdefault(name, value)


def about() -> dict[str, str]:
    """The names of what the code that runs now works on."""
    found = {"run_id": RUN_ID.get()} | _of_prefect()
    return {name: str(value) for name, value in found.items() if value is not None}


def _of_prefect() -> dict[str, Any]:
    # A command that needs no flows does not load Prefect for its log.
    if "prefect.context" not in sys.modules:
        return {}
    from prefect.context import FlowRunContext, TaskRunContext

    flow, task = FlowRunContext.get(), TaskRunContext.get()
    found: dict[str, Any] = {}
    if task is not None:
        found |= {"task_run_id": task.task_run.id, "flow_run_id": task.task_run.flow_run_id}
    if flow is not None and flow.flow_run is not None:
        found |= {"flow_run_id": flow.flow_run.id, "flow_name": flow.flow and flow.flow.name}
    for parameters in (task and task.parameters, flow and flow.parameters):
        if training := getattr((parameters or {}).get("params"), "training", None):
            found |= {"dataset": training.dataset}
    return found
