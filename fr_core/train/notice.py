"""Requests from outside that reach the ranks of a run while they train."""

from enum import IntEnum


class Notice(IntEnum):
    """A request to a run. A larger value is a stronger request, and includes the smaller ones."""

    NONE = 0
    SAVE = 1  # save a checkpoint now: a machine will be taken away
    STOP = 2  # save a checkpoint, then leave


# Each rank adds the weight of its notice to a sum over ranks. A million weights of SAVE are less than one of STOP.
WEIGHTS = {Notice.NONE: 0.0, Notice.SAVE: 1.0, Notice.STOP: 2.0**20}


def strongest(total: float) -> Notice:
    """Return the strongest notice to any rank, from the sum of the weights of all ranks."""
    return max(notice for notice, weight in WEIGHTS.items() if weight <= total)
