"""A real head with token authentication, and a training submitted to it from an empty folder."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]  # a head and its job take minutes on a busy machine


def free_ports(number):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def head():
    """Environment of whoever may use it, the jobs' address, and where its metrics are."""
    folder = tempfile.mkdtemp(prefix="bf", dir="/tmp")  # sockets have short names
    port, dashboard, agent, metrics, client = free_ports(5)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_TMPDIR": folder}
    environment |= {"PATH": f"{RAY.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"RAY_metrics_report_interval_ms": "500"}
    options = {"port": port, "dashboard-port": dashboard, "dashboard-agent-listen-port": agent}
    options |= {"metrics-export-port": metrics, "ray-client-server-port": client, "num-cpus": 2}
    options |= {"object-store-memory": 200_000_000}
    command = [RAY, "start", "--head", "--block", "--disable-usage-stats", *(f"--{k}={v}" for k, v in options.items())]
    with open(f"{folder}/log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{dashboard}/api/version", environment["RAY_AUTH_TOKEN"])
        yield environment, f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}/metrics"
    finally:
        family = psutil.Process(process.pid)
        for one in [*family.children(recursive=True), family]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(address, token):
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 90
    while True:
        try:
            return urllib.request.urlopen(request, timeout=5).read().decode()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.5)


def test_a_job_trains_to_its_report(head, dataset, tmp_path):
    """Its figures are scraped while it runs; its log is JSON; the metrics are those of this run."""
    environment, address, metrics = head
    (tmp_path / "empty").mkdir()
    train = ["bigface", "train", "debug_bigface", f"data.path={dataset}", "tracking.uri=off"]
    train += ["train.epochs=10", "train.max_steps=60", "--out", str(tmp_path / "run")]
    command = [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", *train]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, cwd=tmp_path / "empty", env=environment, stdout=log, stderr=log)
    exported = ""
    try:
        while job.poll() is None:
            found = wait_for(metrics, "")
            exported = found if "ray_bigface_loss{" in found else exported
            time.sleep(0.2)
    finally:
        job.kill()
        job.wait()
    log = (tmp_path / "log").read_text()
    assert job.returncode == 0, log
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["figures"]["steps"] == 60
    events = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert events[0]["event"] == "training"
    assert (events[0]["run"], events[0]["steps"]) == ("run", 60)
    for name in ("step", "loss", "lr", "images_per_second", "data_wait", "head_mib"):
        (line,) = [line for line in exported.splitlines() if line.startswith(f"ray_bigface_{name}{{")]
        assert 'run="run"' in line
        assert 'rank="0"' in line
        assert float(line.split()[-1]) >= 0


def test_nobody_submits_without_the_token(head):
    _, address, _ = head
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{address}/api/jobs/", timeout=10)
