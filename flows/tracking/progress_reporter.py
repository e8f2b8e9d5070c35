"""Progress of a flow, on the console and in the Prefect UI."""

from contextvars import ContextVar
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging import get_run_logger

from diffusion.common.escaping import escape_controls
from diffusion.common.progress import Progress
from flows.tracking.console import Lines, Pace

CONSOLE: ContextVar[Progress | None] = ContextVar("console", default=None)
"""Console of the command line; flows on a worker have none."""


class RunLog(Lines):
    """Lines in the log of the current Prefect run."""

    def write(self, line: str) -> None:
        """Log ``line`` if there is a Prefect run."""
        if TaskRunContext.get() or FlowRunContext.get():
            get_run_logger().info(escape_controls(line))


def reporter() -> Progress:
    """Progress callback that writes to the log of the run, and to the console if there is one."""
    log, console = RunLog(), CONSOLE.get()

    def report(what: str, done: int, total: int | None, note: str = "") -> None:
        log(what, done, total, note)
        if console is not None:
            console(what, done, total, note)

    return report


def bar(key: str) -> Progress:
    """Like ``reporter``, with a progress artifact on the current flow run that has rate and remaining time."""
    report, pace = reporter(), Pace()
    artifact = create_progress_artifact(progress=0.0, key=key)
    assert isinstance(artifact, UUID)  # a coroutine only in async code

    def show(what: str, done: int, total: int | None, note: str = "") -> None:
        report(what, done, total, note)
        if total and pace.due(done, total):
            words = ", ".join(filter(None, (f"{done:,} of {total:,} {what}", pace.words(done, total), note)))
            update_progress_artifact(artifact, progress=100 * done / total, description=words)

    return show
