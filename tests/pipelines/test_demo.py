"""The first command that a user runs, on few people and for few steps."""

import json

import pytest

from pipelines import demo

SMALL = {"IDENTITIES": 12, "SHOTS": 4, "UNSEEN_IDENTITIES": 20, "UNSEEN_SHOTS": 2, "PAIRS_PER_FOLD": 2}


@pytest.mark.ray
def test_the_demo_leaves_a_report_with_its_floors_and_pictures(tmp_path, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(demo, name, value)
    said = []
    overrides = ["train.max_steps=2", "train.log_every=1", "train.global_batch=16", "tracking.uri=off"]
    figures = demo.demo(tmp_path, 1, "demo", overrides, said.append)
    assert json.loads((tmp_path / "report.json").read_text())["figures"] == figures
    floors = {f"{name}_accuracy" for name in ("raw_pixel", "colour_histogram", "untrained", "trained")}
    stages = {f"seconds_{name}" for name in ("synth", "ingest", "train", "verify")}
    own = {"accuracy", "tar_at_far_1e-1", "workers", "images_per_second", "unseen_identities"}
    assert floors | stages | own <= set(figures)
    assert figures["accuracy"] == figures["trained_accuracy"]
    assert (figures["identities"], figures["images"], figures["steps"], figures["pairs"]) == (12, 48, 2, 40)
    pictures = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert {"faces.png", "roc_against_floors.png", "sample_batch.png", "curves.png"} <= pictures
    assert len(said) == 8
