"""Many tensors as one flat tensor; and a step that the device itself undoes, without a word to the host.

A card launches its work one operator at a time. So hundreds of small tensors cost hundreds of launches, and a flat
tensor costs one.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Copy dense tensors of one type into one tensor [numbers], each in the order of its memory."""
    return torch.cat([_in_memory_order(tensor) for tensor in tensors])


@torch.no_grad()
def fill(tensors: Sequence[Tensor], numbers: Tensor) -> None:
    """Overwrite tensors with the numbers that :func:`flat` makes of them."""
    parts = numbers.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_([_in_memory_order(tensor) for tensor in tensors], list(parts))


def _in_memory_order(tensor: Tensor) -> Tensor:
    return tensor.detach().as_strided((tensor.numel(),), (1,))


class Undo:
    """Copies of tensors, from which a dropped step is undone."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self.tensors: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            self.tensors[tensor.dtype].append(tensor)
        self.before = {dtype: flat(alike) for dtype, alike in self.tensors.items()}

    def restore(self) -> None:
        """Give the tensors their old values."""
        for dtype, alike in self.tensors.items():
            fill(alike, self.before[dtype])

    def unless(self, good: Tensor) -> None:
        """Give the tensors their old values, unless the step was good: bool scalar on their device."""
        for dtype, alike in self.tensors.items():
            fill(alike, torch.where(good, flat(alike), self.before[dtype]))
