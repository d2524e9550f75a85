"""Requests from outside that reach the ranks of a run while they train."""

from enum import IntEnum


class Notice(IntEnum):
    """A request to a run. A larger value is a stronger request, and includes the smaller ones."""

    NONE = 0
    SAVE = 1  # save a checkpoint now: a machine will be taken away
    STOP = 2  # save a checkpoint, then leave
