"""The places of a run's figures, and the signs that it goes on."""

import logging
import os
import threading
import time

import pytest
from mlflow import MlflowClient

from fr_core.config import Config
from fr_core.config.recipes import load_config
from fr_core.data.stream import Batch
from fr_core.train import tracking
from fr_core.train.tracking import Tracker
from pipelines import train


def test_a_database_keeps_its_files_beside_it(tmp_path, monkeypatch, capfd):
    """Nothing is written to the caller's folder, where MLflow would make ``mlruns`` by default."""
    (tmp_path / "caller").mkdir()
    (tmp_path / "store").mkdir()
    monkeypatch.chdir(tmp_path / "caller")
    uri = f"sqlite:///{tmp_path}/store/x.db"
    config = load_config("debug_bigface", [f"tracking.uri={uri}"])
    tracker = Tracker(config, tmp_path / "runs" / "a", 0, None)
    tracker.log_file("run.json")
    tracker.close("FINISHED")
    assert not list((tmp_path / "caller").iterdir())
    found = list((tmp_path / "store" / "mlartifacts").rglob("run.json"))
    assert len(found) == 1
    experiment = MlflowClient(uri).get_experiment_by_name("bigface")
    assert "INFO mlflow" not in capfd.readouterr().err
    assert experiment.artifact_location == f"file://{tmp_path}/store/mlartifacts"


def test_restarts_are_counted(tmp_path):
    """By any start of the run, whoever starts it; the moment of the first stays."""
    trackers = [Tracker(Config(tracking={"uri": "off"}), tmp_path, 0, None) for _ in range(3)]
    assert [tracker.health() for tracker in trackers] == [{"restarts": n, "undelivered": 0} for n in range(3)]
    assert len({tracker.started for tracker in trackers}) == 1


def test_the_first_step_is_seen_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Tracker, "_log_sample_batch", lambda tracker, batch: None)
    tracker = Tracker(Config(tracking={"uri": "off"}), tmp_path, 0, None)
    for seen in (True, False):
        os.utime(tmp_path / "metrics.csv", (1, 1))
        tracker.step_done(Batch(0, None, None, None, None))
        assert (train.last_touched(tmp_path) > 1e9) == seen


def test_steps_between_two_rows_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "BEAT_EVERY", 0.0)
    monkeypatch.setattr(Tracker, "_log_sample_batch", lambda tracker, batch: None)
    tracker = Tracker(Config(tracking={"uri": "off"}), tmp_path, 0, None)
    tracker.step_done(Batch(0, None, None, None, None))
    os.utime(tmp_path / "metrics.csv", (1, 1))
    assert train.last_touched(tmp_path) == 1e9
    tracker.step_done(Batch(0, None, None, None, None))
    assert train.last_touched(tmp_path) > 1e9


@pytest.mark.parametrize("steps_are_taken", [True, False])
def test_only_a_run_that_takes_no_step_is_called_silent(tmp_path, monkeypatch, caplog, steps_are_taken):
    """A slow run that logs every 50 steps writes no row for long, but it touches its metrics.csv."""
    monkeypatch.setattr(train, "POLL", 0.02)
    monkeypatch.setattr(train, "SILENCE", 0.5)
    (tmp_path / "metrics.csv").touch()
    over = threading.Event()

    def touch():
        while steps_are_taken and not over.wait(0.02):
            os.utime(tmp_path / "metrics.csv")

    toucher = threading.Thread(target=touch)
    toucher.start()
    with caplog.at_level(logging.WARNING, "bigface"), train.progress_line(tmp_path, 100):
        time.sleep(1.5)
    over.set()
    toucher.join()
    assert ("no step for" in caplog.text) != steps_are_taken
