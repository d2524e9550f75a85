"""Learning-rate schedules: functions of the step, nothing to save (but for FastFace, in ``fastface.py``)."""

import math

from fr_core.config.optim import (
    Constant,
    Cosine,
    FastFace,
    FastFaceHaar,
    MultiStep,
    Polynomial,
    Schedule,
    steps_of_epochs,
)


def learning_rate(schedule: Schedule, step: int, total: int, steps_per_epoch: int) -> float:
    """The share of the base rate at which step ``step`` (from 0) of ``total`` trains.

    Warm-up rises linearly to 1, which its last step reaches; the rest of the run follows the schedule.
    """
    warmup = steps_of_epochs(schedule.warmup_epochs, steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    match schedule:
        case Constant() | FastFace() | FastFaceHaar():  # FastFace's factor comes on top
            return 1.0
        case Cosine():
            low = schedule.final_ratio
            return low + (1 - low) * (1 + math.cos(math.pi * done)) / 2
        case Polynomial():
            return (1 - done) ** schedule.power
        case MultiStep():
            passed = sum(step >= steps_of_epochs(m, steps_per_epoch) for m in schedule.milestones)
            return schedule.factor**passed
