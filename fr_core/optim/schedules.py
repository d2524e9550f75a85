"""Learning-rate schedules that are functions of the step, so have no state. FastFace is in ``fastface.py``."""

import math

from fr_core.config.optim import (
    Constant,
    Cosine,
    FastFace,
    FastFaceHaar,
    FastFaceRecurrence,
    MultiStep,
    Polynomial,
    Schedule,
    steps_of_epochs,
)


def learning_rate(schedule: Schedule, step: int, total: int, steps_per_epoch: int) -> float:
    """Return the factor of the base rate for step ``step`` (from 0) of ``total``.

    During warm-up, the factor rises linearly and reaches 1 at the last warm-up step. Then it follows the schedule.
    """
    warmup = steps_of_epochs(schedule.warmup_epochs, steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    match schedule:
        case Constant() | FastFaceRecurrence() | FastFaceHaar():  # the loop multiplies by FastFace's own factor
            return 1.0
        case FastFace():
            return min(1.0, (1 - done) / schedule.tail) if schedule.tail else 1.0
        case Cosine():
            low = schedule.final_ratio
            return low + (1 - low) * (1 + math.cos(math.pi * done)) / 2
        case Polynomial():
            return (1 - done) ** schedule.power
        case MultiStep():
            passed = sum(step >= steps_of_epochs(m, steps_per_epoch) for m in schedule.milestones)
            return schedule.factor**passed
