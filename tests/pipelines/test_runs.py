"""``bigface runs``: families of runs in MLflow, runs in folders, orders and filters."""

import json
import os
import shutil
import sqlite3
import time
from contextlib import closing, contextmanager
from datetime import datetime

import pytest
from typer.testing import CliRunner

from fr_core.config.sections import Tracking
from fr_core.errors import StorageError, UserError
from fr_core.nets.verifications import VERIFICATIONS
from fr_core.train import mlflow_runs
from fr_core.train.mlflow_runs import PARENT_TAG, open_mlflow
from pipelines.cli import app
from pipelines.cli.output import console
from pipelines.experiments.runs import COLUMNS, run_table, runs
from pipelines.experiments.states import OF_MLFLOW, STATES
from tests.helpers.commands import bigface

PARAMS = {"method.kind": "attfc", "net.kind": "iresnet", "net.depth": "50", "schedule.kind": "fastface"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, mlflow_database):
    """A search of two trials, a plain run, one that runs still, and a folder that MLflow knows nothing of."""
    root = tmp_path_factory.mktemp("runs")
    shutil.copy(mlflow_database, root)
    client, experiment = open_mlflow(Tracking(), root)

    def run(name, started, status="FINISHED", parent=None, params=PARAMS, **metrics):
        tags = {PARENT_TAG: parent} if parent else {}
        run_id = client.create_run(experiment, start_time=started * 1000, run_name=name, tags=tags).info.run_id
        for metric, value in metrics.items():
            client.log_metric(run_id, metric.replace("__", "-"), value)
        for key, value in params.items():
            client.log_param(run_id, key, value)
        if status != "RUNNING":
            client.set_terminated(run_id, status, end_time=(started + 90) * 1000)
        return run_id

    search = run("search", 1000, params={})
    run("trial_a", 1100, parent=search, accuracy=0.7, steps=40, loss=2.0)
    run("trial_b", 1200, "FAILED", parent=search, accuracy=0.9, tar_at_far_1e__3=0.5, steps=20, loss=1.0)
    run("plain", 2000, accuracy=0.8, steps=30, epochs=1.5, loss=3.0)
    run("going", 3000, "RUNNING", epoch=0.25)
    alone = root / "alone"
    alone.mkdir()
    config = {"method": {"kind": "dcq"}, "net": {"kind": "quantised", "weights": 8, "activations": 4}}
    config["net"]["net"] = {"kind": "iresnet", "depth": 18}
    (alone / "run.json").write_text(json.dumps({"run_id": None, "started": 2500.0, "config": config}))
    (alone / "report.json").write_text(json.dumps({"figures": {"steps": 7, "seconds": 120.0, "accuracy": 0.6}}))
    (root / "other").mkdir()
    (root / "other" / "run.json").write_text("[]")
    return root


def listed(tmp_path, *args):
    bigface("runs", *args, "--json", tmp_path / "runs.json")
    return json.loads((tmp_path / "runs.json").read_text())["runs"]


def test_newest_first_and_children_under_their_parent(folder, tmp_path):
    found = listed(tmp_path, folder)
    names = [(run["name"], run["depth"]) for run in found]
    assert names == [("going", 0), ("alone", 0), ("plain", 0), ("search", 0), ("trial_b", 1), ("trial_a", 1)]
    by_name = {run["name"]: run for run in found}
    assert (by_name["trial_b"]["method"], by_name["trial_b"]["net"], by_name["trial_b"]["schedule"]) == (
        "attfc",
        "iresnet50",
        "fastface",
    )
    assert by_name["trial_b"]["minutes"] == 1.5
    assert by_name["trial_b"]["figures"]["tar_at_far_1e-3"] == 0.5
    assert [by_name[name]["state"] for name in ("trial_b", "going", "alone")] == ["failed", "running", "finished"]
    assert (by_name["alone"]["net"], by_name["alone"]["minutes"]) == ("iresnet18 w8a4", 2.0)
    header, *rows = run_table(runs(folder, None, None, "", "started", 20))
    assert [row[0] for row in rows] == ["going", "alone", "plain", "search", "  trial_b", "  trial_a"]
    assert dict(zip(header, rows[4], strict=True)) == {
        "run": "  trial_b",
        "method": "attfc",
        "net": "iresnet50",
        "schedule": "fastface",
        "state": "failed",
        "steps": "20",
        "epochs": "",
        "accuracy": "0.9000",
        "TAR@1e-3": "0.5000",
        "minutes": "1.5",
        "started": f"{datetime.fromtimestamp(1200):%m-%d %H:%M}",
    }


def streams(*args):
    """Standard output and standard error of ``bigface runs``."""
    done = CliRunner().invoke(app, ["runs", *map(str, args)], catch_exceptions=False)
    return done.stdout, done.stderr


