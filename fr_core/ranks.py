"""The ranks of a run and their collectives, with gradients; plain no-ops for one rank without a process group.

The contract of the gradients: what the ranks' backward passes add up to is the gradient of the global loss. With a
class matrix every rank computes that loss whole, of gathered faces; elsewhere each a share of it. A gather's
gradient is the sum of what all ranks made of the gathered rows. The gradients of replicated weights must then be
*summed* over ranks (see ``fr_core/train/initial.py``); those of sharded weights are whole as they are.
"""

from collections import Counter
from dataclasses import dataclass, field
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
    handed: Counter[str] = field(default_factory=Counter, compare=False, repr=False)  # bytes given to collectives

    @classmethod
    def current(cls) -> "Ranks":
        """The place in torch.distributed's default group, or a run of one where there is none."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def split(self, total: int) -> tuple[int, int]:
        """This rank's rows [lo, hi) of ``total``: total // size each, the first total % size ranks one more."""
        each, more = divmod(total, self.size)
        lo = self.rank * each + min(self.rank, more)
        return lo, lo + each + (self.rank < more)

    def gather(self, rows_BD: Tensor) -> Tensor:
        """Rows of all ranks, [B, …] → [B·size, …]; equal B on all ranks. Backward: reduce-scatter (sum)."""
        return rows_BD if self.size == 1 else _Gather.apply(rows_BD, self)

    def sum_(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place, without gradient."""
        if self.size > 1:
            self.count("all_reduce", x)
            dist.all_reduce(x)
        return x

    def gather_objects(self, value: T) -> list[T]:
        """Picklable values of all ranks, in rank order. For small things only."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: object) -> Any:
        """Rank 0's value, on all ranks."""
        return self.gather_objects(value if self.rank == 0 else None)[0]

    def count(self, collective: str, tensor: Tensor) -> None:
        """Adds what this rank hands to a collective to ``handed``, in bytes."""
        self.handed[collective] += tensor.nbytes


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        ranks.count("all_gather", rows)
        gathered = rows.new_empty((ranks.size * rows.shape[0], *rows.shape[1:]))
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.ranks.count("reduce_scatter", grad)
        own = grad.new_empty((grad.shape[0] // ctx.ranks.size, *grad.shape[1:]))
        dist.reduce_scatter_tensor(own, grad.contiguous())
        return own, None
