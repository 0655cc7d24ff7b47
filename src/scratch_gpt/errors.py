"""The two ways a verb ends early without being at fault."""


class UserError(ValueError):
    """A mistake the user can mend: the message says what is wrong, where, and the mend. Exit code 2, no traceback."""


class StoppedOnRequest(Exception):
    """Training was asked to stop (Ctrl-C, SIGTERM) and has saved. Exit code 75: the same command goes on."""
