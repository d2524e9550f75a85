"""Brings the events of a run's workers to the log of the command that started the run.

Rank 0 and Ray Train's controller write them to files in the run's folder, which all nodes see. The command reads them.
"""

import json
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fr_core.data.store import AnyPath, find_paths, write_text_atomically
from fr_core.errors import StorageError, UserError
from fr_core.train.outbox import first_line
from pipelines.logs import as_json, log, start_logging

if TYPE_CHECKING:
    from ray.train import UserCallback

EVENTS = "events"  # folder in the run's folder
FAILED, RESUMED = "worker failed", "resumed"
LOOK_EVERY = 2.0  # seconds between looks for new events; at a URL five times as many

Event = dict[str, Any]  # created, level, event, facts


class EventFile(logging.Handler):
    """Writes events to a file in the run's folder, a line each. What cannot be written does not end the run.

    Args:
        name: name of the file, which this process alone writes.
        where: facts of every event, such as rank and node.
    """

    def __init__(self, out: AnyPath, name: str, where: Mapping[str, object]) -> None:
        super().__init__()
        self.path, self.where = out / EVENTS / f"{name}.jsonl", where
        self.written: str | None = None  # what the file holds; None until the first event

    def emit(self, record: logging.LogRecord) -> None:
        """Write an event."""
        self.write(record.created, record.levelno, record.getMessage(), getattr(record, "facts", {}))

    def write(self, created: float, level: int, event: str, facts: Mapping[str, object]) -> None:
        """Write an event that happened at a time in seconds since 1970."""
        content = {"created": created, "level": level, "event": event, "facts": as_json({**self.where, **facts})}
        with suppress(OSError, StorageError):
            self._append(json.dumps(content) + "\n")

    def _append(self, line: str) -> None:
        if self.written is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.written = self.path.read_text() if self.path.is_file() else ""
            line = f"\n{line}" if self.written and self.written[-1] != "\n" else line  # after half a line
        self.written += line
        if isinstance(self.path, Path):
            with self.path.open("a") as file:
                file.write(line)
        else:  # a file at a URL is written anew
            write_text_atomically(self.path, self.written)


class Followed:
    """The events in a run's folder. It logs those that are new, and how long a run stood still after a failure."""

    def __init__(self, out: AnyPath) -> None:
        self.out = out
        self.known: dict[str, int] = {}  # lines of each file
        self.failed: float | None = None  # when the first worker failed since the run last went on
        self._take()  # events of an earlier start are no news

    def log_new(self) -> None:
        """Log the events that have come since the last call, in the order of their times."""
        for event in sorted(self._take(), key=lambda event: event["created"]):
            facts, created = event["facts"], event["created"]
            if event["event"] == FAILED:
                self.failed = self.failed or created
            elif event["event"] == RESUMED and self.failed:
                facts["seconds_since_failure"], self.failed = created - self.failed, None
            record = log.makeRecord(log.name, event["level"], "", 0, event["event"], (), None, extra={"facts": facts})
            record.created = created
            log.handle(record)

    def _take(self) -> list[Event]:
        events: list[Event] = []
        with suppress(OSError, StorageError):  # if storage stays away, the run itself fails
            for path in find_paths(self.out / EVENTS, "*.jsonl"):
                lines = _lines(path)
                for line in lines[self.known.get(path.name, 0) :]:
                    with suppress(ValueError):  # half a line of a killed worker
                        events.append(json.loads(line))
                self.known[path.name] = len(lines)
        return events


@contextmanager
def workers_events(out: AnyPath) -> Iterator[None]:
    """Log what the workers of a run write during the block."""
    followed = Followed(out)

    def follow(done: threading.Event) -> None:
        while not done.wait(LOOK_EVERY if isinstance(out, Path) else 5 * LOOK_EVERY):
            followed.log_new()

    try:
        with beside(follow):
            yield
    finally:
        followed.log_new()


@contextmanager
def beside(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Let a thread work during the block; the event that it gets is set at the end of the block."""
    done = threading.Event()
    thread = threading.Thread(target=work, args=(done,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def workers_failed(out: AnyPath) -> "UserCallback":
    """Return a callback of Ray Train that writes an event for each worker that failed, with the reason."""
    from ray.train import UserCallback

    class WorkersFailed(UserCallback):
        """Writes ranks and reasons. A mistake of the user is left out: the command tells it at its end."""

        def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
            """Write the events; Ray Train calls this in its controller."""
            file = EventFile(out, "ray", {})
            for rank, error in worker_exceptions.items():
                if not isinstance(getattr(error, "cause", error), UserError):
                    file.write(time.time(), logging.WARNING, FAILED, {"rank": rank, "reason": first_line(error)})

    return WorkersFailed()


def log_as_worker(out: AnyPath, rank: int, workers: int) -> None:
    """Log the events of this worker from now on; those of rank 0 reach the command too.

    Every rank tells the command that it started, with its node and the name of its log there.
    """
    start_logging("json", run=out.name, rank=rank)
    file = EventFile(out, f"rank{rank}", {"rank": rank, "node": platform.node()})
    log.addHandler(file)
    log.info("worker started", extra={"facts": {"workers": workers, "log": name_log(out.name, rank)}})
    if rank > 0:
        log.removeHandler(file)


def name_log(run: str, rank: int) -> str | None:
    """Give this worker's file of standard error a second name in Ray's log folder, of run and rank, and return it.

    None: this system does not tell which file it is.
    """
    file = Path("/proc/self/fd/2").resolve()
    if file.suffix != ".err":
        return None
    link = file.with_name(f"bigface-{run}-rank{rank}.err")
    part = file.with_name(f".{link.name}.{os.getpid()}")
    part.symlink_to(file.name)
    part.replace(link)
    return link.name


def _lines(path: AnyPath) -> list[str]:
    """Return the whole lines of a file, without one that is still being written."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return lines if not lines or lines[-1].endswith("\n") else lines[:-1]
