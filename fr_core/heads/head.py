"""The base class of all heads: which tensors the ranks split, and how a dropped step is undone."""

from typing import ClassVar

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """The part of the model that represents the classes in the loss.

    ``sharded`` names all parameters. The ranks split their rows, and the optimiser of the class matrix moves them.
    Everything else is a buffer, which is the same on every rank. A checkpoint saves parameters and buffers.
    """

    sharded: ClassVar[tuple[str, ...]] = ()  # parameters; each rank holds their rows [lo, hi)
    too_large: ClassVar[tuple[str, ...]] = ()  # buffers too large to copy in every step
    lo: int = 0
    hi: int = 0

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[str, Tensor] = {}

    def begin_step(self) -> None:
        """Copy the small buffers, so that :meth:`drop_step` can restore them."""
        self._before = {name: buffer.clone() for name, buffer in self._small_buffers().items()}

    @torch.no_grad()
    def drop_step(self) -> None:
        """Restore the buffers after a step that was not finite.

        A head with ``too_large`` buffers extends this method: it remembers what it overwrites and restores that.
        """
        for name, before in self._before.items():
            self.get_buffer(name).copy_(before)

    def _small_buffers(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self.named_buffers() if name not in self.too_large}