def test_a_pipe_gets_plain_lines_of_all_columns(folder):
    out, _ = streams(folder)
    header, *lines = out.splitlines()
    assert set(header.split()) == set(COLUMNS)
    assert [line.split()[0] for line in lines] == ["going", "alone", "plain", "search", "trial_b", "trial_a"]
    starts = [header.index(name) for name in header.split()]
    by_name = {line.split()[0]: [line[at:].split("  ")[0].strip() for at in starts] for line in lines}
    assert by_name["trial_b"][1:9] == ["attfc", "iresnet50", "fastface", "failed", "20", "-", "0.9000", "0.5000"]
    assert by_name["alone"][2] == "iresnet18 w8a4"  # one cell, as two spaces part columns


@pytest.mark.parametrize("columns", [80, 40, 20])
def test_a_narrow_terminal_shows_whole_columns_the_weightiest_first(folder, columns, monkeypatch):
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "_width", columns)
    out, _ = streams(folder)
    header, *lines = out.splitlines()[:7]
    note = " ".join(out.splitlines()[7:])
    assert len(lines) == 6
    assert all(len(line) <= columns for line in [header, *lines])
    weightiest = {80: 7, 40: 3, 20: 1}[columns]
    assert set(header.split()) >= set(COLUMNS[:weightiest])
    assert {*note.partition(": ")[2].split(", "), *header.split()} == set(COLUMNS)


def test_the_report_goes_to_standard_output_and_nothing_else_does(folder):
    out, err = streams(folder, "--json", "-")
    assert json.loads(out)["runs"][0]["name"] == "going"
    assert "6 runs: 1 running, 4 finished, 1 failed" in err


def test_best_first_a_family_by_its_best(folder, tmp_path):
    found = listed(tmp_path, folder, "--sort", "accuracy")
    assert [run["name"] for run in found] == ["search", "trial_b", "trial_a", "plain", "alone", "going"]
    found = listed(tmp_path, folder, "--sort", "loss", "--limit", "1")
    assert [run["name"] for run in found] == ["search", "trial_b", "trial_a"]  # the lowest loss


def write_run(out, run_id=None, **report):
    out.mkdir(parents=True)
    facts = {"run_id": run_id, "started": 2500.0, "config": {"method": {"kind": "dcq"}}}
    (out / "run.json").write_text(json.dumps(facts))
    if report:
        (out / "report.json").write_text(json.dumps({"figures": report}))
    return out


def cells(folder, column):
    header, *rows = run_table(runs(folder, None, None, "", "name", 20))
    return {row[0]: row[header.index(column)] for row in rows}


def test_runs_that_were_verified_later_show_their_scores(tmp_path, mlflow_database):
    """In MLflow as NAME/FIGURE, in the folder in verification.json, where the newest wins."""
    shutil.copy(mlflow_database, tmp_path)
    client, experiment = open_mlflow(Tracking(), tmp_path)
    ids = {name: client.create_run(experiment, run_name=name).info.run_id for name in ("by_mlflow", "by_folder")}
    client.log_metric(ids["by_mlflow"], "pairs/accuracy", 0.75)
    client.log_metric(ids["by_mlflow"], "pairs/tar_at_far_1e-3", 5e-7)
    client.log_metric(ids["by_folder"], "accuracy", 0.5)
    client.log_metric(ids["by_folder"], "pairs/accuracy", 0.625)
    for out in (write_run(tmp_path / "by_folder", ids["by_folder"]), write_run(tmp_path / "alone", accuracy=0.25)):
        entries = [{"threshold": 0.3, "figures": {"accuracy": accuracy}} for accuracy in (0.875, 0.9375)]
        (out / VERIFICATIONS).write_text(json.dumps({"verifications": entries}))
    assert cells(tmp_path, "accuracy") == {"alone": "0.9375", "by_folder": "0.9375", "by_mlflow": "0.7500"}
    assert cells(tmp_path, "TAR@1e-3") == {"alone": "", "by_folder": "", "by_mlflow": "5e-07"}
    assert [run["name"] for run in listed(tmp_path, tmp_path, "--sort", "accuracy")][-1] == "by_mlflow"


def test_one_word_for_each_state(tmp_path, mlflow_database):
    from mlflow.entities import RunStatus

    assert set(OF_MLFLOW) == set(map(RunStatus.to_string, RunStatus.all_status()))
    assert set(OF_MLFLOW.values()) < set(STATES)
    shutil.copy(mlflow_database, tmp_path)
    client, experiment = open_mlflow(Tracking(), tmp_path)
    client.set_terminated(client.create_run(experiment, run_name="left").info.run_id, "KILLED")
    write_run(tmp_path / "done", steps=1)
    for name, age in (("going", 1), ("gone", 1000)):
        metrics = write_run(tmp_path / name) / "metrics.csv"
        metrics.touch()
        os.utime(metrics, (time.time() - age,) * 2)
    write_run(tmp_path / "unborn")
    told = {"done": "finished", "going": "running", "gone": "interrupted", "left": "stopped", "unborn": "interrupted"}
    assert cells(tmp_path, "state") == told
    assert {run["name"]: run["state"] for run in listed(tmp_path, tmp_path)} == told


