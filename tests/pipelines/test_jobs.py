"""Real Ray heads: one has token authentication and gets a training from an empty folder, one dies."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from mlflow import MlflowClient

from fr_core.nets.checkpoint_files import checkpoints
from fr_core.train.metrics import read_metrics
from pipelines.gauges import DESCRIPTIONS
from tests.helpers.heads import RAY, processes_with, running_head, training, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]  # a head and its job take minutes on a busy machine


@pytest.fixture(scope="module")
def head():
    with running_head() as running:
        yield running


def test_a_job_of_two_workers_trains_to_its_report_though_one_is_killed(head, dataset, tmp_path, mlflow_database):
    """Every step is there once and its MLflow run is one; its figures are scraped while it runs; its log is JSON."""
    environment, address, metrics = head
    (tmp_path / "empty").mkdir()
    shutil.copy(mlflow_database, tmp_path)
    out, killed = tmp_path / "run", []
    train = ["bigface", "train", "debug_bigface", f"data.path={dataset}", "train.epochs=10", "train.max_steps=120"]
    train += ["train.save_every=40", "--workers", "2", "--out", str(out)]
    command = [RAY, "job", "submit", "--address", address, "--submission-id", "trained", "--working-dir", "."]
    command += ["--", *train]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, cwd=tmp_path / "empty", env=environment, stdout=log, stderr=log)
    exported = set[str]()
    try:
        while job.poll() is None:
            exported |= set(wait_for(metrics, "").splitlines())
            if checkpoints(out) and not killed:
                workers = [one for one in processes_with("RAY_TMPDIR", environment["RAY_TMPDIR"]) if is_worker(one)]
                workers[-1].kill()
                killed.append(workers[-1].pid)
            time.sleep(0.5)  # as often as the head is told
    finally:
        job.kill()
        job.wait()
    log = (tmp_path / "log").read_text()
    assert job.returncode == 0, log
    assert len(killed) == 1
    figures = json.loads((out / "report.json").read_text())["figures"]
    assert (figures["steps"], figures["workers"]) == (120, 2)
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == list(range(1, 121))
    assert np.mean([row["loss"] for row in rows[-20:]]) < 0.5 * np.mean([row["loss"] for row in rows[:20]])
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("bigface").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"]
    printed = json.loads(wait_for(f"{address}/api/jobs/trained/logs", environment["RAY_AUTH_TOKEN"]))["logs"]
    events = [json.loads(line) for line in printed.splitlines()[2:]]  # after two lines that Ray writes of the job
    assert events[0]["event"] == "training"
    assert (events[0]["run"], events[0]["steps"]) == ("run", 120)
    named = {name: [event for event in events if event["event"] == name] for name in ("worker started", "resumed")}
    assert [event["rank"] for event in named["worker started"]].count(0) == 2
    assert {event["log"] for event in named["worker started"]} == {f"bigface-run-rank{rank}.err" for rank in (0, 1)}
    failed = [event["rank"] for event in events if event["event"] == "worker failed"]
    assert failed
    assert set(failed) <= {0, 1}  # the other one may notice
    (resumed,) = named["resumed"]
    assert resumed["step"] in (40, 80, 120)
    assert resumed["seconds_since_failure"] > 0
    assert [event["step"] for event in events if event["event"] == "checkpoint saved"][-1] == 120
    assert [event["figures"] for event in events if event["event"] == "train"] == [figures]
    (named_log,) = Path(environment["RAY_TMPDIR"]).rglob("bigface-run-rank0.err")
    lines = [json.loads(line)["event"] for line in named_log.read_text().splitlines() if line.startswith("{")]
    assert lines.count("worker started") == 1
    for name in DESCRIPTIONS:
        lines = [line for line in exported if line.startswith(f"ray_bigface_{name}{{")]
        for rank in (0,) if name in ("restarts", "undelivered") else (0, 1):
            assert any(f'rank="{rank}"' in line for line in lines)
        assert all('run="run"' in line and float(line.split()[-1]) >= 0 for line in lines)
    counted = {float(line.split()[-1]) for line in exported if line.startswith("ray_bigface_restarts{")}
    assert counted == {0, 1}  # the killed worker


def is_worker(process):
    """Whether it is one of Ray Train's, which Ray calls so."""
    with suppress(psutil.Error):
        return "RayTrainWorker" in " ".join(process.cmdline())
    return False


