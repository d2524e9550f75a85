"""What all heads have in common: which tensors the ranks share out, and how a dropped step is taken back."""

from typing import ClassVar

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """What stands for the classes in the loss.

    All its parameters are named in ``sharded``: the ranks share out their rows, and the class matrix's optimiser moves
    them. Everything else is a buffer, the same on every rank. A checkpoint saves all of it.
    """

    sharded: ClassVar[tuple[str, ...]] = ()  # parameters of which each rank has the rows [lo, hi)
    too_large: ClassVar[tuple[str, ...]] = ()  # buffers too large to copy in every step
    lo: int = 0
    hi: int = 0

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[str, Tensor] = {}

    def begin_step(self) -> None:
        """Remembers what :meth:`drop_step` puts back."""
        self._before = {name: buffer.clone() for name, buffer in self._small_buffers().items()}

    @torch.no_grad()
    def drop_step(self) -> None:
        """Undoes what this step has changed in the buffers, since it was not finite.

        A head with buffers that are ``too_large`` remembers what it writes over, and puts that back here.
        """
        for name, before in self._before.items():
            self.get_buffer(name).copy_(before)

    def _small_buffers(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self.named_buffers() if name not in self.too_large}
