"""The numbers of a step, on their way from the device that computed them to the host.

A card works behind the host. If the host waited for the numbers of each step, the card would idle until the host has
queued the next one. So the host reads them late, and no decision about the step itself is left to it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fr_core.device import reached
from fr_core.train.notice import Notice, strongest

ASKED = "asked"  # name of the sum of all ranks' notices


class Reading:
    """The loss of a step with its terms, its gradient norms, and the notices of all ranks.

    Args:
        step: optimiser steps before this one.
        names: names of the numbers.
        numbers: float [names], equal on all ranks.
    """

    def __init__(self, step: int, names: Sequence[str], numbers: Tensor) -> None:
        self.step, self.names = step, names
        self.numbers = numbers.to("cpu", non_blocking=True)
        self.arrived = reached(numbers.device)

    def read(self) -> dict[str, float]:
        """Wait until the device has done the step, and return the numbers by name."""
        if self.arrived:
            self.arrived.synchronize()
        return dict(zip(self.names, self.numbers.tolist(), strict=True))

    @property
    def metrics(self) -> dict[str, float]:
        """Return what a run reports of the numbers."""
        return {name: number for name, number in self.read().items() if name != ASKED}

    @property
    def good(self) -> bool:
        """Return whether the device moved the weights: whether all numbers are finite."""
        return all(map(math.isfinite, self.read().values()))

    @property
    def request(self) -> Notice:
        """Return the strongest notice to any rank."""
        return strongest(self.read()[ASKED])


def known_reading(step: int, numbers: dict[str, float]) -> Reading:
    """Return a reading whose numbers the host knows, such as that of a checkpoint."""
    return Reading(step, list(numbers), torch.tensor(list(numbers.values())))
