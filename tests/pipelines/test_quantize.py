"""``bigface quantize``: the config that it makes, small runs to their reports, and what is checked before them."""

import json
import shutil

import pytest

from fr_core.data.synthetic import write_faces
from fr_core.errors import UserError
from fr_core.nets.open import open_net
from fr_core.train.metrics import read_metrics
from fr_core.verify.pairs import write_pairs
from pipelines.nets import quantize as pipeline
from pipelines.nets.quantize import quantised_config
from tests.helpers.commands import bigface, figures
from tests.helpers.datasets import write_dataset

pytest.importorskip("brevitas")
SMALL = ("--in-process", "net.calibration_batches=2", "train.global_batch=16")


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """A float run of 3 steps."""
    out = tmp_path_factory.mktemp("runs") / "float"
    short = ["train.max_steps=3", "tracking.uri=off"]
    bigface("train", "debug_bigface", f"data.path={dataset}", *short, "--in-process", "--out", out)
    return out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    root = tmp_path_factory.mktemp("faces") / "faces"
    write_faces(root, 20, 2, workers=1)
    write_pairs(root, 10)
    return "--images", root / "images", "--pairs", root / "pairs.csv"


def quantize(ckpt, data, *args):
    return bigface("quantize", ckpt, "--data", data, *SMALL, "tracking.uri=off", *args)


def test_the_config_is_the_recipe_with_the_net_of_the_checkpoint(dataset, trained):
    fields = {"data__path": str(dataset), "net__weights": 6, "net__activations": None}
    config = quantised_config(str(trained), "quantize_ekd", data_share=0.5, overrides=["optim.lr=0.01"], **fields)
    assert config.net.net == open_net(trained).config
    assert (config.net.weights, config.net.activations, config.net.scheme) == (6, 8, "integer")
    assert (config.init.backbone, config.method.teacher) == (str(trained), str(trained))
    assert (config.train.epochs, config.train.max_steps, config.optim.lr) == (1, 12, 0.01)  # of 23 steps
    baseline = quantised_config(str(trained), "quantize_mse", calibrate_only=True, **fields)
    assert (baseline.net.net, baseline.net.scheme) == (config.net.net, "quantface")
    assert (baseline.method.loss.kind, baseline.train.epochs) == ("mse", 0)


def test_a_run_reports_the_net_before_and_after(dataset, trained, pairs, tmp_path, mlflow_database):
    from mlflow import MlflowClient

    shutil.copy(mlflow_database, tmp_path)
    run = tmp_path / "run"
    given = ["--run", run, "--data-share", 0.03, "train.log_every=1"]
    said = bigface(
        "quantize",
        trained,
        "--data",
        dataset,
        *SMALL,
        *pairs,
        *given,
        "--out",
        tmp_path / "q.onnx",
        "--json",
        tmp_path / "q.json",
    )
    found = figures(tmp_path / "q.json")
    assert (found["steps"], found["data_share"]) == (3, pytest.approx(3 / 93))
    assert found["nominal_mib"] == found["float_mib"] / 4
    assert found["minutes_per_epoch"] == pytest.approx(93 * 16 / found["images_per_second"] / 60)
    bigface("verify", trained, *pairs, "--json", tmp_path / "v.json")
    assert found["before_accuracy"] == figures(tmp_path / "v.json")["accuracy"]
    bigface("verify", tmp_path / "q.onnx", *pairs, "--json", tmp_path / "w.json")
    assert found["after_accuracy"] == figures(tmp_path / "w.json")["accuracy"]
    assert found["int8_file_mib"] == (tmp_path / "q.onnx").stat().st_size / 2**20 < found["float_file_mib"]
    assert found["int8_cosine"] > 0.999
    assert min(found["float_ms"], found["int8_ms"], found["speedup"]) > 0
    assert f"{100 * found['before_accuracy']:.2f}" in said
    report = json.loads((run / "report.json").read_text())
    assert report["command"] == "quantize"
    assert report["figures"] == found
    assert open_net(run).threshold == found["threshold"]
    assert open_net(run).config.kind == "quantised"
    assert len(read_metrics(run)) == 3
    tracked = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(
        json.loads((run / "run.json").read_text())["run_id"]
    )
    assert tracked.data.params["method.teacher"].startswith(str(trained))
    assert tracked.data.params["net.weights"] == "8"
    assert tracked.data.metrics["quantize/before_accuracy"] == found["before_accuracy"]
    assert tracked.data.metrics["quantize/minutes_per_epoch"] == found["minutes_per_epoch"]


