"""Brings the events of a run's workers to the log of the command that started the run.

Rank 0 and Ray Train's controller write them to files in the run's folder, which all nodes see. The command reads them.
"""

import json
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping
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
        self.lines = [] if isinstance(self.path, Path) else _lines(self.path)  # a file at a URL is written anew

    def emit(self, record: logging.LogRecord) -> None:
        """Write an event."""
        self.write(record.created, record.levelno, record.getMessage(), getattr(record, "facts", {}))

    def write(self, created: float, level: int, event: str, facts: Mapping[str, object]) -> None:
        """Write an event that happened at a time in seconds since 1970."""
        content = {"created": created, "level": level, "event": event, "facts": as_json({**self.where, **facts})}
        line = json.dumps(content) + "\n"
        with suppress(OSError, StorageError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(self.path, Path):
                with self.path.open("a") as file:
                    file.write(line)
            else:
                self.lines.append(line)
                write_text_atomically(self.path, "".join(self.lines))


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
                events += [json.loads(line) for line in lines[self.known.get(path.name, 0) :]]
                self.known[path.name] = len(lines)
        return events


@contextmanager
def workers_events(out: AnyPath) -> Iterator[None]:
    """Log what the workers of a run write during the block."""
    followed, done = Followed(out), threading.Event()

    def follow() -> None:
        while not done.wait(LOOK_EVERY if isinstance(out, Path) else 5 * LOOK_EVERY):
            followed.log_new()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        followed.log_new()


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
    """Return the whole lines of a file."""
    return path.read_text().splitlines(keepends=True) if path.is_file() else []
