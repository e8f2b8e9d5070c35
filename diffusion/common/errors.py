"""The errors that a person is meant to read: one line that says what, where and how to mend it."""


class DarkroomError(Exception):
    """Base of the errors shown without a traceback; ``exit_code`` is what the command line returns."""

    exit_code = 1


class UserError(DarkroomError):
    """The request cannot be served as it stands; the message says how to mend it."""

    exit_code = 2


class Held(DarkroomError):
    """The work was done but the gate, or somebody who was faster, holds back its result."""

    exit_code = 3
