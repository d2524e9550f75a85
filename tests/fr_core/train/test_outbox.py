"""Nothing of MLflow ends a run: failures, refusals, hangs, a deleted experiment, runs that begin at once."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_ALREADY_EXISTS

from fr_core.config import Config
from fr_core.config.sections import Tracking
from fr_core.errors import StorageError, UserError
from fr_core.train import mlflow_runs, outbox, tracking
from fr_core.train.mlflow_runs import Comparison, log_verification, open_mlflow
from fr_core.train.tracking import Tracker
from tests.helpers.runs import config_of, losses, run


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """No test waits for what never comes, but for what comes."""
    monkeypatch.setattr(outbox, "RETRY_AFTER", 0.05)
    monkeypatch.setattr(outbox, "LAST_WAIT", 0.5)
    monkeypatch.setattr(outbox, "HEALTHY_WAIT", 0.5)


def kept(out):
    return [json.loads(line) for line in (out / "undelivered.jsonl").read_text().splitlines()]


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "bigface"]


@pytest.fixture
def hang():
    """A call that hangs until the test ends."""
    over = threading.Event()
    yield lambda *_, **more: over.wait()
    over.set()


REFUSED = MlflowException("no such thing", INVALID_PARAMETER_VALUE)
FAILURES = [REFUSED, MlflowException("broken"), ImportError("no driver"), StorageError("locked"), SystemExit(1)]


def test_what_waits_is_counted_row_by_row(tmp_path, monkeypatch):
    away = [True]

    def open_when_back(*_):
        if away[0]:
            raise StorageError("locked")
        return client, "0"

    client = SimpleNamespace(
        create_run=lambda *_, **more: SimpleNamespace(info=SimpleNamespace(run_id="known")),
        log_batch=lambda *_, **more: None,
        set_terminated=lambda *_: None,
    )
    monkeypatch.setattr(tracking, "open_mlflow", open_when_back)
    tracker = Tracker(Config(), tmp_path, 0, None)
    for step in (1, 2):
        tracker.log(step, {"loss": 1.0, "lr": 0.1})
    tracker.flush()
    assert tracker.health()["undelivered"] == 2 + 2 * 2  # tags, parameters, and two figures of each step
    away[0] = False
    tracker.close("FINISHED")
    assert tracker.health()["undelivered"] == 0


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: f"{type(failure).__name__}: {failure}")
def test_a_run_goes_on_whatever_mlflow_raises(tmp_path, monkeypatch, caplog, failure):
    """It is said once at the start and once at the end; all letters are kept in the run's folder."""

    def fail(*_):
        raise failure

    monkeypatch.setattr(tracking, "open_mlflow", fail)
    tracker = Tracker(Config(), tmp_path, 0, None)
    tracker.log(1, {"loss": 2.0})
    tracker.flush()
    tracker.wait()
    tracker.close("FINISHED")
    assert [letter[0] for letter in kept(tmp_path)] == ["tags", "params", "metrics", "status"]
    first, last = warnings(caplog)
    assert first.startswith(f"MLflow (mlflow.db) fails; training goes on, and figures wait in {tmp_path}/undelivered")
    assert first.endswith(f": {failure}")
    assert last.endswith("undelivered.jsonl: not delivered to MLflow; --resume delivers it")


def test_a_run_goes_on_while_mlflow_hangs(dataset, tmp_path, monkeypatch, caplog, hang):
    monkeypatch.setattr(outbox, "FIRST_WAIT", 0.1)
    monkeypatch.setattr(tracking, "open_mlflow", hang)
    run(config_of(dataset, "tracking.uri=http://127.0.0.1:1", "train.save_every=5"), tmp_path)
    assert len(losses(tmp_path)) == 20
    assert {letter[0] for letter in kept(tmp_path)} == {"tags", "params", "inputs", "metrics", "file", "net", "status"}
    assert "fails; training goes on" in warnings(caplog)[0]
    assert "no answer in 0 s" in warnings(caplog)[0]


class Store:
    """What a client and its server are to an outbox; ``log_batch`` may be replaced."""

    def __init__(self):
        self.steps, self.ended = [], None

    def log_batch(self, run_id, metrics=(), params=()):
        self.steps += [metric.step for metric in metrics]

    def set_terminated(self, run_id, status):
        self.ended = status


def opened(store, tmp_path):
    return outbox.Outbox(Tracking(), lambda: (store, "id"), tmp_path)


def test_a_delivery_that_hangs_holds_nothing_up(tmp_path, hang):
    store = Store()
    store.log_batch = hang
    letters = opened(store, tmp_path)
    for step in (1, 2):
        letters.post(["metrics", [["loss", 1.0, 0, step]]])
        letters.wait(0.1)
    letters.close()
    assert [letter[1][0][3] for letter in kept(tmp_path)] == [1, 2]


