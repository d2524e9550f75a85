import json
import shutil

import pytest

from fr_core.config.recipes import load_config
from fr_core.config.sections import Tracking
from fr_core.errors import UserError
from fr_core.train.initial import parameter_figures
from fr_core.train.mlflow_runs import COMPARISON_TAG, open_mlflow
from pipelines.experiments.scaling import parameter_count, run_of
from tests.helpers.commands import bigface, figures

COUNTS = {"backbone_parameters": 900, "classifier_parameters": 100}


def power(size):
    return 20 * size**-0.5


def write_run(folder, size, error, **more):
    """A finished run's report."""
    folder.mkdir(parents=True)
    found = {"backbone_parameters": size - 100, "classifier_parameters": 100, "identities": 10, "accuracy": 1 - error}
    (folder / "report.json").write_text(json.dumps({"figures": found | more, "config": {}}))
    return folder


@pytest.fixture
def folders(tmp_path):
    return [write_run(tmp_path / f"run{size}", size, power(size)) for size in (16000, 1000, 4000, 4000 + 96000)]


def test_runs_on_the_disk(folders, tmp_path):
    perfect = write_run(tmp_path / "perfect", 2000, 0.0)
    (tmp_path / "unfinished").mkdir()
    given = [*folders, perfect, tmp_path / "unfinished"]
    output = bigface(
        "scaling", *given, "--predict", "1M", "--out", tmp_path / "law.png", "--json", tmp_path / "law.json"
    )
    found = figures(tmp_path / "law.json")
    assert (found["runs"], found["left_out"], found["predicted_parameters"]) == (4, 2, 1_000_000)
    assert (found["exponent"], found["prefactor"], found["offset"]) == pytest.approx((0.5, 20, 0))
    assert found["predicted_error"] == pytest.approx(0.02)
    assert found["predicted_error_low"] <= found["predicted_error"] <= found["predicted_error_high"]
    report = json.loads((tmp_path / "law.json").read_text())
    assert [run["parameters"] for run in report["runs"]] == [1000, 4000, 16000, 100_000]
    reasons = [reason for _, reason in report["left_out"]]
    assert "its error is 0" in reasons[0]
    assert "no report of a finished training" in reasons[1]
    assert "These runs show no offset" in output
    assert (tmp_path / "law.png").stat().st_size > 1000


def test_runs_in_mlflow(tmp_path, mlflow_database):
    """Metrics as runs log them now; one older run, whose report its artifacts hold; and runs that are no points."""
    shutil.copy(mlflow_database, tmp_path)
    client, experiment = open_mlflow(Tracking(), tmp_path)

    def run(name, status="FINISHED", tags=None, report=None, **metrics):
        run_id = client.create_run(experiment, run_name=name, tags={"set": "a"} | (tags or {})).info.run_id
        for metric, value in metrics.items():
            client.log_metric(run_id, metric.replace("__", "/"), value)
        if report:
            client.log_artifact(run_id, str(report / "report.json"))
        client.set_terminated(run_id, status)

    config = load_config("debug_bigface")
    counted = parameter_figures(config, 40)
    size = sum(counted.values())
    older = tmp_path / "older"
    older.mkdir()
    facts = {"figures": {"identities": 40, "accuracy": 0.5}, "config": config.model_dump(mode="json")}
    (older / "report.json").write_text(json.dumps(facts))
    for factor, seed in ((2, 0), (4, 0), (4, 1)):
        counts = {name: count * factor for name, count in counted.items()}
        run(f"new{factor}-{seed}", **counts, accuracy=0.1, lfw__accuracy=1 - power(factor * size))
    run("older", report=older, lfw__accuracy=1 - power(size))
    run("half-way", "FAILED", **COUNTS, lfw__accuracy=0.5)
    run("comparison", tags={COMPARISON_TAG: "key"})
    run("elsewhere", tags={"set": "b"}, **COUNTS, lfw__accuracy=0.5)
    run("lost", lfw__accuracy=0.5)
    run("diverged", **COUNTS, lfw__accuracy=float("nan"))
    given = ["scaling", "--uri", f"sqlite:///{tmp_path}/mlflow.db", "--figure", "lfw/accuracy"]
    bigface(*given, "--filter", "tags.set = 'a'", "--json", tmp_path / "law.json")
    found = figures(tmp_path / "law.json")
    assert (found["runs"], found["left_out"], found["predicted_parameters"]) == (4, 2, 8 * size)
    assert (found["exponent"], found["predicted_error"]) == pytest.approx((0.5, power(8 * size)))
    report = json.loads((tmp_path / "law.json").read_text())
    assert [run["name"] for run in report["runs"]] == ["older", "new2-0", "new4-0", "new4-1"]
    assert dict(report["left_out"])["lost"] == "no report.json among its artifacts"
    assert "its error is nan" in dict(report["left_out"])["diverged"]
    with pytest.raises(UserError, match=r"sqlite.*mlflow\.db: Invalid"):
        bigface(*given, "--filter", "set is a")
    with pytest.raises(UserError, match="no experiment 'other'"):
        bigface(*given, "--experiment", "other")


@pytest.mark.parametrize(
    ("figure", "error"),
    [
        *((name, 0.75) for name in ("accuracy", "suite/lfw_accuracy", "IJBC/tar_at_far_1e-4", "gallery_g1_rank_5")),
        *((name, 0.25) for name in ("masks/mfr", "standard_fnmr_at_fmr_1e-5", "loss")),
    ],
)
def test_shares_and_errors(figure, error):
    assert run_of("a", COUNTS | {figure: 0.25}, figure).error == error


@pytest.mark.parametrize(
    ("text", "count"), [("600M", 6e8), ("1.2e9", 1.2e9), ("1.2G", 1.2e9), ("3B", 3e9), ("5k", 5e3)]
)
def test_numbers_of_parameters(text, count):
    assert parameter_count(text) == pytest.approx(count)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--figure", "threshold"], "--figure threshold: not a share"),
        (["--figure", "accuracy_std"], "not a share"),
        (["--figure", "mfr"], "to the 0 sizes here; 4 runs are left out, such as .*run16000: no figure mfr"),
        (["--filter", "tags.a = 'b'"], "--filter asks MLflow, not folders"),
        *((["--predict", text], "not a number of parameters") for text in ("", "M", "many", "-1M", "nan", "inf", "0")),
    ],
)
def test_mistakes(folders, options, message):
    with pytest.raises(UserError, match=message):
        bigface("scaling", *folders, *options)


def test_no_database_is_made(tmp_path):
    with pytest.raises(UserError, match="no such database"):
        bigface("scaling", "--uri", f"sqlite:///{tmp_path}/mlflow.db")
    assert not list(tmp_path.iterdir())
