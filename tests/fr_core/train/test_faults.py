"""Faults that may hit a run: signals, a kill, damaged or unwritable checkpoints, a full disk, MLflow away."""

import itertools
import json
import multiprocessing as mp
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from urllib.request import urlopen

import pytest
import torch

import fr_core.train.loop as loop
import fr_core.train.outbox as outbox
import fr_core.train.tracking as tracking
from fr_core.data.stream import blocks_in_process
from fr_core.errors import RunStopped, UserError
from fr_core.nets.checkpoint_files import checkpoints
from fr_core.nets.open import open_net
from fr_core.ranks import Ranks
from fr_core.train.notice import Notice
from tests.helpers.commands import bigface
from tests.helpers.datasets import flip_a_bit
from tests.helpers.killed import run_until_killed
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import config_of, last_weights, losses, run


def equal(one, other):
    ours, theirs = last_weights(one), last_weights(other)
    return losses(one) == losses(other) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    """A run of 20 steps with a checkpoint every five."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    run(config_of(dataset, "train.save_every=5", "train.keep=4"), out)
    return out


def cut(undisturbed, out, at):
    """Copy the run as it was at a step."""
    shutil.copytree(undisturbed, out)
    for folder in checkpoints(out):
        if int(folder.name[5:]) > at:
            shutil.rmtree(folder)
    return out


# SIGTERM


def signalled(number, out, *command):
    """Send a signal to a command after its first step; return its exit code and standard error."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *command],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore SIGINT
    )
    while not losses(out):
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


def test_sigterm_saves_and_leaves_and_the_run_goes_on_bit_for_bit(dataset, undisturbed, tmp_path, mlflow_database):
    from mlflow import MlflowClient

    out = tmp_path / "run"
    shutil.copy(mlflow_database, tmp_path)
    command = ["train", "debug_bigface", f"data.path={dataset}", "data.lanes=8", "--in-process", "--out", str(out)]
    code, said = signalled(signal.SIGTERM, out, *command)
    step = len(losses(out))
    assert code == 143
    assert said.strip().splitlines()[-1] == f"bigface: stopped at step {step}: --resume continues the run"
    assert step < 20
    assert checkpoints(out)[-1].name == f"step_{step:08d}"
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert client.get_run(json.loads((out / "run.json").read_text())["run_id"]).info.status == "KILLED"
    bigface(*command, "--resume")
    assert equal(out, undisturbed)


def test_ctrl_c_is_an_exit_code_and_no_traceback(dataset, tmp_path):
    out = tmp_path / "run"
    command = ["train", "debug_bigface", f"data.path={dataset}", "tracking.uri=off", "--in-process", "--out", str(out)]
    code, said = signalled(signal.SIGINT, out, *command, "train.epochs=10", "train.max_steps=400")
    assert code == 130
    begun, *others = said.splitlines()
    assert "training" in begun
    assert all("progress" in line or "first step done" in line for line in others)  # of a slow machine


def save_at_four_and_leave_at_eight(ranks, config, out):
    """Only rank 0 gets the notice to save, only rank 1 the notice to stop."""
    steps, own = itertools.count(1), [{4: Notice.SAVE}, {8: Notice.STOP}][ranks.rank]
    try:
        loop.train_loop(
            config, out, ranks, blocks_in_process, lambda *_: None, lambda: own.get(next(steps), Notice.NONE)
        )
    except RunStopped as left:
        return left.step


def test_ranks_agree_when_to_save_and_when_to_leave(dataset, tmp_path):
    config = config_of(dataset, "train.log_every=3")
    assert run_ranks(2, save_at_four_and_leave_at_eight, config, tmp_path) == [8, 8]
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000004", "step_00000008"]


# Damaged checkpoints


def flipped_weights(folder):
    flip_a_bit(folder / "backbone.safetensors", -1)


def truncated(folder):
    path = folder / "head_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_optimiser(folder):
    (folder / "backbone_state_00000.safetensors").unlink()


def bad_json(folder):
    (folder / "checkpoint.json").write_text('{"format": 1, "fil')