@pytest.mark.soak
def test_a_stopped_job_leaves_a_checkpoint_and_goes_on(head, dataset, tmp_path):
    """`ray job stop` is a SIGTERM: the checkpoint holds every step that was trained."""
    environment, address, _ = head
    out, log = tmp_path / "run", tmp_path / "log"
    jobs = [RAY, "job", "submit", "--address", address, "--submission-id"]
    job = training(dataset, out, log, environment, "train.save_every=150", before=[*jobs, "stopped", "--"])
    while not (out / "metrics.csv").is_file() or len(read_metrics(out)) < 30:
        assert job.poll() is None, log.read_text()
        time.sleep(0.05)
    stop = subprocess.run(
        [RAY, "job", "stop", "--address", address, "stopped"], env=environment, capture_output=True, text=True
    )
    assert "was stopped" in stop.stdout, stop
    job.wait(60)
    (saved,) = checkpoints(out)
    assert "step_00000030" <= saved.name < "step_00000150"
    assert saved.name == f"step_{read_metrics(out)[-1]['step']:08.0f}"
    assert not (out / "report.json").exists()
    again = training(dataset, out, log, environment, "--resume", before=[*jobs, "again", "--"])
    assert again.wait(180) == 0, log.read_text()
    assert [row["step"] for row in read_metrics(out)] == list(range(1, 201))


@pytest.mark.soak
def test_a_job_whose_tracker_stays_away_succeeds_and_says_what_is_not_delivered(head, dataset, tmp_path):
    environment, address, _ = head
    out, log = tmp_path / "run", tmp_path / "log"
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and never listens
        away = f"tracking.uri=http://127.0.0.1:{nobody.getsockname()[1]}"
        submit = [RAY, "job", "submit", "--address", address, "--submission-id", "untracked", "--"]
        assert training(dataset, out, log, environment, away, before=submit).wait(300) == 0, log.read_text()
    events = [json.loads(line)["event"] for line in log.read_text().splitlines() if line.startswith("{")]
    assert sum("MLflow" in event and "training goes on" in event for event in events) == 1
    assert sum("not delivered to MLflow" in event for event in events) == 1
    assert (out / "undelivered.jsonl").stat().st_size
    assert [row["step"] for row in read_metrics(out)] == list(range(1, 201))


@pytest.mark.soak
def test_a_job_tells_that_a_node_died_and_where_it_goes_on(head, dataset, tmp_path):
    environment, address, _ = head
    out, log = tmp_path / "run", tmp_path / "log"
    node = [RAY, "start", f"--address={environment['RAY_ADDRESS']}", "--block", "--num-cpus=2"]
    machine = subprocess.Popen(node, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    submit = [RAY, "job", "submit", "--address", address, "--submission-id", "two-nodes", "--"]
    try:
        while len(wait_for(f"{address}/nodes?view=summary", environment["RAY_AUTH_TOKEN"]).split('"raylet"')) < 3:
            time.sleep(0.5)
        job = training(dataset, out, log, environment, "--workers", "2", before=submit)
        while not checkpoints(out):
            assert job.poll() is None, log.read_text()
            time.sleep(0.5)
        os.killpg(machine.pid, signal.SIGKILL)
        assert job.wait(300) == 0, log.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(machine.pid, signal.SIGKILL)
        machine.wait()
    events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    names = [event["event"] for event in events]
    (resumed,) = [event for event in events if event["event"] == "resumed"]
    assert "worker failed" in names[: names.index("resumed")]
    assert resumed["step"] % 20 == 0
    assert resumed["seconds_since_failure"] > 0
    assert [row["step"] for row in read_metrics(out)] == list(range(1, 201))


@pytest.mark.soak
def test_a_run_goes_on_when_its_head_died_and_another_one_stands(dataset, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    with running_head() as (environment, _, _):
        driver = training(dataset, out, log, environment)
        while not checkpoints(out):
            assert driver.poll() is None, log.read_text()
            time.sleep(0.5)  # as often as the head is told
    assert driver.wait(180) != 0
    assert not (out / "report.json").exists()
    with running_head() as (environment, _, _):
        assert training(dataset, out, log, environment, "--resume").wait(180) == 0, log.read_text()
    assert [row["step"] for row in read_metrics(out)] == list(range(1, 201))


@pytest.mark.soak
def test_nobody_submits_without_the_token(head):
    _, address, _ = head
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{address}/api/jobs/", timeout=10)
