"""The command line, which waits at a point of its way: ``python -m tests.chaos.paused POINT FOLDER -- ARGUMENTS``.

POINT is ``module:function`` or ``module:Class.method``, and ``@N`` behind it if it is not the first call that waits.
There the process makes the file ``here`` in FOLDER, and goes on when somebody makes ``go``. So a drill strikes where it
means to on a machine of any speed, and what it strikes is the real command line.
"""

import itertools
import select
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any


def arm(point: str, folder: Path) -> None:
    """From now on, the call that ``point`` names waits."""
    place, _, call = point.partition("@")
    module, _, path = place.partition(":")
    owner: Any = import_module(module)
    *outer, name = path.split(".")
    for each in outer:
        owner = getattr(owner, each)
    original: Callable[..., Any] = getattr(owner, name)
    calls = itertools.count(1)

    @wraps(original)
    def waiting(*arguments: Any, **named: Any) -> Any:
        if next(calls) == int(call or 1):
            (folder / "here").touch()
            while not (folder / "go").exists():
                # Where the clock is wrong, a sleep is none.
                select.select([], [], [], 0.05)
        return original(*arguments, **named)

    setattr(owner, name, waiting)


def main() -> None:
    """Run the command line with its arguments behind ``--``."""
    point, folder, separator, *arguments = sys.argv[1:]
    assert separator == "--"
    from flows.environment import Server
    from flows.local_stack import stack

    join = stack.join_servers

    def join_and_arm(*servers: Server) -> None:
        join(*servers)
        # Not before: libraries read the environment that it makes when they are imported.
        arm(point, Path(folder))

    stack.join_servers = join_and_arm
    sys.argv = ["darkroom", *arguments]
    from flows.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
