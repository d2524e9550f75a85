"""The queue of a run's figures and files for MLflow. A thread delivers them in order, also if MLflow fails for a while.

Training never waits for MLflow: posting returns at once, and only this module waits. MLflow's client would retry for
minutes; here every try is short. What is not delivered is tried again during the run and at its end. After that it
stays in ``undelivered.jsonl``, and a resumed run delivers it. Nothing that MLflow raises ends a run, however long it
hangs.
"""

import json
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from fr_core.config.sections import Tracking
from fr_core.data.store import AnyPath, explain_disk_errors, local_copy, write_text_atomically
from fr_core.errors import StorageError, UserError
from fr_core.train.logged_net import log_net

if TYPE_CHECKING:
    from mlflow import MlflowClient

UNDELIVERED = "undelivered.jsonl"
RETRY_AFTER = 5.0  # seconds
FIRST_WAIT = 30.0  # seconds to wait for MLflow to open the run; a busy machine needs fifteen for a new database
HEALTHY_WAIT, LAST_WAIT = 2.0, 15.0  # seconds to wait for deliveries at a checkpoint, and at the end of a run
NET_WAIT = 300.0  # seconds to wait longer for a net, which may be large, while MLflow answers
FILES = ("file", "net")  # letters that go to another store than figures
NO_ANSWER = "no answer in {:.0f} s"
CALL_METRICS = 1000  # MLflow's limit per call

CONTEXT = "mlflow.data.context"  # MLflow's tag of what a run does with a dataset

# ["metrics", [name, value, time, step] …], ["params", {}], ["tags", {}], ["inputs", {}], ["file", path, folder],
# ["net", path, step], ["status", name]
Letter = list[Any]
OPEN: Letter = ["open"]  # what the thread does before it delivers the first letter

T = TypeVar("T")
log = logging.getLogger("bigface")


