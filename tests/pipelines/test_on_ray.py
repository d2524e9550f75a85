"""Real Ray: the same dataset from ingest, a killed worker, a user's mistake, Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import ray
import ray.train.torch
from ray.train import ScalingConfig
from ray.train.v2.api.exceptions import WorkerGroupError
from safetensors.torch import save_file

import fr_core.train.loop as loop
from fr_core.config.recipes import load_config
from fr_core.data import stream
from fr_core.data.schema import open_dataset
from fr_core.data.stream import blocks_in_process
from fr_core.errors import UserError
from fr_core.nets.checkpoint_files import checkpoints
from fr_core.nets.iresnet import IResNet
from fr_core.train.metrics import read_metrics
from pipelines import on_ray
from pipelines.datasets.ingest import ingest
from pipelines.on_ray import train_on_ray
from pipelines.train import train
from tests.helpers.datasets import flip_a_bit, write_dataset


@pytest.mark.soak
@pytest.mark.ray
def test_ingest_by_ray_equals_ingest_in_this_process(photos, tmp_path):
    here = ingest(photos, tmp_path / "here", on_ray=False)
    there = ingest(photos, tmp_path / "there", on_ray=True)
    assert here == there  # file names, rows, sizes and checksums of all shards
    open_dataset(tmp_path / "there").check_sha256()


def kill_a_worker_after_the_first_checkpoint(out: Path, killed: list[int]) -> None:
    while not checkpoints(out):
        time.sleep(0.05)
    workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
    workers[-1].send_signal(signal.SIGKILL)
    killed.append(workers[-1].pid)


@pytest.mark.soak
@pytest.mark.ray
def test_workers_distil_with_unlabelled_images(dataset, tmp_path):
    """Each of two workers has two streams of Ray Data and the teacher, and at the end a stream of real faces.

    They train as one process does, but for batch norm.
    """
    save_file(IResNet(10, 8, 1, 32, 32).state_dict(), tmp_path / "teacher.safetensors")
    distill = f"{{teacher='{tmp_path}/teacher.safetensors',teacher_net='iresnet10',unlabelled={{path='{dataset}'}}}}"
    given = [f"data.path={dataset}", f"method.distill={distill}", "data.variants=2", "tracking.uri=off"]
    config = load_config("debug_distill", given)
    for name, workers in (("one", 1), ("two", 2)):
        train(config, tmp_path / name, workers=workers, in_process=workers == 1)
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 20
    assert two[0]["distill_loss"] == pytest.approx(one[0]["distill_loss"], abs=0.1)
    assert two[-1]["distill_loss"] < 0.9 * two[0]["distill_loss"]


@pytest.mark.soak
@pytest.mark.ray
def test_a_killed_worker_is_replaced_and_the_run_finishes(dataset, tmp_path, mlflow_database):
    """Every step is there once, and the MLflow run is one."""
    overrides = [f"data.path={dataset}", "train.epochs=10", "train.max_steps=120", "train.save_every=40"]
    config = load_config("debug_bigface", overrides)
    shutil.copy(mlflow_database, tmp_path)
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker_after_the_first_checkpoint, args=(tmp_path / "run", killed))
    killer.start()
    figures = train(config, tmp_path / "run", workers=2)
    killer.join()
    assert len(killed) == 1
    assert (figures["steps"], figures["workers"]) == (120, 2)
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 121))
    assert np.mean([row["loss"] for row in rows[-20:]]) < 0.5 * np.mean([row["loss"] for row in rows[:20]])
    assert json.loads((tmp_path / "run" / "report.json").read_text())["figures"]["steps"] == 120
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("bigface").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"]


@pytest.mark.parametrize(
    ("cards", "processes", "here", "threads"),
    [(0, 8, 1, 8), (0, 8, 4, 4), (8, 8, 1, 2), (8, 4, 4, 4), (8, 32, 8, 2), (8, 1, 1, 16)],
)
def test_the_processes_of_a_node_share_its_cpus(cards, processes, here, threads, monkeypatch):
    """Of four nodes of 16 CPUs. With cards, the processes fill a node; without, they spread."""
    own = {"CPU": 16.0, "GPU": float(cards)} if cards else {"CPU": 16.0}
    nodes = [{"NodeID": str(number), "Alive": True, "Resources": own} for number in range(4)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "2"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    assert on_ray.worker_threads(processes, here) == threads


def without_a_cluster(monkeypatch, fit):
    """Ray Train's ``fit`` is the function given, and a worker that it calls is alone, in this process."""
    monkeypatch.setattr(on_ray, "worker_threads", lambda *_: 1)
    monkeypatch.setattr(stream, "blocks_by_ray", blocks_in_process)
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_local_world_size=lambda: 1))
    monkeypatch.setattr(on_ray, "drained_nodes", set)
    monkeypatch.setattr(ray.train, "report", lambda metrics: None)
    made = lambda work, train_loop_config, **more: SimpleNamespace(fit=lambda: fit(work, train_loop_config))  # noqa: E731
    monkeypatch.setattr(ray.train.torch, "TorchTrainer", made)


