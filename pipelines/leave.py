"""SIGTERM, as a machine that is taken away sends it: a run saves a checkpoint and leaves."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def on_sigterm(leave: Callable[[], object]) -> Iterator[None]:
    """Calls ``leave`` at the first SIGTERM in the block; the next ones do what they did before.

    Only a process's main thread can listen; in another, the block runs as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def once(*_: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        leave()

    before = signal.signal(signal.SIGTERM, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
