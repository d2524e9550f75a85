"""What a launch refuses, and what it says before and after a training."""

import logging
import os
import threading
import time

import pytest

from fr_core.config import lane_count
from fr_core.config.recipes import load_config
from fr_core.data.schema import open_dataset
from fr_core.errors import UserError
from fr_core.verify.pairs import write_pairs
from pipelines import train
from tests.helpers.datasets import write_dataset
from tests.helpers.runs import config_of


def test_options_and_folders_that_contradict_are_refused(dataset, tmp_path):
    config = config_of(dataset, "train.max_steps=2")
    with pytest.raises(UserError, match="leave out one of them"):
        train.train(config, tmp_path / "run", in_process=True, resume=True, overwrite=True)
    shards = write_dataset(tmp_path / "shards", 100, 10)
    with pytest.raises(
        UserError, match=r"holds data or other folders, such as identities.parquet: give a new or empty folder"
    ):
        train.train(config, shards, in_process=True)
    (tmp_path / "run" / "ray").mkdir(parents=True)
    (tmp_path / "run" / "pruned.safetensors").touch()
    train.train(config, tmp_path / "run", in_process=True)


def test_a_resumed_run_keeps_its_lanes_though_the_default_is_another(dataset, tmp_path):
    """The checkpoint's 8 stand for the default of an earlier version; the recipe's batch of 32 has 32 by default."""
    train.train(config_of(dataset, "train.max_steps=2"), tmp_path / "run", in_process=True)
    given = [f"data.path={dataset}", "tracking.uri=off", "train.max_steps=3"]
    stated = load_config("debug_bigface", [*given, "data.lanes=16"])
    with pytest.raises(UserError, match=r"cannot resume, data\.lanes differs: 8 there, 16 now"):
        train.train(stated, tmp_path / "run", in_process=True, resume=True)
    default = load_config("debug_bigface", given)
    assert lane_count(default) == 32
    assert train.train(default, tmp_path / "run", in_process=True, resume=True)["steps"] == 3
    assert lane_count(train.with_saved_lanes(default, tmp_path / "run")) == 8
    assert train.with_saved_lanes(default, tmp_path / "none") == default


def test_doubts_about_the_pairs_are_said(dataset, tmp_path, caplog, monkeypatch):
    """The people are trained on, an image is missing, and a resumed run has another rate."""
    monkeypatch.setattr(train, "start_logging", lambda **where: None)
    from fr_core.data.synthetic import write_faces

    write_faces(tmp_path / "faces", 20, 2, workers=1)
    images = tmp_path / "faces" / "images"
    for number, folder in enumerate(sorted(images.iterdir())):
        folder.rename(images / f"id{number}")
    write_pairs(tmp_path / "faces", 10)
    (images / "id0" / "000.jpg").unlink()
    given = [f"verify.images={images}", f"verify.pairs={tmp_path / 'faces/pairs.csv'}"]
    with caplog.at_level(logging.INFO, "bigface"):
        figures = train.train(config_of(dataset, *given, "train.max_steps=2"), tmp_path / "run", in_process=True)
        longer = config_of(dataset, *given, "train.max_steps=3", "optim.lr=0.02")
        train.train(longer, tmp_path / "run", in_process=True, resume=True)
    scored, left_out = int(figures["pairs"]), int(figures["skipped_pairs"])
    assert (figures["missing_images"], scored + left_out) == (1, 200)
    assert "20 of the 20 people in verify.pairs have names of people in data.path" in caplog.text
    assert f"unreadable images of verify.pairs: 1, pairs left out: {left_out};" in caplog.text
    assert f"its threshold from the other {scored} pairs" in caplog.text
    assert "resuming with other settings: optim.lr=0.02 (was 0.05), train.max_steps=3 (was 2)" in caplog.text


def test_doubts_about_chunks_are_said(grouped, dataset, caplog):
    opened = open_dataset(grouped)

    def said(chunk, count):
        caplog.clear()
        manifest = opened.manifest.model_copy(update={"chunk_images": chunk})
        config = load_config("debug_attfc", [f"method.class_images={count}"])
        train.log_doubts(config, type(opened)(opened.root, manifest))
        return caplog.messages

    assert said(6, 5) == said(8, 2) == []
    (large,) = said(32, 2)
    assert "has chunks of 32 images, which come in 8 parts" in large
    assert f"`bigface merge {grouped} --out NEW --chunk 6` cuts them" in large
    assert "--chunk 10`" in said(32, 9)[0]
    (small,) = said(4, 4)
    assert "at most 4 images: class images repeat. Ingest the photos with --chunk 5 or more" in small
    train.log_doubts(load_config("debug_bigface"), open_dataset(dataset))
    assert len(caplog.messages) == 1


def test_many_dropped_steps_are_the_last_word(caplog):
    train.log_troubles({"steps": 1000, "dropped_steps": 10})
    assert not caplog.messages
    train.log_troubles({"steps": 10, "dropped_steps": 5})
    assert caplog.messages == ["5 of 10 steps were dropped, their loss was not finite: lower optim.lr"]


def test_the_first_step_is_said_before_the_first_row(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(train, "POLL", 0.02)
    path = tmp_path / "metrics.csv"

    def touch():
        for moment in (1, 2):
            time.sleep(0.2)
            path.touch()
            os.utime(path, (moment, moment))

    toucher = threading.Thread(target=touch)
    with caplog.at_level(logging.INFO, "bigface"), train.progress_line(tmp_path, 100):
        toucher.start()
        toucher.join()
        time.sleep(0.2)
    assert caplog.messages == ["first step done"]
