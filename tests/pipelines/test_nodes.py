"""Nodes that come and go: a real cluster of several raylets on this machine, and one run on it."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import ray.train
from ray.cluster_utils import Cluster
from ray.train import PreemptionInfo
from ray.train.v2._internal.execution import context
from ray.train.v2._internal.execution.preemption import PreemptionContext

from fr_core.config import Config
from fr_core.config.recipes import load_config
from fr_core.data.stream import blocks_in_process
from fr_core.errors import RunStopped, UserError
from fr_core.nets.checkpoint_files import checkpoints
from fr_core.ranks import Ranks
from fr_core.train.loop import train_loop
from fr_core.train.metrics import read_metrics
from fr_core.train.notice import Notice
from pipelines import machines, on_ray
from pipelines.cli.options import worker_range
from pipelines.train import train

CPUS = {"num_cpus": 4}  # of each node, whatever the machine has: a worker's 2.5, and some for Ray Data


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    ray.shutdown()  # of other tests
    monkeypatch.setattr(machines, "RESIZE_EVERY", 3.0)
    cluster = Cluster(initialize_head=True, head_node_args=CPUS)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def run_config(dataset: Path, steps: int) -> Config:
    """A checkpoint every 20 steps, each of which costs Ray Train a second or two: time for things to happen."""
    given = [f"data.path={dataset}", "train.epochs=1000", f"train.max_steps={steps}", "train.save_every=20"]
    return load_config("debug_bigface", [*given, "tracking.uri=off"])


def ranks_of(out: Path) -> int | None:
    """How many wrote the newest checkpoint."""
    saved = checkpoints(out)
    return json.loads((saved[-1] / "checkpoint.json").read_text())["ranks"] if saved else None


def wait_for(happened: Callable[[], bool], over: threading.Event) -> None:
    while not happened() and not over.is_set():
        time.sleep(0.1)


def beside(happen: Callable[[], None], over: threading.Event, run: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What a run returns, in a thread: Ray adds nodes in the main one alone."""
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(run)
        training.add_done_callback(lambda _: over.set())
        happen()
        return training.result()


