"""What a run's ranks are told from outside while they train."""

from enum import IntEnum


class Notice(IntEnum):
    """The graver, the greater."""

    NONE = 0
    SAVE = 1  # now: a machine will be taken away
    STOP = 2  # after a checkpoint
