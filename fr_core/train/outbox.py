"""The queue of a run's figures and files for MLflow. A thread delivers them in order, also if the server is away.

Training never waits for MLflow: posting returns at once, and only this module waits. MLflow's client would retry for
minutes; here every try is short. What is not delivered is tried again during the run and at its end. After that it
stays in ``undelivered.jsonl``, and a resumed run delivers it.
"""

import json
import logging
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fr_core.config.sections import Tracking
from fr_core.data.store import AnyPath, explain_disk_errors, local_copy, write_text_atomically
from fr_core.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

UNDELIVERED = "undelivered.jsonl"
RETRY_AFTER = 5.0  # seconds
HEALTHY_WAIT, LAST_WAIT = 2.0, 15.0  # seconds to wait for deliveries at a checkpoint, and at the end of a run
CALL_METRICS = 1000  # MLflow's limit per call

Letter = list[Any]  # ["metrics", [name, value, time, step] …], ["params", {}], ["file", path, folder], ["status", name]

log = logging.getLogger("bigface")


class Outbox:
    """Delivers the figures and files of one run to MLflow.

    Args:
        open_run: makes or opens the MLflow run, and returns a client and the run's id. The thread calls it until it
            succeeds.
        out: the run's folder; paths of files are relative to it.

    Raises:
        UserError: MLflow refuses, so that no later try can succeed.
    """

    def __init__(self, tracking: Tracking, open_run: Callable[[], tuple["MlflowClient", str]], out: AnyPath) -> None:
        try_briefly()
        self.open_run, self.out = open_run, out
        self.client: MlflowClient | None = None
        self.run_id: str | None = None
        self.letters: list[Letter] = []
        self.away = False  # whether the last try failed
        self.changed = threading.Condition()
        self.closing = False
        try:
            self.client, self.run_id = open_run()
        except Exception as error:  # MLflow passes on any error of its database or store
            if refused(error) or not (tracking.uri or "").startswith("http"):
                raise UserError(f"tracking.uri = {tracking.uri}: {first_line(error)}") from None
            self._say_away(error)
        self.thread = threading.Thread(target=self._deliver, name="outbox", daemon=True)
        self.thread.start()

    def post(self, letter: Letter) -> None:
        """Queue a letter for delivery, and return at once. A letter that already waits is not queued again."""
        with self.changed:
            if letter not in self.letters[1:]:  # the first may be on its way, with an older version of its file
                self.letters.append(letter)
            self.changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Wait for deliveries, unless the server is known to be away. Then save the rest in the run's folder.

        Raises:
            UserError: the folder cannot be written.
        """
        with self.changed:
            self.changed.wait_for(lambda: not self.letters or self.away, seconds)
            self._keep()

    def close(self) -> None:
        """Deliver what is left, for a limited time. Save the rest in the run's folder.

        Raises:
            UserError: the folder cannot be written.
        """
        with self.changed:
            self.closing = True
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self.letters, LAST_WAIT)
            self._keep()
            if self.letters:
                log.warning("%s: not delivered to MLflow; --resume delivers it", self.out / UNDELIVERED)
            self.letters = []

    def _keep(self) -> None:
        path = self.out / UNDELIVERED
        with explain_disk_errors(path):
            if self.letters:
                write_text_atomically(path, "".join(f"{json.dumps(letter)}\n" for letter in self.letters))
            else:
                path.unlink(missing_ok=True)

    def _deliver(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.letters or self.closing)
                if not self.letters:
                    return
                letter = self.letters[0]
            try:
                if self.client is None:
                    self.client, self.run_id = self.open_run()
                self._send(letter)
                failure = None
            except Exception as error:  # MLflow passes on any error of its database or store
                failure = error
            with self.changed:
                more = self.letters[1:]
                if failure is None or (self.client is not None and refused(failure)):
                    if failure:
                        log.warning("MLflow refuses %s: %s", letter[0], first_line(failure))
                    elif self.away:
                        log.warning("MLflow answers again")
                    self.away, self.letters = False, more
                elif letter[0] == "file" and any(other[0] != "file" for other in more):
                    self.letters = [*more, letter]  # files go to another store: figures need not wait for it
                else:
                    if not self.away:
                        self._say_away(failure)
                    self.changed.notify_all()
                    self.changed.wait(1.0 if self.closing else RETRY_AFTER)
                self.changed.notify_all()

    def _send(self, letter: Letter) -> None:
        from mlflow.entities import Metric, Param

        assert self.client is not None
        assert self.run_id is not None
        match letter:
            case ["metrics", rows]:
                self.client.log_batch(self.run_id, metrics=[Metric(*row) for row in rows])
            case ["params", values]:
                self.client.log_batch(self.run_id, params=[Param(name, value) for name, value in values.items()])
            case ["file", path, folder]:
                if (self.out / path).is_file():
                    with local_copy(self.out / path) as file:
                        self.client.log_artifact(self.run_id, str(file), folder)
            case ["status", status]:
                self.client.set_terminated(self.run_id, status)

    def _say_away(self, error: Exception) -> None:
        self.away = True
        log.warning("MLflow cannot be reached; training goes on, and figures wait: %s", first_line(error))


def read_undelivered(out: AnyPath, step: int) -> list[Letter]:
    """Read what an earlier start of the run did not deliver, without its end status and metrics beyond ``step``."""
    path = out / UNDELIVERED
    letters = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    for letter in letters:
        if letter[0] == "metrics":
            letter[1] = [row for row in letter[1] if row[3] <= step]
    return [letter for letter in letters if letter[0] != "status"]


def try_briefly() -> None:
    """Make MLflow's client try only once per call, so that the caller decides about retries."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


def refused(error: Exception) -> bool:
    """Tell whether MLflow refused the request, so that another try would fail the same way."""
    from mlflow.exceptions import MlflowException

    # Other 4xx codes may come from a proxy in front of a server that is away.
    return isinstance(error, MlflowException) and error.get_http_status_code() == 400


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return next(iter(str(error).splitlines()), type(error).__name__)
