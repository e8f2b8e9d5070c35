"""The command line, ``darkroom COMMAND``. Heavy libraries load only inside the command that uses them."""

import atexit
import gc
import os
import sys

import typer

from diffusion.common.child_processes import end_with_parent
from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.escaping import escape_controls
from diffusion.common.files import is_full_disk
from flows.cli import (
    data_commands,
    edit_commands,
    model_commands,
    operations_commands,
    pipeline_commands,
    server_commands,
)

app = typer.Typer(
    name="darkroom",
    help="Turn a growing folder of images into a diffusion model that is promoted only when it is better.",
    epilog="Start with:  darkroom up  &&  darkroom retrain IMAGES --dataset NAME",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for top in (pipeline_commands.app, operations_commands.app, server_commands.top):
    app.add_typer(top)
for group in (data_commands, model_commands, edit_commands, server_commands):
    app.add_typer(group.app, rich_help_panel="Groups of commands")


def main() -> None:
    """Run the command line; a DarkroomError becomes one line and its exit code."""
    # Waiting threads should sleep, not spin: spinning threads slow down other work on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # At its end the interpreter would look for cycles in all that the libraries hold, for two seconds.
    atexit.register(gc.freeze)
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
            app()
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in ("diffusion", "flows"):
                raise
            raise UserError(
                f"this command needs {error.name}, which is not installed: install Darkroom with its extra [pipeline], "
                "`pip install -e '.[pipeline]'` in its checkout"
            ) from error
    except DarkroomError as error:
        print(escape_controls(f"darkroom: {' '.join(str(error).split())}"), file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if os.environ.get("DARKROOM_DEBUG"):
            raise
        hint = "DARKROOM_DEBUG=1 in the environment shows where"
        if is_full_disk(error):
            hint = "a disk is full: free some space and give the same command again, which goes on from there"
        words = escape_controls(" ".join(str(error).split())[:500])
        print(f"darkroom: {type(error).__name__}: {words} ({hint})", file=sys.stderr)
        sys.exit(1)