def test_a_worker_asks_ray_for_nothing_but_at_checkpoints(dataset, tmp_path, monkeypatch):
    """A call of Ray's actors took 7 ms with 8 workers and 173 ms with 64, so no step may make one."""
    steps, asked = [], []

    def fit(work, launch):
        return SimpleNamespace(return_value=work(launch))

    without_a_cluster(monkeypatch, fit)
    monkeypatch.setattr(ray.train, "report", lambda metrics: asked.append(metrics["step"]))
    for name in ("get_preemption_info", "get_checkpoint", "get_dataset_shard"):
        monkeypatch.setattr(ray.train, name, lambda *_: pytest.fail("a step asked Ray"))
    for name in ("get", "wait", "nodes"):
        monkeypatch.setattr(ray, name, lambda *_: pytest.fail("a step asked Ray"))
    real = loop.step
    monkeypatch.setattr(loop, "step", lambda *given: steps.append(1) or real(*given))
    given = [
        f"data.path={dataset}",
        "tracking.uri=off",
        "train.log_every=1",
        "train.save_every=8",
        "train.max_steps=20",
    ]
    train_on_ray(load_config("debug_bigface", given), tmp_path / "run", ScalingConfig())
    assert (len(steps), asked) == (20, [8, 16])


def test_a_mistake_that_a_worker_meets_is_told_by_the_driver_in_one_line(tmp_path, monkeypatch):
    root = write_dataset(tmp_path / "shards", 300, 10)
    flip_a_bit(root / "shard-00000.parquet", 5000)
    lives = []

    def fit(work, launch):
        with pytest.raises(UserError):
            work(launch)
        lives.append(work(launch))  # where Ray starts it again
        raise WorkerGroupError("a worker died", {0: RuntimeError("what Ray makes of it")})

    without_a_cluster(monkeypatch, fit)
    config = load_config("debug_bigface", [f"data.path={root}", "tracking.uri=off"])
    with pytest.raises(UserError, match=r"shard-00000\.parquet is damaged") as caught:
        train_on_ray(config, tmp_path / "run", ScalingConfig())
    assert "\n" not in str(caught.value)
    assert lives == [{}]
    assert not list((tmp_path / "run").glob(on_ray.MISTAKES))


def test_a_mistake_that_no_file_tells_is_found_among_what_ray_says(dataset, tmp_path, monkeypatch):
    def fit(work, launch):
        raise WorkerGroupError("workers died", {0: OSError("lost"), 1: UserError("the mend\nand Ray's own lines")})

    without_a_cluster(monkeypatch, fit)
    config = load_config("debug_bigface", [f"data.path={dataset}", "tracking.uri=off"])
    with pytest.raises(UserError, match=r"^the mend$"):
        train_on_ray(config, tmp_path / "run", ScalingConfig())


@pytest.mark.soak
@pytest.mark.ray
def test_a_mistake_inside_the_workers_comes_out_in_one_line(tmp_path):
    root = write_dataset(tmp_path / "shards", 300, 10)
    flip_a_bit(root / "shard-00000.parquet", 5000)
    config = load_config("debug_bigface", [f"data.path={root}", "tracking.uri=off"])
    with pytest.raises(UserError, match=r"shard-00000\.parquet is damaged") as caught:
        train_on_ray(config, tmp_path / "run", ScalingConfig())
    assert "\n" not in str(caught.value)


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("BIGFACE_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.soak
@pytest.mark.ray
def test_ctrl_c_leaves_no_process_behind(dataset, tmp_path):
    ray.shutdown()  # of the tests before: one node is enough for small machines
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "pipelines.cli", "train", "debug_bigface", f"data.path={dataset}"]
    command += ["train.epochs=1000", "train.max_steps=40000", "tracking.uri=off", "--out", str(tmp_path / "run")]
    environment = os.environ | {"BIGFACE_TEST_MARK": mark}
    environment.pop("RAY_ADDRESS", None)
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=output, stderr=output)
    try:
        while len(read_metrics(tmp_path / "run")) < 20:
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        assert len(marked(mark)) > 3
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130, log.read_text()
        deadline = time.monotonic() + 30
        while marked(mark) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert marked(mark) == []
    finally:
        for left in marked(mark):
            left.kill()
