"""How far long work is, for whoever watches a flow: the console it was started from, and the Prefect UI."""

from contextvars import ContextVar
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging import get_run_logger

from diffusion.common.escaping import escape_controls
from diffusion.common.progress import Progress
from flows.tracking.console import Lines, Pace

CONSOLE: ContextVar[Progress | None] = ContextVar("console", default=None)
"""Where the command line shows progress; a flow that a worker runs has no console."""


class RunLog(Lines):
    """Lines in the log of the Prefect run at hand."""

    def write(self, line: str) -> None:
        """Log ``line``, inside a run."""
        if TaskRunContext.get() or FlowRunContext.get():
            get_run_logger().info(escape_controls(line))


def reporter() -> Progress:
    """Progress to the log of the run, and to the console if there is one."""
    log, console = RunLog(), CONSOLE.get()

    def report(what: str, done: int, total: int | None, note: str = "") -> None:
        log(what, done, total, note)
        if console is not None:
            console(what, done, total, note)

    return report


def bar(key: str) -> Progress:
    """``reporter``, and a bar among the artifacts of the flow run at hand, with rate and time left."""
    report, pace = reporter(), Pace()
    artifact = create_progress_artifact(progress=0.0, key=key)
    assert isinstance(artifact, UUID)  # and no promise of one, outside of async code

    def show(what: str, done: int, total: int | None, note: str = "") -> None:
        report(what, done, total, note)
        if total and pace.due(done, total):
            words = ", ".join(filter(None, (f"{done:,} of {total:,} {what}", pace.words(done, total), note)))
            update_progress_artifact(artifact, progress=100 * done / total, description=words)

    return show
