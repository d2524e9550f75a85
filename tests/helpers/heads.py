"""Heads of clusters on this machine, each with a home, ports and a token of its own, and trainings on them."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray.util import get_node_ip_address

from pipelines.machines import GROWS_AS

ROOT = Path(__file__).parents[2]
RAY, BIGFACE = (Path(sys.executable).with_name(name) for name in ("ray", "bigface"))
PATIENCE = 240  # seconds for a head to answer, on a busy machine


def free_ports(number):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def running_head(cpus=2, machines=None, version="v1"):
    """A head with ports, a token and a home of its own.

    Args:
        machines: types of machines that an autoscaler may start, on this machine: resources and max_workers of each.
            Such a head has no dashboard, and so no jobs.
        version: of the autoscaler.

    Yields:
        Environment of whoever may use it, the jobs' address, and where its metrics are.
    """
    folder = tempfile.mkdtemp(prefix="bf", dir="/tmp")  # sockets have short names
    port, dashboard, agent, metrics, client = free_ports(5)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_TMPDIR": folder}
    environment |= {"PATH": f"{RAY.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"RAY_DASHBOARD_STARTUP_TIMEOUT_S": f"{PATIENCE:.0f}"}
    environment |= {"RAY_metrics_report_interval_ms": "500", "HOME": folder, "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    options = {"port": port, "dashboard-port": dashboard, "dashboard-agent-listen-port": agent}
    options |= {"metrics-export-port": metrics, "ray-client-server-port": client, "num-cpus": cpus}
    options |= {"object-store-memory": 200_000_000, "include-dashboard": not machines}
    of_head = {}
    if machines:
        options["autoscaling-config"] = Path(folder) / GROWS_AS  # as `ray up` leaves it
        options["autoscaling-config"].write_text(yaml.safe_dump(autoscaler_config(cpus, machines, port)))
        of_head = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
        if version == "v2":
            of_head |= {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID}
            of_head |= {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID}
    command = [RAY, "start", "--head", "--block", "--disable-usage-stats", *(f"--{k}={v}" for k, v in options.items())]
    with open(f"{folder}/log", "w") as log:
        process = subprocess.Popen(command, env=environment | of_head, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + PATIENCE
        while "Ray runtime started" not in (told := Path(f"{folder}/log").read_text()):
            assert process.poll() is None, told
            assert time.monotonic() < deadline, told
            time.sleep(0.5)
        environment |= {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        yield environment, f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}/metrics"
    finally:
        family = []
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)  # some have renamed all that they were told
        for one in [*family, *processes_with("RAY_TMPDIR", folder)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def autoscaler_config(cpus, machines, port):
    """As `ray up` makes it of a cluster's file, for Ray's stand-in for a cloud: its machines are processes here."""
    provider = {"type": "external", "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}"}
    provider |= {"gcs_address": f"{get_node_ip_address()}:{port}", "launch_multiple": True}
    provider |= dict.fromkeys(("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check"), True)
    node = {"node_config": {}, "min_workers": 0}
    small = {"object_store_memory": 200_000_000}
    kinds = {name: {**node, **kind, "resources": kind["resources"] | small} for name, kind in machines.items()}
    kinds[FAKE_HEAD_NODE_TYPE] = {**node, "resources": {"CPU": cpus}, "max_workers": 0}
    config = {"cluster_name": "here", "provider": provider, "auth": {}, "available_node_types": kinds}
    config |= {"head_node_type": FAKE_HEAD_NODE_TYPE, "max_workers": 8, "upscaling_speed": 1.0}
    config |= {"idle_timeout_minutes": 2.0, "docker": {}, "file_mounts": {}}
    lists = ("cluster_synced_files", "initialization_commands", "setup_commands", "head_setup_commands")
    lists += ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands", "rsync_exclude")
    return config | {name: [] for name in (*lists, "rsync_filter")}


def processes_with(name, value):
    """Whose environment says so: also those that left the family."""
    for one in psutil.process_iter():
        with suppress(psutil.Error):
            if one.environ().get(name) == value and one.pid != os.getpid():
                yield one


def wait_for(address, token):
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return urllib.request.urlopen(request, timeout=5).read().decode()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.5)


def training(dataset, out, log, environment, *options, before=()):
    command = [*before, BIGFACE, "train", "debug_bigface", f"data.path={dataset}", "tracking.uri=off"]
    command += ["train.epochs=10", "train.max_steps=200", "train.save_every=20", "--out", out, *options]
    with log.open("a") as file:
        return subprocess.Popen([str(word) for word in command], env=environment, stdout=file, stderr=file)