def test_a_killed_a_verified_and_a_replaced_run_from_any_folder(tmp_path, mlflow_database):
    root = tmp_path / "runs"
    root.mkdir()
    shutil.copy(mlflow_database, root)
    shutil.copy(mlflow_database, tmp_path)
    client, experiment = open_mlflow(Tracking(), root)
    names = ("killed", "verified", "new", "new")
    ids = [client.create_run(experiment, start_time=2_500_000, run_name=name).info.run_id for name in names]
    metrics = write_run(root / "killed", ids[0]) / "metrics.csv"
    metrics.touch()
    for file in (metrics, root / "killed" / "run.json"):
        os.utime(file, (2560, 2560))
    write_run(root / "verified", ids[1], seconds=12.0)
    client.set_terminated(ids[1], "FINISHED", end_time=9_000_000)
    client.set_terminated(ids[2], "FINISHED", end_time=2_600_000)
    write_run(root / "new", ids[3])
    told = {"killed": "interrupted", "new": "running", "verified": "finished"}
    for folder in (root, tmp_path):
        assert cells(folder, "state") == told
        assert len(run_table(runs(folder, None, None, "", "name", 20))) == 4
        minutes = cells(folder, "minutes")
        assert (minutes["killed"], minutes["verified"]) == ("1.0", "0.2")
    alone = runs(root / "verified", None, None, "", "name", 20)
    assert [(run.name, run.state) for run in alone] == [("verified", "finished")]
    assert "1 run: 1 finished" in bigface("runs", root / "verified")


def test_a_child_without_its_parent_stands_alone(folder, tmp_path):
    found = listed(tmp_path, folder, "--filter", "metrics.accuracy > 0.75")
    assert [(run["name"], run["depth"]) for run in found] == [("plain", 0), ("trial_b", 0)]
    found = listed(tmp_path, "--uri", f"sqlite:///{folder}/mlflow.db", "--experiment", "bigface")
    assert "alone" not in [run["name"] for run in found]


@pytest.mark.parametrize(
    ("args", "mend"),
    [
        (["nowhere"], "no folder of runs: give another, or --uri"),
        (["--sort", "acuracy"], "no run has this figure: did you mean accuracy"),
        (["--sort", "acc"], "no run has this figure: did you mean accuracy"),
        (["--sort", "xyz"], "no run has this figure: use one of started, name, "),
        (["--filter", "accuracy?"], "Invalid.*write it like --filter"),
        (["--experiment", "other"], "no experiment 'other': give --experiment"),
        (["--uri", "sqlite:///nowhere.db"], "no such database"),
    ],
)
def test_mistakes(folder, args, mend):
    place = [] if args[0] in ("nowhere", "--uri") else [folder]
    with pytest.raises(UserError, match=mend) as caught:
        bigface("runs", *place, *args)
    assert "\n" not in str(caught.value)


@contextmanager
def locked(file):
    """Another program writes the database."""
    with closing(sqlite3.connect(file, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        yield


def test_a_locked_database_costs_a_warning_where_folders_know_the_runs(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(mlflow_runs, "LOCK_WAIT", 0.1)
    with locked(folder / "mlflow.db"):
        assert [run["name"] for run in listed(tmp_path, folder)] == ["alone"]
        assert caplog.messages[-1] == (
            f"runs are shown as their folders tell: sqlite:///{folder}/mlflow.db: "
            "another program has locked it: try again when that has ended"
        )
        for asked in (
            ["runs", folder, "--filter", "params.`net.kind` = 'x'"],
            ["runs", "--uri", f"sqlite:///{folder}/mlflow.db"],
        ):
            with pytest.raises(StorageError, match=r"mlflow\.db: another program has locked it"):
                bigface(*asked)


def test_a_half_made_database_is_one_line_and_gets_no_tables(tmp_path):
    (tmp_path / "mlflow.db").touch()
    with pytest.raises(StorageError, match=r"mlflow\.db: no whole database of MLflow"):
        bigface("runs", tmp_path)
    with pytest.raises(StorageError, match=r"mlflow\.db: no whole database of MLflow"):
        bigface("scaling", "--uri", f"sqlite:///{tmp_path}/mlflow.db")
    assert (tmp_path / "mlflow.db").stat().st_size == 0
