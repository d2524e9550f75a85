"""The ranks of a run and their collectives, with gradients.

One rank without a process group is a run of one: its collectives do nothing.

The contract of the gradients: the backward passes of all ranks add up to the gradient of the global loss. With a
class matrix, every rank computes the whole loss from gathered faces. Without one, each rank computes a share of the
loss. The gradient of a gather is the sum of all ranks' gradients of the gathered rows. Gradients of replicated weights
must then be *summed* over ranks (see ``fr_core/train/initial.py``). Gradients of sharded weights are complete already.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place among the processes of a run; ``Ranks()`` is a run of one."""

    rank: int = 0
    size: int = 1
    handed: Counter[str] = field(default_factory=Counter, compare=False, repr=False)  # collective -> bytes given
    group: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)  # None: the default group

    @classmethod
    def current(cls) -> "Ranks":
        """Return the place in torch.distributed's default group, or a run of one if there is no group."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def beside(self) -> "Ranks":
        """Return the same ranks with a group of their own, for another thread of each process. All ranks must call it.

        Its collectives are those of main memory.
        """
        return replace(self, group=dist.new_group(backend="gloo")) if self.size > 1 else self

    def split(self, total: int) -> tuple[int, int]:
        """Return this rank's rows [lo, hi) of ``total``.

        Every rank gets total // size rows; the first total % size ranks get one more.
        """
        each, more = divmod(total, self.size)
        lo = self.rank * each + min(self.rank, more)
        return lo, lo + each + (self.rank < more)

    def gather(self, rows_BD: Tensor) -> Tensor:
        """Gather the rows of all ranks: [B, …] → [B·size, …], with equal B on all ranks.

        The backward pass is a reduce-scatter (sum).
        """
        return rows_BD if self.size == 1 else _Gather.apply(rows_BD, self)

    def sum_(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place, without gradient."""
        if self.size > 1:
            self.count("all_reduce", x)
            dist.all_reduce(x, group=self.group)
        return x

    def gather_objects(self, value: T) -> list[T]:
        """Gather picklable values of all ranks, in rank order. Meant for small values only."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast_object(self, value: object) -> Any:
        """Return rank 0's value on all ranks."""
        return self.gather_objects(value if self.rank == 0 else None)[0]

    def count(self, collective: str, tensor: Tensor) -> None:
        """Add the bytes that this rank gives to a collective to ``handed``."""
        self.handed[collective] += tensor.nbytes


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        ranks.count("all_gather", rows)
        gathered = rows.new_empty((ranks.size * rows.shape[0], *rows.shape[1:]))
        dist.all_gather_into_tensor(gathered, rows.contiguous(), group=ranks.group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.ranks.count("reduce_scatter", grad)
        own = grad.new_empty((grad.shape[0] // ctx.ranks.size, *grad.shape[1:]))
        dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.ranks.group)
        return own, None