def assert_whole(out: Path, undisturbed: Path, steps: int) -> None:
    """Every step once, and a loss that falls as it does where nobody is killed (batch norm sees other groups)."""
    ours, theirs = read_metrics(out), read_metrics(undisturbed)
    assert [row["step"] for row in ours] == list(range(1, steps + 1))
    curves = [np.array([row["loss"] for row in rows]) for rows in (ours, theirs)]
    ours_S, theirs_S = (np.convolve(curve, np.ones(20) / 20, "valid") for curve in curves)
    assert np.abs(ours_S - theirs_S).max() < 0.15 * theirs_S[0]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_workers_follow_the_nodes_that_there_are(cluster, dataset, tmp_path):
    """1 → 2 → 1: a second node comes, and its processes are killed in the middle of an epoch."""
    out, steps, over, seen = tmp_path / "run", 200, threading.Event(), []

    def come_and_go() -> None:
        wait_for(lambda: ranks_of(out) == 1, over)
        node = cluster.add_node(**CPUS)
        wait_for(lambda: ranks_of(out) == 2, over)
        seen.append(ranks_of(out))
        cluster.remove_node(node, allow_graceful=False)
        wait_for(lambda: ranks_of(out) == 1, over)
        seen.append(ranks_of(out))

    figures = beside(come_and_go, over, lambda: train(run_config(dataset, steps), out, (1, 2)))
    assert seen == [2, 1]
    assert figures["steps"] == steps
    train(run_config(dataset, steps), tmp_path / "undisturbed", in_process=True)
    assert_whole(out, tmp_path / "undisturbed", steps)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_node_that_will_be_taken_away_leaves_a_checkpoint(cluster, dataset, tmp_path, monkeypatch):
    """Two workers of which one's node is drained, as a cloud does: a checkpoint before the first that is due."""
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    out, steps, over, saved = tmp_path / "run", 600, threading.Event(), []
    node = cluster.add_node(**CPUS)
    config = run_config(dataset, steps)
    config = config.model_copy(update={"train": config.train.model_copy(update={"save_every": 300})})

    def drain() -> None:
        wait_for(lambda: (out / "metrics.csv").is_file() and len(read_metrics(out)) > 20, over)
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        where = ["--address", cluster.address, "--node-id", node.node_id, "--deadline-remaining-seconds", "5"]
        subprocess.run(
            [Path(sys.executable).with_name("ray"), "drain-node", *reason, *where], check=True, capture_output=True
        )
        wait_for(lambda: bool(checkpoints(out)), over)
        saved.append((ranks_of(out), checkpoints(out)[0].name))
        time.sleep(5)  # the deadline
        cluster.remove_node(node, allow_graceful=False)

    beside(drain, over, lambda: train(config, out, (1, 2)))
    [(ranks, name)] = saved
    assert ranks == 2
    assert "step_00000000" < name < "step_00000300"
    assert ranks_of(out) == 1
    train(config, tmp_path / "undisturbed", in_process=True)
    assert_whole(out, tmp_path / "undisturbed", steps)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_ten_random_kills_lose_nothing(cluster, dataset, tmp_path):
    """Of workers, and of all processes of a node, which another replaces; at any moment, also while one saves."""
    out, over, kills = tmp_path / "run", threading.Event(), []
    config, draw = run_config(dataset, 5000), random.Random(0)

    def kill() -> None:
        node = cluster.add_node(**CPUS)
        wait_for(lambda: bool(checkpoints(out)), over)
        while len(kills) < 10 and not over.is_set():
            time.sleep(draw.uniform(5, 25))
            workers = [
                p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())
            ]
            if draw.random() < 0.5 and workers:
                with suppress(ProcessLookupError):  # it ended by itself
                    os.kill(draw.choice(workers).pid, signal.SIGKILL)
                kills.append("worker")
            else:
                cluster.remove_node(node, allow_graceful=False)
                kills.append("node")
                node = cluster.add_node(**CPUS)
        before = checkpoints(out)[-1:]
        wait_for(lambda: checkpoints(out)[-1:] != before, over)
        (out / on_ray.STOP_REQUEST).touch()

    with pytest.raises(RunStopped) as left:
        beside(kill, over, lambda: train(config, out, (1, 2)))
    assert len(kills) == 10
    assert set(kills) == {"worker", "node"}
    steps = itertools.count(1)
    with pytest.raises(RunStopped):
        train_loop(
            config,
            tmp_path / "undisturbed",
            Ranks(),
            blocks_in_process,
            lambda *_: None,
            lambda: Notice.STOP if next(steps) == left.value.step else Notice.NONE,
        )
    assert_whole(out, tmp_path / "undisturbed", left.value.step)


def test_a_drained_node_is_told_once_and_the_end_goes_before(tmp_path, monkeypatch):
    drained, looks = set(), []
    monkeypatch.setattr(on_ray, "drained_nodes", lambda: looks.append(None) or set(drained))

    def heard(*nodes):
        """Drain nodes, and return the notice when a whole look has passed."""
        drained.update(nodes)
        before = len(looks)
        while len(looks) < before + 3:
            time.sleep(0.01)
        return notice()

    with on_ray.notices(tmp_path, every=0.01) as notice:
        assert [heard(), heard("a"), heard(), heard("a", "b", "c")] == [0, Notice.SAVE, 0, Notice.SAVE]
        (tmp_path / on_ray.STOP_REQUEST).touch()
        assert heard("d") is Notice.STOP
        assert heard() is Notice.NONE


def test_ray_has_told_a_worker_which_nodes_it_drains(monkeypatch):
    told = PreemptionContext()
    monkeypatch.setattr(context, "get_train_context", lambda: SimpleNamespace(preemption_context=told))
    assert on_ray.drained_nodes() == set()
    told.preemption_info = PreemptionInfo(None, {"a": [0], "b": [1]})
    assert on_ray.drained_nodes() == {"a", "b"}


def test_a_range_of_workers_must_fit_as_a_whole(dataset, tmp_path):
    config = load_config("debug_bigface", [f"data.path={dataset}", "tracking.uri=off"])
    with pytest.raises(UserError, match="3 workers do not divide the run's 32 lanes; use 2 or 4"):
        train(config, tmp_path / "run", (2, 4))


def test_workers_are_a_number_or_a_range():
    assert [worker_range(text) for text in (3, "3", "1-4")] == [3, 3, (1, 4)]
    for wrong in ("", "0", "4-2", "1-", "-2", "two"):
        with pytest.raises(UserError, match="--workers"):
            worker_range(wrong)