def flipped_digit(folder):
    path = folder / "checkpoint.json"
    path.write_text(path.read_text().replace('"step": 20', '"step": 21'))


@pytest.mark.parametrize("damage", [flipped_weights, truncated, no_optimiser, bad_json, flipped_digit])
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_gone_on_from(
    dataset, undisturbed, tmp_path, damage, caplog
):
    out = cut(undisturbed, tmp_path / "run", 20)
    damage(out / "checkpoints" / "step_00000020")
    run(config_of(dataset, "train.save_every=5"), out)
    assert equal(out, undisturbed)
    [said] = [record.message for record in caplog.records if "damaged" in record.message]
    assert "step_00000020" in said
    assert said.endswith("going on from step_00000015")
    assert [path.name[-2:] for path in checkpoints(out)] == ["10", "15", "20"]


def test_nothing_whole_is_a_mistake_and_not_a_new_start(dataset, undisturbed, tmp_path):
    out = cut(undisturbed, tmp_path / "run", 20)
    for folder in checkpoints(out):
        flipped_weights(folder)
    for _ in range(2):  # the first attempt changes nothing
        with pytest.raises(UserError, match=r"no whole checkpoint in .*step_00000020/backbone\.safetensors: wrong"):
            run(config_of(dataset), out)
    with pytest.raises(UserError, match=r"step_00000020/backbone\.safetensors: wrong checksum"):
        open_net(out)


def resumed_at(ranks, config, out):
    return loop.resume_or_init(config, out, ranks, blocks_in_process).step


def test_all_ranks_fall_back_where_one_finds_damage(dataset, tmp_path):
    config = config_of(dataset, "train.max_steps=4", "train.save_every=2")
    run_ranks(2, run_on, config, tmp_path)
    flip_a_bit(tmp_path / "checkpoints" / "step_00000004" / "head_00001.safetensors", -1)
    assert run_ranks(2, resumed_at, config, tmp_path) == [2, 2]
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000002"]


def run_on(ranks, config, out):
    run(config, out, ranks)


# Full disks


