"""The base class of all heads: which tensors the ranks split, and how a dropped step is undone."""

from typing import ClassVar

from torch import Tensor, nn

from fr_core.undo import Undo


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
        self._undo = Undo()

    def begin_step(self) -> None:
        """Copy the small buffers, so that :meth:`end_step` can restore them."""
        self._undo = Undo(buffer for name, buffer in self.named_buffers() if name not in self.too_large)

    def end_step(self, good: Tensor) -> None:
        """Restore the buffers, unless the step was good: bool scalar on the device, which the host does not read.

        A head with ``too_large`` buffers extends this method: it remembers what it overwrites and restores that.
        """
        self._undo.unless(good)
