"""The command line, ``darkroom COMMAND``. Heavy libraries load only inside the command that uses them."""

import atexit
import gc
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import typer
from typer import Option

from diffusion.common.child_processes import end_with_parent
from diffusion.common.errors import DarkroomError, UserError, install_hint
from diffusion.common.files import is_full_disk
from flows.cli import (
    data_change_commands,
    edit_commands,
    init_commands,
    model_commands,
    operations_commands,
    pipeline_commands,
    retraining_commands,
    server_commands,
    setup_commands,
    signing_commands,
)
from flows.cli.command import MAX_ERROR, VERBOSITY, Quiet, Verbose, print_error, set_verbosity

USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]
"""Base class of errors in options and arguments, for which typer has no public name."""
EXTRAS = dict.fromkeys(("c2pa", "cryptography", "model_signing"), "signing")
"""Extra of libraries that are not of [pipeline]."""
FULL_DISK_ERROR = (
    "a disk is full: free some space and give the same command again, which goes on from there; -v shows where"
)
LOST_CONNECTIONS = {
    "httpx.TransportError",
    "requests.exceptions.ConnectionError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
}
"""What the servers' clients raise when a server is gone, also from within their own errors."""
LOST_CONNECTION_ERROR = (
    "a server does not answer any more ({}): see `darkroom status`, start local servers by `darkroom up`, and give the "
    "same command again, which goes on from there; -v shows where"
)
app = typer.Typer(
    name="darkroom",
    help="Turn a growing folder of images into a diffusion model that is promoted only when it is better.",
    epilog="Start with:  darkroom init IMAGES",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for top in (
    init_commands.app,
    setup_commands.app,
    pipeline_commands.app,
    retraining_commands.app,
    operations_commands.app,
    signing_commands.app,
    server_commands.top,
):
    app.add_typer(top)
for group in (data_change_commands, model_commands, edit_commands, server_commands):
    app.add_typer(group.app, rich_help_panel="Groups of commands")
app.add_typer(setup_commands.config, rich_help_panel="Groups of commands")


def _print_version(flag: bool) -> None:
    if flag:
        from importlib.metadata import entry_points

        # By the command, whatever the distribution is named.
        [command] = {
            entry_point.dist.version
            for entry_point in entry_points(group="console_scripts", name="darkroom")
            if entry_point.dist
        }
        print(f"darkroom {command}")
        raise typer.Exit


@app.callback()
def options(
    quiet: Quiet = False,
    verbose: Verbose = False,
    version: Annotated[bool, Option("--version", callback=_print_version, is_eager=True, help="Show version.")] = False,
) -> None:
    """Set the options of all commands."""
    VERBOSITY.set("normal")
    set_verbosity(quiet, verbose)


def main() -> None:
    """Run the command line; an error becomes one line, or with ``--json`` an object, and its exit code."""
    # Waiting threads should sleep, not spin: spinning threads slow down other work on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # That its cache of fonts cannot be written is not worth a line.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    # Nor that a pipeline's version has no example, or that torch normalises in two steps under autocast.
    warnings.filterwarnings("ignore", "An input example was not provided")
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
    # At its end the interpreter would look for cycles in all that the libraries hold, for two seconds.
    atexit.register(gc.freeze)
    sys.unraisablehook = _repeat_signal
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # A killed torchrun does not stop its processes: they would go on training.
            end_with_parent()
            if sys.argv[1:2] != ["train"] or "--dry-run" in sys.argv:
                raise UserError(
                    f"torchrun started several processes, and `darkroom {' '.join(sys.argv[1:3])}` is done by one: "
                    "leave torchrun out, or use it for `darkroom train` alone"
                )
        try:
            exit_code = app(standalone_mode=False) or 0
            sys.stdout.flush()
            sys.exit(exit_code)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in ("diffusion", "flows"):
                raise
            extra = EXTRAS.get(error.name or "", "pipeline")
            raise UserError(
                f"this command needs {error.name}, which is not installed: {install_hint(extra)}"
            ) from error
    except DarkroomError as error:
        _end_by_signal(error)
        _fail(FULL_DISK_ERROR if error.exit_code == 1 and is_full_disk(error) else str(error), error.exit_code)
    except KeyboardInterrupt:
        # It came where typer does not expect it, which ends a command in this way elsewhere.
        sys.exit(128 + signal.SIGINT)
    except typer.Abort:
        _fail("aborted", 1)
    except USAGE_ERROR as error:
        _fail_usage(error)
    except Exception as error:
        _end_by_signal(error)
        if VERBOSITY.get() == "verbose":
            raise
        if is_full_disk(error):
            _fail(FULL_DISK_ERROR, 1)
        if any(
            f"{kind.__module__}.{kind.__name__}" in LOST_CONNECTIONS
            for cause in _causes(error)
            for kind in type(cause).__mro__
        ):
            _fail(LOST_CONNECTION_ERROR.format(type(error).__name__), 1)
        _fail(f"{type(error).__name__}: {' '.join(str(error).split())[:500]} (-v shows where)", 1)


def _repeat_signal(unraisable: "sys.UnraisableHookArgs") -> None:
    """Send a signal again whose exception came where Python ignores exceptions: in a weak reference's callback, say."""
    error = unraisable.exc_value
    number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else getattr(error, "signal", None)
    if number is None:
        sys.__unraisablehook__(unraisable)
        return
    # Later: it would be ignored in here as well.
    timer = threading.Timer(0.1, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def _end_by_signal(error: BaseException) -> None:
    """End as a signal ends a process, if ``error`` is what became of one: it may strike Prefect's engine anywhere."""
    if "prefect.exceptions" not in sys.modules:
        return
    from prefect.exceptions import TerminationSignal

    for cause in _causes(error):
        if isinstance(cause, TerminationSignal):
            signal.signal(cause.signal, signal.SIG_DFL)
            signal.raise_signal(cause.signal)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error, and what it came of."""
    cause: BaseException | None = error
    seen = list[BaseException]()
    while cause is not None and cause not in seen:
        yield cause
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__


def _fail(message: str, exit_code: int) -> NoReturn:
    print_error(message)
    try:
        if "--json" in sys.argv:
            value = {"error": " ".join(message.split())[:MAX_ERROR], "exit_code": exit_code}
            print(json.dumps(value, ensure_ascii=False))
        sys.stdout.flush()
    except OSError:
        # It is a file on a full disk, or a closed pipe. At its end the interpreter would try again, with a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(exit_code)


def _fail_usage(error: Any) -> NoReturn:
    command = error.ctx.command_path if error.ctx else "darkroom"
    if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help text, which rich printed already
        print(error.message, file=sys.stderr)
        sys.exit(error.exit_code)
    message = error.format_message().removesuffix(".").replace("Value error, ", "")
    _fail(f"{message}: see `{command} --help`", error.exit_code)
