"""Signals that ask a command to leave, as SIGTERM of a machine that is taken away: a run saves a checkpoint first."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_signal(number: int, leave: Callable[[], object]) -> Iterator[None]:
    """Calls ``leave`` at the first such signal in the block; the next ones do what they did before.

    Only a process's main thread can listen; in another, the block runs as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    came = False

    def once(*_: object) -> None:
        nonlocal came
        signal.signal(number, before)
        if came:  # somebody put this back, as Ray Tune does
            signal.raise_signal(number)
        else:
            came = True
            leave()

    before = signal.signal(number, once)
    try:
        yield
    finally:
        signal.signal(number, before)
