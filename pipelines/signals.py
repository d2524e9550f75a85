"""Signals that ask a command to stop: SIGTERM on a machine that is taken away, and Ctrl-C.

At SIGTERM, a run saves a checkpoint before it stops.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

CTRL_C = 130  # exit code
DEAF = 2.5  # seconds


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


@contextmanager
def hearing_ctrl_c() -> Iterator[None]:
    """End the process if the block goes on for ``DEAF`` seconds after Ctrl-C.

    Python raises KeyboardInterrupt only once native code returns, which may take Ray minutes. A thread hears of the
    signal at once. Blocks of other threads than the main one run without it, since Ctrl-C does not reach them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ear, mouth = socket.socketpair()
    mouth.setblocking(False)
    over = threading.Event()

    def listen() -> None:
        while came := ear.recv(1):
            if came[0] == signal.SIGINT and not over.wait(DEAF):
                Console(stderr=True).show_cursor()  # a progress bar hides it
                os._exit(CTRL_C)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        over.set()
        mouth.close()
        thread.join()
        ear.close()
