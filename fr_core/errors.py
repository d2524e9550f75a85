"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake in what the user gave: one line that says what, where and the mend.

    The command line prints it without a traceback and exits with code 2.
    """


class StorageError(UserError):
    """Storage at a URL that refuses or does not answer; another try may succeed, where other mistakes stay."""


class RunStopped(Exception):
    """A run that was asked to leave before its end and did, after it saved a checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__(f"left at step {step}; --resume goes on")
        self.step = step
