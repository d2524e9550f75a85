"""The command line as a user meets it: figures, files, exit codes, one-line mistakes."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from fr_core.config.recipes import SHIPPED
from fr_core.data.crops import encode
from fr_core.data.schema import open_dataset
from fr_core.errors import UserError
from fr_core.verify.pairs import write_pairs
from pipelines.cli import main
from pipelines.cli.output import number
from tests.helpers.commands import bigface, figures
from tests.helpers.datasets import flip_a_bit, write_dataset


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """A run of 20 steps, in this process."""
    out = tmp_path_factory.mktemp("runs") / "run"
    bigface("train", "debug_bigface", f"data.path={dataset}", "--in-process", "--out", out)
    return out


def test_a_run_leaves_report_pictures_and_an_mlflow_run(trained):
    from mlflow import MlflowClient

    found = figures(trained / "report.json")
    assert (found["steps"], found["identities"], found["images"], found["workers"]) == (20, 40, 1500, 1)
    assert {p.name for p in (trained / "pictures").iterdir()} == {"curves.png", "sample_batch.png"}
    client = MlflowClient(f"sqlite:///{trained.parent}/mlflow.db")
    run_id = json.loads((trained / "run.json").read_text())["run_id"]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "0.05"
    assert run.data.metrics["backbone_parameters"] == found["backbone_parameters"] > 0
    assert run.data.metrics["classifier_parameters"] == found["classifier_parameters"] > 0
    assert [m.step for m in client.get_metric_history(run_id, "curves/loss")] == list(range(1, 21))
    names = {a.path for a in client.list_artifacts(run_id)} | {
        a.path for a in client.list_artifacts(run_id, "pictures")
    }
    assert {"report.json", "pictures/curves.png", "pictures/sample_batch.png"} <= names


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (400.0, "400"),
        (1234.56, "1,235"),
        (0.78125, "0.7812"),
        (5e-7, "5e-07"),
        (0, "0"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_figures_have_enough_digits(value, text):
    assert number(value) == text


def test_a_used_folder_is_kept_unless_told_otherwise(trained, dataset):
    again = ["train", "debug_bigface", f"data.path={dataset}", "--in-process", "--out", trained]
    with pytest.raises(UserError, match="--resume continues it"):
        bigface(*again)
    before = json.loads((trained / "run.json").read_text())
    bigface(*again, "--resume")
    after = json.loads((trained / "run.json").read_text())
    assert (after["run_id"], after["started"]) == (before["run_id"], before["started"])


def test_verify_and_match_use_the_run(trained, photos, tmp_path):
    pairs = tmp_path / "pairs.csv"
    rows = [(f"person{i}/{k}.jpg", f"person{i}/{k + 1}.jpg", 1, i % 2) for i in range(6) for k in range(4)]
    rows += [(f"person{i}/{k}.jpg", f"person{(i + 2) % 6}/{k}.jpg", 0, i % 2) for i in range(6) for k in range(4)]
    rows += [("person0/0.jpg", f"person0/absent{i}.jpg", 1, 0) for i in range(12)]
    rows.append(("person0/1.jpg", "person0/0.jpg", 0, 0))  # contradicts the first
    with pairs.open("w", newline="") as file:
        csv.writer(file).writerows([("image_a", "image_b", "same", "fold"), *rows])
    output = bigface(
        "verify", trained, "--images", photos, "--pairs", pairs, "--out", tmp_path, "--json", tmp_path / "v.json"
    )
    found = figures(tmp_path / "v.json")
    assert (found["pairs"], found["missing_images"], found["skipped_pairs"]) == (49, 12, 12)
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{trained.parent}/mlflow.db")
    run_id = json.loads((trained / "run.json").read_text())["run_id"]
    assert client.get_run(run_id).data.metrics["pairs/accuracy"] == pytest.approx(found["accuracy"])
    assert {item.path for item in client.list_artifacts(run_id, "verify/pairs")} >= {
        "verify/pairs/roc.png",
        "verify/pairs/det.png",
    }
    assert "warning: pairs called both same and different: 1" in output
    assert output.count(": missing") == 10
    assert "… and 2 more; --json lists all" in output
    absent = {f"person0/absent{i}.jpg": "missing" for i in range(12)}
    assert json.loads((tmp_path / "v.json").read_text())["missing"] == absent
    assert (tmp_path / "roc.png").stat().st_size > 1000
    assert (tmp_path / "scores.png").stat().st_size > 1000
    a, b = photos / "person0/0.jpg", photos / "person0/1.jpg"
    bigface("match", a, a, "--model", trained, "--json", tmp_path / "m.json")
    assert figures(tmp_path / "m.json")["cosine"] == pytest.approx(1, abs=1e-5)
    bigface("match", a, b, "--model", trained, "--json", tmp_path / "m.json")
    assert figures(tmp_path / "m.json")["cosine"] < 1
    with pytest.raises(UserError, match=r"pairs\.csv: unknown image format"):
        bigface("match", a, pairs, "--model", trained)


def test_training_verifies_when_the_recipe_names_pairs(dataset, tmp_path):
    from fr_core.data.synthetic import write_faces

    write_faces(tmp_path / "faces", 20, 2, workers=1)
    write_pairs(tmp_path / "faces", 10)
    given = [f"verify.images={tmp_path / 'faces/images'}", f"verify.pairs={tmp_path / 'faces/pairs.csv'}"]
    out = tmp_path / "run"
    bigface(
        "train", "debug_bigface", f"data.path={dataset}", "train.max_steps=4", "train.verify_every=2", *given,
        "tracking.uri=off", "--in-process", "--out", out,
    )  # fmt: skip
    found = figures(out / "report.json")
    assert 0.3 < found["accuracy"] <= 1
    assert found["pairs"] == 200
    assert {"roc.png", "scores.png"} <= {p.name for p in (out / "pictures").iterdir()}
    said = bigface("match", *[tmp_path / "faces/images/id000000/000.jpg"] * 2, "--model", out)
    assert f"the same person: cosine 1.000, threshold {found['threshold']:.3f} from 200 pairs (faces/pairs.csv)" in said


# Ingest


def test_ingest_is_the_same_whoever_does_it_and_keeps_jpeg_bytes(photos, tmp_path):
    bigface("ingest", photos, "--out", tmp_path / "a", "--in-process", "--json", tmp_path / "i.json")
    assert figures(tmp_path / "i.json")["images"] == 30
    dataset = open_dataset(tmp_path / "a")
    dataset.check_sha256()
    assert dataset.identity_names() == [f"person{i}" for i in range(6)]
    rows = [row for s in range(len(dataset.manifest.shards)) for row in dataset.read_row_group(s, 0).to_pylist()]
    listed = sorted(photos.glob("*/*.jpg"))
    assert sorted(row["sample_id"] for row in rows) == list(range(30))
    for row in rows:
        assert row["image"] == listed[row["sample_id"]].read_bytes()
        assert row["label"] == row["sample_id"] // 5


def test_grouped_ingest_keeps_identities_together(photos, tmp_path):
    bigface("ingest", photos, "--out", tmp_path / "g", "--layout", "grouped", "--in-process")
    dataset = open_dataset(tmp_path / "g")
    rows = [row for s, g, _ in dataset.row_groups.tolist() for row in dataset.read_row_group(s, g).to_pylist()]
    assert dataset.manifest.images == 30
    assert sorted(row["label"] for row in rows) == list(range(6))
    assert all(sorted(row["sample_ids"]) == [5 * row["label"] + k for k in range(5)] for row in rows)
    assert any(row["sample_ids"] != sorted(row["sample_ids"]) for row in rows)  # neighbours in a folder are parted


def test_rejects_are_listed_and_counted(photos, tmp_path):
    source = shutil.copytree(photos, tmp_path / "people")
    (source / "person0" / "empty.jpg").touch()
    (source / "person0" / "cut.jpg").write_bytes((source / "person0" / "0.jpg").read_bytes()[:700])
    (source / "person1" / "wide.jpg").write_bytes(encode(np.zeros((100, 200, 3), np.uint8)))
    (source / "person1" / "notes.txt").write_text("no image")
    output = bigface("ingest", source, "--out", tmp_path / "s", "--in-process")
    manifest = open_dataset(tmp_path / "s").manifest
    assert manifest.rejects == {"corrupt or truncated": 1, "empty file": 1}
    assert manifest.warnings == {"not_square": 1}
    assert manifest.images == 31
    assert "1 image is not square" in output
    rows = list(csv.reader((tmp_path / "s" / "rejects.csv").open()))
    assert rows == [
        ["path", "reason"],
        ["person0/cut.jpg", "corrupt or truncated"],
        ["person0/empty.jpg", "empty file"],
    ]


def test_mostly_rejects_is_an_error_without_a_dataset(tmp_path):
    for person in "ab":
        (tmp_path / "in" / person).mkdir(parents=True)
        for i in range(4):
            (tmp_path / "in" / person / f"{i}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"8 of 8 images rejected, first a/0\.jpg"):
        bigface("ingest", tmp_path / "in", "--out", tmp_path / "out", "--in-process")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_output_folders_are_guarded(photos, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        bigface("ingest", photos, "--out", tmp_path / "file" / "shards", "--in-process")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UserError, match="is not empty"):
        bigface("ingest", photos, "--out", tmp_path / "mine", "--in-process")
    bigface("ingest", photos, "--out", tmp_path / "mine", "--in-process", "--overwrite")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    for out in (photos / "person0", photos.parent):
        with pytest.raises(UserError, match="lie in each other"):
            bigface("ingest", photos, "--out", out, "--in-process", "--overwrite")
    with pytest.raises(UserError, match="cannot write"):
        bigface("synth", "--out", tmp_path / "file" / "faces", "--identities", 1, "--shots", 1)
    with pytest.raises(UserError, match="cannot write"):
        bigface("demo", "--out", tmp_path / "file" / "demo")
    bigface("synth", "--out", tmp_path / "faces", "--identities", 1, "--shots", 1, "--size", 32)
    with pytest.raises(UserError, match="holds faces already"):
        bigface("synth", "--out", tmp_path / "faces", "--identities", 1, "--shots", 1, "--seed", 1)


# Training's mistakes, before anything starts


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.global_batch=4096"], "lower train.global_batch"),
        (["--workers", "2", "--in-process"], "leave out --workers"),
        (["--workers", "3"], "3 workers do not divide the run's 32 lanes; use 2 or 4"),
        (["--workers", "2", "train.global_batch=34", "train.accumulate=2"], "not a multiple of 2 workers"),
        (["data.path="], "data.path is not set"),
        (["optim.kind=lars"], "not that of lars: give optim.head.lr"),
        (["optim.kind=adamw"], "not that of adamw: give optim.head.lr"),
        (["--resume", "--in-process"], "holds no run"),
        (["verify.images=/x", "verify.pairs=/absent.csv", "--in-process", "tracking.uri=off"], "absent.csv"),
    ],
)
def test_launch_mistakes(dataset, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        bigface("train", "debug_bigface", f"data.path={dataset}", "--out", tmp_path / "run", *overrides)


def test_a_table_on_the_command_line_keeps_the_rest_of_the_recipes_table(dataset, tmp_path):
    recipe = tmp_path / "mine.toml"
    text = (SHIPPED / "debug_bigface.toml").read_text()
    recipe.write_text(f"{text}\n[schedule]\nkind = 'multistep'\nmilestones = [3]\nwarmup_epochs = 0.01\n")
    given = [
        f"data.path={dataset}",
        "train.max_steps=1",
        "tracking.uri=off",
        "schedule={kind='cosine',final_ratio=0.1}",
    ]
    bigface("train", recipe, *given, "--in-process", "--out", tmp_path / "run")
    schedule = json.loads((tmp_path / "run" / "run.json").read_text())["config"]["schedule"]
    assert schedule == {"kind": "cosine", "final_ratio": 0.1, "warmup_epochs": 0.01}


def test_a_damaged_shard_stops_the_launch(tmp_path):
    root = write_dataset(tmp_path / "shards", 300, 10)
    flip_a_bit(root / "shard-00000.parquet", 1000)
    with pytest.raises(UserError, match=r"shard-00000\.parquet: wrong checksum"):
        bigface("train", "debug_bigface", f"data.path={root}", "--in-process", "--out", tmp_path / "run")


def test_mistakes_exit_with_2_and_one_line(tmp_path):
    command = [sys.executable, "-m", "pipelines.cli", "train", "debug_bigface", "optim.momentun=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "did you mean optim.momentum?" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "demo", "--optim.lr=0.1"], "write optim.lr=0.1 without the dashes"),
        (["train", "demo", "--optim.lr", "0.1"], "write optim.lr=0.1 without the dashes"),
        (["train", "demo", "--learning-rate=0.1"], "no option --learning-rate: the learning rate is optim.lr"),
        (["train", "demo", "--in-proces"], "no option --in-proces: did you mean --in-process?"),
        (["train"], "missing argument RECIPE: see bigface train --help"),
        (["knobs", "--nonsense"], "no option --nonsense: see bigface knobs --help"),
        (["split", "x", "--out", "y", "--share", "z"], "--share z is no number"),
        (["split", "x", "--out", "y", "--share=2"], "--share 2 must be "),
        (["trian"], "Did you mean 'train'?"),
    ],
)
def test_wrong_usage_exits_with_2_and_one_line(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bigface", *words])
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("bigface: ")
    assert message in printed
    assert printed.count("\n") == 1


def test_the_version_is_printed():
    assert bigface("--version").startswith("bigface 0.")
