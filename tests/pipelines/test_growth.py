"""A cluster whose head has nothing to give, as cluster.yaml's, and Ray's stand-in for a cloud, by either autoscaler.

Two machines of two CPUs may come. Of a range of workers, each has a machine of its own; a number of workers share one.
"""

import json
import subprocess
import sys
import time

import pytest

from tests.helpers.heads import processes_with, running_head, training

pytestmark = [pytest.mark.soak, pytest.mark.ray, pytest.mark.timeout(1800)]

MACHINES = {"spot": {"resources": {"CPU": 2}, "max_workers": 2}}
LANES = "train.global_batch=36"  # which 2, 3 and 4 workers divide
JOIN = "import ray, ray.util; ray.init(logging_level='ERROR');"
NODES = "print(sum(node['Alive'] for node in ray.nodes()))"
REQUESTS = "print({group['state'] for group in ray.util.placement_group_table().values()})"


@pytest.fixture(scope="module", params=["v1", "v2"])
def growing(request):
    """The environment of whoever uses the cluster."""
    with running_head(0, MACHINES, request.param) as (environment, _, _):
        yield environment | {"BIGFACE_LOG": "json"}


def answer(question, environment):
    command = [sys.executable, "-c", f"{JOIN} {question}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def events(log):
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


def test_more_workers_than_ever_fit_are_refused_at_once(growing, dataset, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    assert training(dataset, out, log, growing, LANES, "--workers", "3-4").wait(180) == 2
    (refused,) = events(log)
    assert refused["event"] == (
        "3 workers of 1.5 CPU, and this cluster grows to 2: use --workers 2, or raise max_workers"
    )
    assert answer(REQUESTS, growing) == "set()"  # nothing was asked for


def test_a_wait_ends_with_one_line_and_without_a_request(growing, dataset, tmp_path):
    """No machine comes, since the autoscaler stands still."""
    out, log = tmp_path / "run", tmp_path / "log"
    ours = processes_with("RAY_TMPDIR", growing["RAY_TMPDIR"])
    (autoscaler,) = [one for one in ours if "/monitor.py" in " ".join(one.cmdline())]
    autoscaler.suspend()
    try:
        assert training(dataset, out, log, growing, LANES, "--workers", "2-3", "--wait", "0.1").wait(180) == 2
        assert answer(REQUESTS, growing) == "{'REMOVED'}"
    finally:
        autoscaler.resume()
    *waiting, over = events(log)
    assert {(event["event"], event["room_for"]) for event in waiting} == {("waiting for machines", 0)}
    assert over["event"].startswith("2 workers, and 0.1 minutes have brought room for 0: give a longer --wait")


def test_machines_come_for_a_run_and_go_after_it(growing, dataset, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    driver = training(dataset, out, log, growing, LANES, "train.max_steps=20", "--workers", "2-3")
    assert driver.wait(600) == 0, log.read_text()
    assert json.loads((out / "report.json").read_text())["figures"]["workers"] == 2
    told = events(log)
    waiting = [event for event in told if event["event"] == "waiting for machines"]
    assert waiting[0]["room_for"] == 0
    assert {(event["workers"], event["each"]) for event in waiting} == {(2, "1.5 CPU")}
    assert [event["event"] for event in told][len(waiting) :][:2] == ["machines are here", "training"]
    deadline = time.monotonic() + 300
    while answer(NODES, growing) != "1":  # the head
        assert time.monotonic() < deadline
        time.sleep(2)


def test_machines_come_for_a_number_of_workers_too(growing, dataset, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    driver = training(dataset, out, log, growing, "train.max_steps=20", "--workers", "2")
    assert driver.wait(600) == 0, log.read_text()
    assert json.loads((out / "report.json").read_text())["figures"]["workers"] == 2
    waiting = [event for event in events(log) if event["event"] == "waiting for machines"]
    assert next((event["room_for"], event["each"]) for event in waiting) == (0, "0.5 CPU")
