"""Functions run on real gloo processes."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib.figure import Figure

from fr_core.ranks import Ranks


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(ranks, *args)`` on ``size`` gloo processes; their results, in rank order."""
    if size == 1:
        return [function(Ranks(), *args)]
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (size, function, args, folder), nprocs=size, start_method="forkserver")
        return [torch.load(f"{folder}/result{rank}", weights_only=False) for rank in range(size)]


def undrawn(figure: Figure, file: Path, **_: Any) -> None:
    """Takes the place of ``Figure.savefig``: drawing is half of a short run's time."""
    file.write_bytes(b"undrawn")


def _rank(rank: int, size: int, function: Callable[..., Any], args: tuple[Any, ...], folder: str) -> None:
    torch.set_num_threads(1)
    Figure.savefig = undrawn
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    result = function(Ranks(rank, size), *args)
    torch.save(result, f"{folder}/result{rank}")
    dist.barrier()
    dist.destroy_process_group()
