"""Exceptions that the command line reports in one line."""


class UserError(Exception):
    """A mistake of the user. The message is one line: what is wrong, where, and the mend.

    The command line prints the message without a traceback and exits with code 2.
    """


class StorageError(UserError):
    """Storage at a URL, or a database, refuses or does not answer. Unlike other mistakes, another try may succeed."""


class RunStopped(Exception):
    """A run stopped early on request, after it saved a checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step}: --resume continues the run")
        self.step = step
