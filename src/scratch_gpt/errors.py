"""The two ways a command ends early without a bug."""


class UserError(ValueError):
    """A mistake the user can fix: the message says what is wrong, where, and how to fix it. Exit code 2, no traceback."""


class StoppedOnRequest(Exception):
    """Training was asked to stop (Ctrl-C, SIGTERM) and has saved. Exit code 75: the same command resumes."""
