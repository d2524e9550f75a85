"""Timing of calls that take turns on one core, and the similarity of two nets' embeddings."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fr_core.device import use_processor

CPU = torch.device("cpu")


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep PyTorch, and ONNX files opened in the block, on one core."""
    threads = torch.get_num_threads()
    use_processor(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_turns(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the milliseconds of every turn of each call, after one warm-up turn that is not timed.

    The calls take turns because a machine's speed drifts. Time is processor time, which other processes disturb little.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.process_time()
            call()
            taken[name].append(1e3 * (time.process_time() - started))
    return taken


def least_cosine(a_BD: Tensor, b_BD: Tensor) -> float:
    """Return the smallest cosine between embeddings of the same row."""
    return float(torch.cosine_similarity(a_BD.double(), b_BD.double()).min())
