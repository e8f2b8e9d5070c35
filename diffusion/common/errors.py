"""Errors shown to users: one line that says what is wrong, where, and how to fix it."""


class DarkroomError(Exception):
    """Base class of errors shown without a traceback; the command line exits with ``exit_code``."""

    exit_code = 1


class UserError(DarkroomError):
    """Invalid request or configuration; the message says how to fix it."""

    exit_code = 2


def install_hint(extra: str) -> str:
    """Say how to install an ``extra`` of Darkroom."""
    return f"run `pip install 'darkroom-diffusion[{extra}]'`, or `pip install -e '.[{extra}]'` in a checkout"


class TransientError(DarkroomError):
    """Failure of a server that may soon be gone; Prefect retries a task that ends with it."""


class ConflictError(DarkroomError):
    """Conflict with what another process or a person wrote or decided first; nothing was overwritten."""

    exit_code = 3