def test_what_mlflow_refuses_is_said_once_and_kept_and_the_rest_is_delivered(tmp_path, caplog):
    store = Store()
    deliver = store.log_batch

    def refuse_odd(run_id, metrics=(), params=()):
        if metrics[0].step % 2:
            raise REFUSED
        deliver(run_id, metrics)

    store.log_batch = refuse_odd
    letters = opened(store, tmp_path)
    for step in range(1, 7):
        letters.post(["metrics", [["loss", 1.0, 0, step]]])
    letters.post(["status", "FINISHED"])
    letters.close()
    assert (store.steps, store.ended) == ([2, 4, 6], "FINISHED")
    assert [letter[1][0][3] for letter in kept(tmp_path)] == [1, 3, 5]
    assert [text.partition(":")[0] for text in warnings(caplog)] == [
        "MLflow (mlflow.db) refuses metrics",
        f"{tmp_path}/undelivered.jsonl",
    ]


@pytest.mark.parametrize(("step", "run_id"), [(4, None), (0, "known")])
def test_a_wrong_address_is_no_mistake_of_a_run_that_goes_on(tmp_path, monkeypatch, step, run_id):
    config = Config(tracking={"uri": "nonsense://x"})
    with pytest.raises(UserError, match=r"^tracking\.uri = nonsense://x: .*: give a server's http"):
        Tracker(config, tmp_path, 0, None)
    tracker = Tracker(config, tmp_path, step, run_id)
    tracker.close("FINISHED")
    assert kept(tmp_path)


def test_the_experiment_was_deleted(tmp_path, mlflow_database, monkeypatch, caplog):
    """The mend is named; once the experiment is restored, the figures arrive."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    shutil.copy(mlflow_database, tmp_path)
    client = MlflowClient(uri)
    experiment = client.create_experiment("bigface")
    client.delete_experiment(experiment)
    config = Config(tracking={"uri": uri})
    tracker = Tracker(config, tmp_path / "run", 0, None)
    tracker.log(1, {"loss": 2.0})
    tracker.close("FINISHED")
    assert "experiment 'bigface' was deleted: give tracking.experiment=NAME, or restore it" in warnings(caplog)[0]
    client.restore_experiment(experiment)
    monkeypatch.setattr(outbox, "LAST_WAIT", 60.0)
    tracker = Tracker(config, tmp_path / "run", 1, None)
    tracker.close("FINISHED")
    [found] = client.search_runs([experiment])
    assert (found.info.status, found.data.metrics["curves/loss"]) == ("FINISHED", 2.0)
    assert not (tmp_path / "run" / "undelivered.jsonl").exists()


# Runs that begin at once


def test_runs_that_begin_at_once_make_one_database_and_one_experiment(tmp_path, monkeypatch, mlflow_database):
    """Each makes a database, here by copying one; that of the first is taken."""
    together, made = threading.Barrier(3), []

    def client_of(uri):
        file = Path(uri.removeprefix("sqlite:///"))
        if not file.exists():
            made.append(shutil.copy(mlflow_database, file))
            together.wait()
        return MlflowClient(uri)

    monkeypatch.setattr(mlflow, "MlflowClient", client_of)

    def begin(number):
        client, experiment = open_mlflow(Tracking(), tmp_path / "runs")
        return client.create_run(experiment, run_name=f"run{number}").info.experiment_id

    with ThreadPoolExecutor(3) as pool:
        ids = set(pool.map(begin, range(3)))
    assert (len(ids), len(made)) == (1, 3)
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert {run.info.run_name for run in client.search_runs(list(ids))} == {"run0", "run1", "run2"}
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mlflow.db"]


def test_an_experiment_that_another_run_has_just_made_is_taken():
    found = iter([None, SimpleNamespace(experiment_id="7", lifecycle_stage="active")])

    def create_experiment(name, **_):
        raise MlflowException("it exists", RESOURCE_ALREADY_EXISTS)

    client = SimpleNamespace(get_experiment_by_name=lambda name: next(found), create_experiment=create_experiment)
    assert mlflow_runs._experiment(client, "bigface", None) == "7"


@pytest.mark.parametrize("content", [b"", b"SQLite or not", "half"])
def test_a_half_made_database_is_left_alone_and_named(tmp_path, mlflow_database, content):
    whole = mlflow_database.read_bytes()
    (tmp_path / "mlflow.db").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    before = (tmp_path / "mlflow.db").read_bytes()
    with pytest.raises(StorageError, match=r"mlflow\.db: no whole database of MLflow \(.+\): move it away"):
        open_mlflow(Tracking(), tmp_path)
    assert (tmp_path / "mlflow.db").read_bytes() == before


# What commands tell MLflow beside a run


def test_comparisons_and_later_verifications_go_on_too(tmp_path, monkeypatch, caplog, hang):
    monkeypatch.setattr(mlflow_runs, "MOST_WAIT", 0.1)
    monkeypatch.setattr(mlflow_runs, "open_mlflow", hang)
    comparison = Comparison(Tracking(uri="http://127.0.0.1:1"), tmp_path / "results.csv", {})
    assert comparison.run_id is None
    comparison.close("", [])
    config = {"tracking": {"uri": "http://127.0.0.1:1"}}
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "known", "config": config}))
    assert log_verification(tmp_path, "lfw", {"accuracy": 0.9}) is None
    assert [text.rpartition(": ")[2] for text in warnings(caplog)] == ["no answer in 0 s"] * 2