class Outbox:
    """Delivers the figures and files of one run to MLflow.

    Args:
        open_run: makes or opens the MLflow run, and returns a client and the run's id. The thread calls it until it
            succeeds.
        out: the run's folder; paths of files are relative to it.
        begins: whether the run has taken no step yet, so that a wrong address ends it.

    Raises:
        UserError: the run begins, and ``open_run`` raised this at once.
    """

    def __init__(
        self, tracking: Tracking, open_run: Callable[[], tuple["MlflowClient", str]], out: AnyPath, begins: bool = False
    ) -> None:
        try_briefly()
        self.place, self.open_run, self.out, self.begins = tracking.uri or "mlflow.db", open_run, out, begins
        self.register = tracking.register_as
        self.client: MlflowClient | None = None
        self.run_id: str | None = None
        self.mistake: UserError | None = None
        self.letters: list[Letter] = []
        self.refused: list[Letter] = []
        self.away = False  # whether the last try failed
        self.changed = threading.Condition()
        self.closing = False
        threading.Thread(target=self._work, name="outbox", daemon=True).start()
        with self.changed:
            if not self.changed.wait_for(lambda: self.client or self.away or self.mistake, FIRST_WAIT):
                self._say_away(NO_ANSWER.format(FIRST_WAIT))
        if self.mistake:
            raise self.mistake

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

    def undelivered(self) -> int:
        """Count the rows, files and other letters that wait or were refused."""
        with self.changed:
            return sum(len(letter[1]) if letter[0] == "metrics" else 1 for letter in [*self.refused, *self.letters])

    def close(self) -> None:
        """Deliver what is left, for a limited time. Save the rest in the run's folder.

        Raises:
            UserError: the folder cannot be written.
        """
        with self.changed:
            self.closing = True
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self.letters, LAST_WAIT)
            if any(letter[0] == "net" for letter in self.letters):
                self.changed.wait_for(lambda: self.away or not self.letters, NET_WAIT)
            self._keep()
            if self.letters or self.refused:
                log.warning("%s: not delivered to MLflow; --resume delivers it", self.out / UNDELIVERED)
            self.letters = []

    def _keep(self) -> None:
        path, kept = self.out / UNDELIVERED, [*self.refused, *self.letters]
        with explain_disk_errors(path):
            if kept:
                write_text_atomically(path, "".join(f"{json.dumps(letter)}\n" for letter in kept))
            else:
                path.unlink(missing_ok=True)

    def _work(self) -> None:
        while (letter := self._next()) is not None:
            failure = self._try(letter)
            with self.changed:
                self._note(letter, failure)
                self.changed.notify_all()

    def _next(self) -> Letter | None:
        """Wait for a letter, and return it; before the first one, open the run. None: there is no more to do."""
        with self.changed:
            self.changed.wait_for(lambda: self.letters or self.closing or not self.client)
            if self.mistake or (self.closing and not self.letters):
                return None
            return self.letters[0] if self.letters else OPEN

    def _try(self, letter: Letter) -> BaseException | None:
        """Deliver a letter, and return why this failed, if it did."""
        try:
            if self.client is None:
                self.client, self.run_id = self.open_run()
            self._send(letter)
        except BaseException as error:  # MLflow passes on any error of its database or store
            return error
        return None

    def _note(self, letter: Letter, failure: BaseException | None) -> None:
        """Drop a letter that was delivered; keep another one for later, and wait a little where all would fail."""
        more = [other for other in self.letters if other is not letter]
        if failure is None:
            if self.away:
                log.warning("MLflow (%s) answers again", self.place)
            self.away, self.letters = False, more
        elif self.client is not None and refused(failure):
            if letter[0] not in [other[0] for other in self.refused]:
                log.warning("MLflow (%s) refuses %s: %s", self.place, letter[0], first_line(failure))
            self.refused.append(letter)
            self.away, self.letters = False, more
        elif self.begins and self.client is None and not self.away and is_mistake(failure):
            self.mistake = failure
        elif letter[0] in FILES and any(other[0] not in FILES for other in more):
            self.letters = [*more, letter]  # figures need not wait for it
        else:
            if not self.away:
                self._say_away(first_line(failure))
            self.changed.notify_all()
            self.changed.wait(1.0 if self.closing else RETRY_AFTER)

    def _send(self, letter: Letter) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

        assert self.client is not None
        assert self.run_id is not None
        match letter:
            case ["metrics", rows]:
                self.client.log_batch(self.run_id, metrics=[Metric(*row) for row in rows])
            case ["params", values]:
                self.client.log_batch(self.run_id, params=[Param(name, value) for name, value in values.items()])
            case ["tags", values]:
                self.client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in values.items()])
            case ["inputs", datasets]:
                inputs = [
                    DatasetInput(Dataset(**{**facts, "schema": None}), [InputTag(CONTEXT, context)])
                    for context, facts in datasets.items()
                ]
                self.client.log_inputs(self.run_id, inputs)
            case ["net", path, step]:
                if (self.out / path).is_file():
                    log_net(self.client, self.run_id, self.out / path, step, self.register)
            case ["file", path, folder]:
                if (self.out / path).is_file():
                    with local_copy(self.out / path) as file:
                        self.client.log_artifact(self.run_id, str(file), folder)
            case ["status", status]:
                self.client.set_terminated(self.run_id, status)

    def _say_away(self, reason: str) -> None:
        self.away = True
        kept = self.out / UNDELIVERED
        log.warning("MLflow (%s) fails; training goes on, and figures wait in %s: %s", self.place, kept, reason)


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


def refused(error: BaseException) -> bool:
    """Tell whether MLflow refused the request, so that another try would fail the same way."""
    status = getattr(error, "get_http_status_code", None)  # of MLflow's own exceptions
    return status is not None and status() == 400  # other 4xx codes may come from a proxy of a server that is away


def is_mistake(error: BaseException) -> TypeGuard[UserError]:
    """Tell whether an address can never work. A database that is locked may work later."""
    return isinstance(error, UserError) and not isinstance(error, StorageError)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def within(seconds: float, call: Callable[[], T]) -> T:
    """Return what a call returns. A thread makes the call, and goes on with it if it takes longer.

    Raises:
        TimeoutError: the call takes longer.
        Exception: whatever the call raises.
    """
    made: Future[T] = Future()

    def make() -> None:
        try:
            made.set_result(call())
        except Exception as error:
            made.set_exception(error)

    threading.Thread(target=make, daemon=True).start()
    wait([made], seconds)
    if not made.done():
        raise TimeoutError(NO_ANSWER.format(seconds))
    return made.result()
