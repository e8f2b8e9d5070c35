"""How far long work is, for whoever watches a flow: the console it was started from, and the Prefect UI."""

from contextvars import ContextVar

from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging import get_run_logger

from diffusion.progress import Progress
from flows.console import Lines

CONSOLE: ContextVar[Progress | None] = ContextVar("console", default=None)
"""Where the command line shows progress; a flow that a worker runs has no console."""


class RunLog(Lines):
    """Lines in the log of the Prefect run at hand."""

    def write(self, line: str) -> None:
        """Log ``line``, inside a run."""
        if TaskRunContext.get() or FlowRunContext.get():
            get_run_logger().info(line)


def reporter() -> Progress:
    """Progress to the log of the run, and to the console if there is one."""
    log, console = RunLog(), CONSOLE.get()

    def report(what: str, done: int, total: int | None, note: str = "") -> None:
        log(what, done, total, note)
        if console is not None:
            console(what, done, total, note)

    return report
