"""Signals that ask a command to stop, such as SIGTERM on a machine that is taken away.

A run saves a checkpoint before it stops.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_signal(number: int, leave: Callable[[], object]) -> Iterator[None]:
    """Call ``leave`` at the first such signal in the block; later signals go to the handler of before.

    Python delivers signals to the main thread only. In another thread the block runs without listening.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    came = False

    def once(*_: object) -> None:
        nonlocal came
        signal.signal(number, before)
        if came:  # other code has put this handler back, as Ray Tune does
            signal.raise_signal(number)
        else:
            came = True
            leave()

    before = signal.signal(number, once)
    try:
        yield
    finally:
        signal.signal(number, before)
