"""Runs formulations in child processes that take turns; a figure is the median of its turns.

Each formulation has its own process because peak memory is a high-water mark.
"""

import multiprocessing as mp
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch

from fr_core.device import peak_memory

CPU = torch.device("cpu")
Turn = Callable[[str], tuple[float, float]]  # asks a child process a question


@contextmanager
def child(serve: Callable[..., None], *problem: object) -> Iterator[Turn]:
    """Start a process that answers "step" with (seconds, loss) and "peak" with (peak, base) bytes.

    Args:
        serve: function that the process runs: it takes the questions' connection and ``problem``.
    """
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, *problem), daemon=True)
    process.start()
    theirs.close()

    def turn(question: str) -> tuple[float, float]:
        ours.send(question)
        return ours.recv()

    try:
        yield turn
    finally:
        ours.close()
        process.join(30)
        process.kill()


def answer(questions: Connection, step: Callable[[], float], base: int) -> None:
    """Answer questions by taking steps, until the other side closes the connection."""
    while True:
        try:
            question = questions.recv()
        except EOFError:
            return
        if question == "step":
            started = time.perf_counter()
            loss = step()
            questions.send((time.perf_counter() - started, loss))
        else:
            questions.send((peak_memory(CPU), base))


def ratio(seconds: list[float], reference: list[float]) -> float:
    """Return the median over the turns of seconds ÷ reference, since a machine's speed drifts between turns."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))
