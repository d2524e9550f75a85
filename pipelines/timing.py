"""Calls that take turns on one core, timed; and how alike two nets' embeddings are."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fr_core.device import use_processor

CPU = torch.device("cpu")


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch, and the ONNX files that are opened in the block, on one core."""
    threads = torch.get_num_threads()
    use_processor(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_turns(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of calls that take turns, since a machine's speed drifts, after one turn each that is not timed.

    It is the processor's time, which on an idle core is the time that passes: what else runs counts little.
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
    """Of embeddings in pairs."""
    return float(torch.cosine_similarity(a_BD.double(), b_BD.double()).min())
