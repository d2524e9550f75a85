"""Commands on a net of somebody's own code: it trains, goes on and ships; nobody runs its code by opening a file."""

import re

import numpy as np
import pytest
import torch

import fr_core
from fr_core.errors import UserError
from fr_core.nets.checkpoint_files import checkpoints
from fr_core.train.metrics import report_figures
from tests.helpers.commands import bigface, figures
from tests.helpers.own_nets import CALL, forget, was_imported, write_module
from tests.helpers.runs import config_of, interrupted, last_weights, losses, run

NET = f"net={{kind='factory', call='{CALL}', input_size=32, embedding=32, arguments={{width=8}}}}"
LENGTH = ("train.max_steps=6", "train.save_every=2", "train.precision=float32")


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    write_module(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
        forget(folder)


@pytest.fixture(scope="module")
def trained(module, dataset, tmp_path_factory):
    """A run of 6 steps, which needed no leave: its config names the code."""
    out = tmp_path_factory.mktemp("runs") / "own"
    run(config_of(dataset, NET, *LENGTH), out)
    return out


def test_it_goes_on_from_its_own_checkpoints_by_itself(module, trained, dataset, tmp_path, monkeypatch):
    config = config_of(dataset, NET, *LENGTH)
    interrupted(config, tmp_path / "resumed", 3, monkeypatch)
    assert checkpoints(tmp_path / "resumed")
    run(config, tmp_path / "resumed")
    assert losses(trained) == losses(tmp_path / "resumed")
    ours, theirs = last_weights(trained), last_weights(tmp_path / "resumed")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    command = ["train", "debug_bigface", f"data.path={dataset}", "tracking.uri=off", NET, *LENGTH, "data.lanes=8"]
    assert "nothing was trained" in bigface(*command, "--in-process", "--resume", "--out", tmp_path / "resumed")
    with pytest.raises(UserError, match=r"net\.call"):
        run(config_of(dataset, NET.replace(":make", ":other"), *LENGTH), tmp_path / "resumed")


def test_opening_it_without_leave_runs_nothing(module, trained, dataset, photos, tmp_path):
    face = photos / "person0" / "0.jpg"
    train = ("train", "debug_bigface", f"data.path={dataset}", "tracking.uri=off", "--in-process", "--out", tmp_path)
    weights = checkpoints(trained)[-1] / "backbone.safetensors"
    for command in (
        ("verify", trained, "--pairs", face),
        ("match", face, face, "--model", weights),
        ("embed", trained, "--data", dataset, "--out", tmp_path / "e", "--in-process"),
        ("export", checkpoints(trained)[-1], "--out", tmp_path / "net.onnx"),
        ("clean", dataset, "--model", trained, "--out", tmp_path / "c", "--in-process"),
        ("bench", "latency", "--model", trained),
        (*train, f"init.backbone={trained}"),
        ("distill", *train[1:], "--teacher", trained),
        ("plan", "debug_bigface", "--identities", 40, f"init.backbone={trained}"),
    ):
        forget(module)
        with pytest.raises(UserError, match=f"net that the code {CALL} makes: .* give --trust-code") as error:
            bigface(*command)
        assert "\n" not in str(error.value)
        assert not was_imported(module), command
    for command, message in (
        (("prune", trained, "--out", tmp_path / "p.safetensors"), "nets of kind factory cannot be pruned"),
        (("quantize", trained, "--data", dataset), 'net.kind = "factory" cannot be quantised'),
    ):
        forget(module)
        with pytest.raises(UserError, match=message):
            bigface(*command)
        assert not was_imported(module)


def test_a_report_without_counts_runs_nothing(module, trained, tmp_path):
    """Those of older versions are completed by building the net of their config."""
    text = (trained / "report.json").read_text()
    (tmp_path / "report.json").write_text(re.sub(r'"backbone_parameters": \d+,', "", text))
    forget(module)
    assert report_figures(trained)["backbone_parameters"] > 0
    with pytest.raises(UserError, match="--trust-code"):
        report_figures(tmp_path)
    assert not was_imported(module)


def test_with_leave_it_embeds_exports_and_is_timed(module, trained, dataset, photos, tmp_path):
    faces = [photos / "person0" / "0.jpg", photos / "person1" / "0.jpg"]
    bigface("export", trained, "--out", tmp_path / "net.onnx", "--trust-code", "--json", tmp_path / "x.json")
    found = figures(tmp_path / "x.json")
    assert found["max_difference"] < 1e-5
    images = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), np.uint8)
    mine = fr_core.open_net(trained, trust_code=True)
    shipped = fr_core.open_net(tmp_path / "net.onnx")  # which needs no leave
    for batch in (1, 8):
        assert np.abs(mine.embed(images, batch=batch) - shipped.embed(images, batch=batch)).max() < 1e-5
    bigface("match", *faces, "--model", trained, "--trust-code")
    bigface("embed", trained, "--data", dataset, "--out", tmp_path / "e", "--in-process", "--trust-code")
    bigface("bench", "latency", "--model", trained, "--repeats", 1, "--trust-code")


def test_with_leave_it_teaches_and_is_a_start(module, trained, dataset, tmp_path):
    short = (f"data.path={dataset}", "tracking.uri=off", "train.max_steps=2")
    student = ("debug_distill", *short, "--in-process", "--teacher", trained, "--out", tmp_path / "student")
    bigface("distill", *student, "--trust-code")
    start = ("debug_bigface", *short, f"init.backbone={trained}", "train.trust_code=true")
    bigface("train", *start, "--in-process", "--out", tmp_path / "tuned")
    tuned = fr_core.open_net(tmp_path / "tuned", trust_code=True).config
    assert tuned == fr_core.open_net(trained, trust_code=True).config


def test_it_is_priced(module, tmp_path):
    given = ("plan", "debug_bigface", NET, "--identities", 1000, "--gpu", "h100", "--json", tmp_path / "p.json")
    bigface(*given)
    found = figures(tmp_path / "p.json")
    assert found["fits"] == 1
    assert found["ms_step"] > 0
