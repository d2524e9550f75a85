"""What MLflow's page of a run tells, read back through MLflow's own client."""

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from fr_core.config.recipes import load_config
from fr_core.data.schema import open_dataset, sha256
from fr_core.data.synthetic import write_faces
from fr_core.train.metrics import COLUMNS
from fr_core.train.page import CHARTS, CHOOSE_VIEW, NO_CHARTS, NOTE, SECTIONS, headline
from fr_core.verify.pairs import write_pairs
from pipelines.train import train
from tests.helpers.runs import config_of


@pytest.fixture(scope="module")
def tracked(dataset, mlflow_database, tmp_path_factory):
    """A finished run of 4 steps in MLflow: its folder, its config and MLflow's client."""
    place = tmp_path_factory.mktemp("tracked")
    shutil.copy(mlflow_database, place / "mlflow.db")
    write_faces(place / "faces", 20, 2, size=32, workers=1)
    write_pairs(place / "faces", 10)
    pairs = [f"verify.images={place}/faces/images", f"verify.pairs={place}/faces/pairs.csv", "train.verify_every=2"]
    config = config_of(dataset, f"tracking.uri=sqlite:///{place}/mlflow.db", "train.max_steps=4", *pairs)
    train(config, place / "run", in_process=True, recipe="debug_bigface")
    return place / "run", config, MlflowClient(config.tracking.uri)


def mlflow_run(tracked):
    out, _, client = tracked
    return client.get_run(json.loads((out / "run.json").read_text())["run_id"])


def test_the_figures_are_those_of_the_report(tracked):
    metrics = mlflow_run(tracked).data.metrics
    figures = json.loads((tracked[0] / "report.json").read_text())["figures"]
    assert {name: value for name, value in metrics.items() if "/" not in name} == pytest.approx(figures)


def test_the_charts_that_people_look_at_first_come_first(tracked):
    """MLflow sorts sections by name."""
    _, _, client = tracked
    run = mlflow_run(tracked)
    sections = {name.split("/")[0] for name in run.data.metrics if "/" in name}
    assert min(sections) == "curves"
    points = {name: client.get_metric_history(run.info.run_id, f"curves/{name}") for name in ("loss", "lr", "accuracy")}
    assert [point.step for point in points["accuracy"]] == [2, 4]
    assert points["loss"]
    assert len(points["loss"]) == len(points["lr"])


def test_every_column_of_a_run_has_a_section():
    assert set(CHARTS) - {"accuracy"} == set(COLUMNS) - set(NO_CHARTS)
    assert sum(len(names) for names in SECTIONS.values()) == len(CHARTS)


def test_the_tags_say_what_was_trained_by_whom(tracked):
    out, config, _ = tracked
    tags = mlflow_run(tracked).data.tags
    origin = json.loads((out / "origin.json").read_text())
    facts = {"recipe": "debug_bigface", "method": "bigface", "data": config.data.path, "host": origin["host"]}
    assert facts.items() <= tags.items()
    assert tags["net"] == f"iresnet{config.net.depth} width {config.net.width}"
    assert tags["mlflow.user"] == origin["user"]
    assert origin["command"].startswith(tags["mlflow.source.name"])
    assert tags.get("commit", "") == tags.get("mlflow.source.git.commit", "") == origin["commit"]


def test_the_datasets_are_named_with_their_checksums(tracked):
    _, config, _ = tracked
    inputs = {one.tags[0].value: one.dataset for one in mlflow_run(tracked).inputs.dataset_inputs}
    dataset = open_dataset(config.data.path)
    assert dataset.stamp.startswith(inputs["training"].digest)
    assert json.loads(inputs["training"].profile) == {"identities": 40, "images": 1500}
    assert sha256(Path(config.verify.pairs)).startswith(inputs["verification"].digest)
    assert json.loads(inputs["verification"].source) == {"uri": config.verify.pairs}


def test_the_description_has_the_command_and_the_headline(tracked):
    """Also after the finished run was resumed, which trains nothing."""
    out, config, client = tracked
    figures = json.loads((out / "report.json").read_text())["figures"]
    command = json.loads((out / "origin.json").read_text())["command"]
    for _ in range(2):
        note = mlflow_run(tracked).data.tags[NOTE]
        assert command in note
        assert headline(figures) in note
        assert f"| images | {figures['images']:,} |" in note
        train(config, out, in_process=True, resume=True)
    assert client.get_experiment_by_name("bigface").tags[NOTE] == CHOOSE_VIEW


def test_headlines_by_hand():
    verified = {"accuracy": 0.8684, "accuracy_low": 0.82, "accuracy_high": 0.911, "pairs": 6000.0}
    tar = {"tar_at_far_1e-3": 0.2381, "tar_at_far_1e-3_low": 0.1, "tar_at_far_1e-3_high": 0.3}
    assert headline(verified | tar) == "**accuracy 86.8 %** (82.0 … 91.1), TAR@FAR 1e-3 0.238, on 6,000 pairs."
    assert headline({"steps": 1200, "loss": 3.25}) == "**loss 3.25** after 1,200 steps; no pairs to verify on."


def test_a_run_without_an_origin_is_tracked(dataset, tmp_path, mlflow_database):
    """One that the train loop alone started, or an earlier version."""
    from tests.helpers.runs import run

    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    config = load_config("debug_bigface", [f"data.path={dataset}", "train.max_steps=2"])
    run(config, tmp_path / "run")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [found] = client.search_runs([client.get_experiment_by_name("bigface").experiment_id])
    assert found.data.tags["method"] == "bigface"
    assert found.data.tags[NOTE].startswith("**loss")
