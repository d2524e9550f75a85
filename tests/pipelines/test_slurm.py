"""The Slurm script: two raylets of this machine in place of two nodes, and a stand-in for srun."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fr_core.nets.checkpoint_files import checkpoints
from fr_core.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "pipelines/cluster/slurm.sbatch"
# On one machine nodes share Ray's folder, where the second may take no socket's name that the first is about to take.
SRUN = f"""#!{sys.executable}
import glob, os, signal, subprocess, sys, time
words = sys.argv[1:]
options = dict(words.pop(0).partition("=")[::2] for word in list(words) if words[0].startswith("-"))
assert set(options) == {{"--overlap", "--ntasks", "--cpus-per-task"}}
tasks = []
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
for node in range(int(options["--ntasks"])):
    while node and tasks[0].poll() is None and not glob.glob(os.environ["SOCKETS"]):
        time.sleep(0.5)
    if not node or tasks[0].poll() is None:
        tasks.append(subprocess.Popen(words, env=os.environ | {{"SLURM_NODEID": str(node)}}))
sys.exit(max(task.wait() != 0 for task in tasks))
"""


@contextmanager
def submitted(folder, log, *words):
    """A job of two nodes that runs the script."""
    folder.mkdir(exist_ok=True)
    (folder / "srun").write_text(SRUN)
    (folder / "srun").chmod(0o755)
    job = str(os.getpid())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"SLURM_JOB_ID": job, "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "2"}
    environment |= {"SOCKETS": f"/tmp/bigface-{job}/session_2*/sockets/raylet"}
    environment |= {"BIGFACE_ENV": str(Path(sys.executable).parents[1])}
    environment |= {"RAY_raylet_start_wait_time_s": "400", "BIGFACE_LOG": "text"}  # a busy machine
    with log.open("w") as file:
        script = subprocess.Popen(["bash", SCRIPT, *map(str, words)], env=environment, stdout=file, stderr=file)
    try:
        yield script
    finally:
        family = psutil.Process(script.pid).children(recursive=True) if script.poll() is None else []
        for one in [*family, script]:
            one.kill()
        script.wait()
        shutil.rmtree(f"/tmp/bigface-{job}", ignore_errors=True)


def training(dataset, out):
    return ["train", "debug_bigface", f"data.path={dataset}", "tracking.uri=off", "train.epochs=10", "--out", out]


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_nodes_train_stop_in_time_and_go_on(dataset, tmp_path):
    """Slurm's SIGTERM reaches the script alone; the run saves its step, and the job ends with the cluster."""
    out, log = tmp_path / "run", tmp_path / "log"
    asked = [*training(dataset, out), "train.max_steps=200", "train.save_every=150", "--workers", "2"]
    with submitted(tmp_path / "slurm", log, *asked) as script:
        while not (out / "metrics.csv").is_file() or len(read_metrics(out)) < 20:
            assert script.poll() is None, log.read_text()
            time.sleep(0.2)
        script.send_signal(signal.SIGTERM)
        assert script.wait(300) == 143, log.read_text()
    (saved,) = checkpoints(out)
    assert "step_00000020" <= saved.name < "step_00000150"
    with submitted(tmp_path / "slurm", log, *asked, "--resume") as script:
        assert script.wait(600) == 0, log.read_text()
    figures = json.loads((out / "report.json").read_text())["figures"]
    assert (figures["steps"], figures["workers"]) == (200, 2)
    assert [row["step"] for row in read_metrics(out)] == list(range(1, 201))
    assert "Draining" in log.read_text()  # both raylets ended


@pytest.mark.ray
@pytest.mark.soak
def test_a_head_that_does_not_start_ends_the_job(tmp_path):
    log = tmp_path / "log"
    with submitted(tmp_path / "slurm", log, "knobs") as script:
        while not (steps := [one for one in psutil.Process(script.pid).children() if "srun" in str(one.cmdline())]):
            assert script.poll() is None, log.read_text()
        steps[0].terminate()
        assert script.wait(120) != 0


def test_the_script_is_one_that_bash_reads():
    assert subprocess.run(["bash", "-n", SCRIPT], capture_output=True).returncode == 0
    asked = set(re.findall(r"^#SBATCH (--[\w-]+)=?", SCRIPT.read_text(), re.MULTILINE))
    assert asked >= {"--nodes", "--ntasks-per-node", "--exclusive", "--signal"}