@pytest.fixture
def small_disk(tmp_path):
    """A separate disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder, leave):
    free = shutil.disk_usage(folder).free
    (folder / "ballast").write_bytes(b"\0" * (free - leave))


def test_a_checkpoint_that_does_not_fit_leaves_the_others_and_the_run_goes_on_later(
    dataset, undisturbed, small_disk, tmp_path, mlflow_database
):
    from mlflow import MlflowClient

    shutil.copy(mlflow_database, tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = config_of(dataset, "train.save_every=5", f"tracking.uri={uri}")
    out = cut(undisturbed, small_disk / "run", 5)
    fill(small_disk, 150_000)
    with pytest.raises(UserError, match=r"cannot write checkpoint .*step_00000010 of [\d,]+ bytes: No space left on"):
        run(config, out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000005"]
    client = MlflowClient(uri)
    assert client.get_run(json.loads((out / "run.json").read_text())["run_id"]).info.status == "FAILED"
    (small_disk / "ballast").unlink()
    run(config, out)
    assert equal(out, undisturbed)


def test_room_is_made_once_by_dropping_the_oldest(dataset, undisturbed, small_disk, caplog):
    out = cut(undisturbed, small_disk / "run", 15)
    fill(small_disk, 150_000)
    run(config_of(dataset, "train.save_every=5"), out)
    assert equal(out, undisturbed)
    assert [path.name[-2:] for path in checkpoints(out)] == ["10", "15", "20"]
    assert "step_00000005 to make room" in caplog.text


def test_figures_on_a_full_disk_are_one_line_and_no_half_row(dataset, undisturbed, small_disk):
    out = cut(undisturbed, small_disk / "run", 5)
    tracker = tracking.Tracker(config_of(dataset), out, 5, None)
    fill(small_disk, 4096)
    row = {"epoch": 0.1, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "head_grad_norm": 1.0, "data_wait": 0.1}
    with pytest.raises(UserError, match=r"cannot write .*metrics\.csv: No space left"):
        list(map(tracker.log, range(6, 1000), itertools.repeat(row)))
    text = (out / "metrics.csv").read_text()
    assert text.endswith("\n")
    assert len(losses(out)) == len(text.splitlines()) - 1
    (small_disk / "ballast2").write_bytes(b"\0" * shutil.disk_usage(small_disk).free)
    with pytest.raises(UserError, match=r"cannot write .*curves\.png: .+"):
        tracker.log_curves()
    assert not list((out / "pictures").glob("*.part"))


# SIGKILL in the middle of a checkpoint


@pytest.mark.parametrize("moment", [6, 10, 13])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(dataset, undisturbed, tmp_path, moment):
    out = cut(undisturbed, tmp_path / "run", 5)
    killed = mp.get_context("forkserver").Process(target=run_until_killed, args=(dataset, out, moment))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    run(config_of(dataset, "train.save_every=5"), out)
    assert equal(out, undisturbed)
    assert not list(out.rglob("*.part"))
    assert len(list((out / "checkpoints").iterdir())) == 3


# MLflow away

SERVER = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]


@contextmanager
def mlflow_server(folder, port):
    """Run a real server, with its database in the folder."""
    place = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "files")]
    process = subprocess.Popen(
        [sys.executable, *SERVER, "--port", str(port), *place],
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while True:
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            assert process.poll() is None
            time.sleep(0.1)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_figures_wait_for_a_server_that_is_away_and_are_delivered_in_order(
    dataset, tmp_path, monkeypatch, mlflow_database
):
    """The server is away in the first start of the run, there in the second, away in the third, there in the last."""
    from mlflow import MlflowClient

    monkeypatch.setattr(outbox, "RETRY_AFTER", 0.2)
    monkeypatch.setattr(tracking, "FLUSH_EVERY", 0.0)
    shutil.copy(mlflow_database, tmp_path / "server.db")
    port, out = free_port(), tmp_path / "run"
    config = config_of(dataset, f"tracking.uri=http://127.0.0.1:{port}", "train.save_every=6")

    def steps(number, wait):
        monkeypatch.setattr(outbox, "LAST_WAIT", wait)
        asked = itertools.count(1)
        notice = lambda: Notice.STOP if next(asked) == number else Notice.NONE  # noqa: E731
        with pytest.raises(RunStopped):
            loop.train_loop(config, out, Ranks(), blocks_in_process, lambda *_: None, notice)

    steps(6, 1.0)  # six steps without a server
    kept = (out / "undelivered.jsonl").read_text().splitlines()
    assert [json.loads(line)[0] for line in kept[:2]] == ["tags", "params"]
    assert len(losses(out)) == 6
    with mlflow_server(tmp_path, port):
        steps(6, 60.0)  # six more with one
        assert not (out / "undelivered.jsonl").exists()
    steps(4, 1.0)  # and four without
    with mlflow_server(tmp_path, port):
        monkeypatch.setattr(outbox, "LAST_WAIT", 60.0)
        run(config, out)
        client = MlflowClient(config.tracking.uri)
        run_id = json.loads((out / "run.json").read_text())["run_id"]
        found = client.get_run(run_id)
        assert found.info.status == "FINISHED"
        assert found.data.params["optim.lr"] == "0.05"
        assert [m.step for m in client.get_metric_history(run_id, "curves/loss")] == list(range(1, 21))
        names = {a.path for folder in (None, "pictures") for a in client.list_artifacts(run_id, folder)}
        assert {"report.json", "pictures/curves.png", "pictures/sample_batch.png"} <= names
        assert len(client.search_runs([found.info.experiment_id])) == 1
        assert [model.step for model in found.outputs.model_outputs] == [20]
    assert not (out / "undelivered.jsonl").exists()


def test_an_address_that_can_never_work_is_a_mistake(dataset, tmp_path):
    (tmp_path / "file").touch()
    for uri in ("nonsense://x", f"sqlite:///{tmp_path}/file/mlflow.db"):
        with pytest.raises(UserError, match=r"tracking\.uri = "):
            run(config_of(dataset, f"tracking.uri={uri}"), tmp_path / "run")