def test_calibration_alone(dataset, trained, tmp_path):
    quantize(trained, dataset, "--run", tmp_path / "c", "--calibrate-only", "--json", tmp_path / "c.json")
    assert figures(tmp_path / "c.json")["steps"] == 0
    assert "minutes_per_epoch" not in figures(tmp_path / "c.json")


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(dataset, trained, tmp_path):
    given = ("--data-share", 0.03, "train.save_every=2")
    quantize(trained, dataset, *given, "--run", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts/checkpoints/step_00000003/checkpoint.json").unlink()
    quantize(trained, dataset, *given, "--run", tmp_path / "parts", "--resume")
    ours, theirs = (open_net(tmp_path / name).net.state_dict() for name in ("whole", "parts"))
    assert all(ours[name].equal(theirs[name]) for name in ours)
    with pytest.raises(UserError, match=r"data\.balanced differs: .*0\.5.* there, .*0\.0.* now"):
        quantize(trained, dataset, *given, "--run", tmp_path / "parts", "--resume", "data.balanced.share=0")


def test_faces_without_labels_and_the_simulation_of_quantface(dataset, trained, tmp_path):
    unlabelled = ["data.balanced.share=0", "data.views=2", "method.labels=false", "train.max_steps=1"]
    quantize(trained, dataset, *unlabelled, "--run", tmp_path / "views", "train.log_every=1")
    assert read_metrics(tmp_path / "views")[0]["positive_loss"] > 0
    mse = ["--recipe", "quantize_mse", "--run", tmp_path / "mse", "train.max_steps=1"]
    quantize(trained, dataset, *mse, "--weights", 4)
    assert open_net(tmp_path / "mse").config.weights == 4


def test_mistakes_before_the_run(dataset, trained, tmp_path):
    (tmp_path / "file").touch()
    few = write_dataset(tmp_path / "few", 12, 4)
    run, out = ("--run", tmp_path / "run"), ("--out", tmp_path / "q.onnx")
    for args, message in (
        ((trained, dataset, "--out", tmp_path / "net.bin"), r"call it FILE\.onnx"),
        ((trained, dataset, "--out", tmp_path / "file" / "net.onnx"), "cannot write .*file/net.onnx"),
        ((trained, few), "a step of 16 images in 2 lanes needs more than the 12 images"),
        ((trained, tmp_path), r"no manifest\.json"),
        ((trained, dataset, "net.weights=9"), r"net\.weights=9 must be at most 8"),
        ((trained, dataset, "net.activations=1"), r"net\.activations=1 must be at least 2"),
        ((trained, dataset, "--data-share", 0), "a data share of 0 is not in 0 … 1"),
        ((trained, dataset, "--recipe", "debug_bigface"), 'method.kind = "quantface"'),
        ((trained, dataset, "--recipe", "quantize_mse", *out), "integer kernels refuse: leave --out out"),
        ((tmp_path / "absent", dataset), "no such run, checkpoint or weights file"),
    ):
        with pytest.raises(UserError, match=message):
            quantize(*args, *run)
    with pytest.raises(AssertionError, match="less than or equal to 8"):
        quantize(trained, dataset, *run, "--weights", 9)
    with pytest.raises(UserError, match="is made of a trained net: give init"):
        bigface("train", "quantize_ekd", f"data.path={dataset}", "--in-process", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="the memory that trains a quantised net is not computed"):
        bigface("plan", "quantize_ekd", "--identities", 1000)


def test_nets_that_cannot_be_quantised(trained, dataset, tmp_path, monkeypatch):
    opened = open_net(trained)
    for kind, message in (
        ({"kind": "moe"}, 'net.kind = "moe" cannot be quantised'),
        ({"kind": "quantised", "net": {"kind": "iresnet"}}, "is quantised already: name the float net"),
    ):
        section = pipeline.load_config("debug_bigface", []).model_validate({"net": kind}).net
        known = type(opened)(opened.net, opened.device, None, section)
        monkeypatch.setattr(pipeline, "open_net", lambda *_, known=known, **__: known)
        with pytest.raises(UserError, match=message):
            quantize(trained, dataset, "--run", tmp_path / "run")


def test_the_summary_has_a_column_for_what_was_measured():
    found = {"float_mib": 4.0, "nominal_mib": 1.0, "before_accuracy": 0.9, "after_accuracy": 0.89}
    found |= {"before_tar_at_far_1e-3": 0.5, "after_tar_at_far_1e-3": 0.25}
    head, *rows = pipeline.table(found)
    assert head == ("net", "accuracy %", "TAR@FAR 1e-3 %", "params × bits MiB")
    assert rows == [("float", "90.00", "50.00", "4.00"), ("quantised", "89.00", "25.00", "1.00")]


@pytest.mark.soak
@pytest.mark.ray
def test_two_ray_workers_quantise_as_one_process(dataset, trained, tmp_path):
    small = ["--data", dataset, "net.calibration_batches=2", "train.global_batch=16", "tracking.uri=off"]
    short = ["--data-share", 0.03, "train.log_every=1", "method.loss=mse"]
    bigface("quantize", trained, *small, *short, "--in-process", "--run", tmp_path / "one")
    bigface("quantize", trained, *small, *short, "--workers", 2, "--run", tmp_path / "two")
    one, two = ([row["loss"] for row in read_metrics(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 3
    assert two == pytest.approx(one, rel=0.1)  # codes that round otherwise


def test_a_pruned_net_is_quantised_and_exported(dataset, trained, tmp_path):
    bigface("prune", trained, "--ratio", "0,0,0.2,0.2", "--out", tmp_path / "pruned.safetensors")
    given = [
        "--run",
        tmp_path / "run",
        "--calibrate-only",
        "--out",
        tmp_path / "net.onnx",
        "--json",
        tmp_path / "found",
    ]
    quantize(tmp_path / "pruned.safetensors", dataset, *given)
    assert open_net(tmp_path / "run").config.net.widths == open_net(tmp_path / "pruned.safetensors").config.widths
    assert figures(tmp_path / "found")["int8_cosine"] > 0.999
