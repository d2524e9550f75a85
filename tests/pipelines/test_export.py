import csv
import json

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from fr_core.config.nets import IResNetNet, QuantisedNet
from fr_core.data.schema import sha256
from fr_core.errors import UserError
from fr_core.nets.build import build_net
from fr_core.nets.calibration import calibrate
from fr_core.nets.checkpoint_files import FORMAT, write_signed
from fr_core.nets.onnx_net import OnnxNet
from fr_core.nets.open import open_net
from fr_core.nets.quantised import Quantised
from fr_core.ranks import Ranks
from pipelines.bench.latency import bench_latency, settled
from pipelines.nets import export as pipeline
from tests.helpers.commands import bigface, figures

SMALL = IResNetNet(depth=10, width=8, input_size=32, embedding=16)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The part of a run that nets are opened from."""
    out = tmp_path_factory.mktemp("runs") / "run"
    checkpoint = out / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    weights = {name: tensor.contiguous() for name, tensor in settled(SMALL).state_dict().items()}
    save_file(weights, checkpoint / "backbone.safetensors")
    written = checkpoint / "backbone.safetensors"
    files = {written.name: {"bytes": written.stat().st_size, "sha256": sha256(written)}}
    write_signed(checkpoint, {"format": FORMAT, "files": files, "config": {"net": SMALL.model_dump()}})
    (out / "report.json").write_text(json.dumps({"figures": {"threshold": 0.3}}))
    return out


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported")
    bigface("export", run, "--out", out / "new" / "net.onnx", "--json", out / "e.json")
    return out / "new" / "net.onnx"


def test_export_writes_a_file_that_agrees(exported):
    found = figures(exported.parent.parent / "e.json")
    assert found["mib"] == exported.stat().st_size / 2**20
    assert found["least_cosine"] > 1 - 1e-6
    assert 0 < found["max_difference"] < 1e-4
    assert min(found["net_ms"], found["onnx_ms"]) > 0
    assert [file.name for file in exported.parent.iterdir()] == ["net.onnx"]
    assert open_net(exported).threshold == 0.3


def test_match_verify_and_embed_take_the_file(run, exported, photos, dataset, tmp_path):
    faces = [photos / "person0" / "0.jpg", photos / "person1" / "0.jpg"]
    cosines = []
    for model in (run, exported):
        bigface("match", *faces, "--model", model, "--json", tmp_path / "m.json")
        cosines.append(figures(tmp_path / "m.json")["cosine"])
        assert figures(tmp_path / "m.json")["threshold"] == 0.3
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-5)
    rows = [
        (f"person{i}/{k}.jpg", f"person{(i + j) % 6}/{k + 1}.jpg", 1 - j, i % 2)
        for i in range(6)
        for k in range(4)
        for j in (0, 1)
    ]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image_a", "image_b", "same", "fold"), *rows])
    pairs = ("--images", photos, "--pairs", tmp_path / "pairs.csv", "--json", tmp_path / "v.json")
    bigface("verify", exported, *pairs)
    assert figures(tmp_path / "v.json")["pairs"] == len(rows)
    bigface("embed", exported, "--data", dataset, "--out", tmp_path / "vectors", "--in-process")
    with pytest.raises(UserError, match="not empty"):  # another net's
        bigface("embed", run, "--data", dataset, "--out", tmp_path / "vectors", "--in-process")


def test_what_cannot_be_exported_is_explained(run, exported, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.onnx").mkdir()
    wrong = {
        "call it FILE.onnx": (run, "--out", tmp_path / "net.safetensors"),
        "is a folder": (run, "--out", tmp_path / "folder.onnx"),
        "cannot write": (run, "--out", tmp_path / "file" / "net.onnx"),
        "takes a local path": (run, "--out", "s3://bucket/net.onnx"),
        "bigface export wrote it": (exported, "--out", tmp_path / "again.onnx"),
        "no such run": (tmp_path / "absent", "--out", tmp_path / "net.onnx"),
    }
    for message, args in wrong.items():
        with pytest.raises(UserError, match=message):
            bigface("export", *args)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.onnx"}


def test_nets_that_are_not_finite_or_come_out_otherwise_are_refused(run, exported, tmp_path, monkeypatch):
    broken = build_net(SMALL).state_dict()
    broken["fc.bias"][0] = torch.nan
    save_file(broken, tmp_path / "nan.safetensors", {"net": SMALL.model_dump_json()})
    with pytest.raises(UserError, match="not finite"):
        pipeline.export(str(tmp_path / "nan.safetensors"), tmp_path / "net.onnx")
    other = build_net(SMALL).eval()
    monkeypatch.setattr(pipeline, "write_onnx", lambda net, path, verified: path.touch())
    monkeypatch.setattr(pipeline, "open_onnx", lambda path: other)
    with pytest.raises(UserError, match="not written"):
        pipeline.export(str(run), tmp_path / "net.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["nan.safetensors"]


def test_a_quantised_net_is_exported_in_integers(tmp_path):
    config = QuantisedNet(net=SMALL, ranges="extremes", equalise=False)
    net = Quantised(settled(SMALL), config)
    calibrate(net, lambda: [torch.randn(8, 3, 32, 32)], Ranks(), config)
    weights = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(weights, tmp_path / "net.safetensors", {"net": config.model_dump_json()})
    bigface("export", tmp_path / "net.safetensors", "--out", tmp_path / "net.onnx", "--json", tmp_path / "e.json")
    assert figures(tmp_path / "e.json")["least_cosine"] > 1 - 1e-6
    used = {node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= used
    assert open_net(tmp_path / "net.onnx").embed(np.zeros((2, 32, 32, 3), np.uint8)).shape == (2, 16)


def test_bench_latency_measures_every_form(exported):
    threads = torch.get_num_threads()
    (row,), found = bench_latency(None, None, 60_000, 1, lambda line: None, [SMALL])
    assert torch.get_num_threads() == threads
    assert {"plain_ms", "folded_ms", "onnx_ms", "plain_over_folded", "plain_over_onnx"} <= row.keys()
    assert row["net"] == "iresnet10"
    assert row["parameters"] == sum(p.numel() for p in build_net(SMALL).parameters())
    assert row["answer_ms"] == found["align_ms"] + min(row["plain_ms"], row["folded_ms"], row["onnx_ms"])
    assert (found["nets"], found["fitting"]) == (1, 1)
    assert isinstance(open_net(exported).net, OnnxNet)


def test_bench_latency_of_one_given_file(exported, tmp_path):
    output = bigface(
        "bench", "latency", "--model", exported, "--budget-ms", 0, "--repeats", 1, "--json", tmp_path / "l.json"
    )
    assert "no" in output
    (row,) = json.loads((tmp_path / "l.json").read_text())["rows"]
    assert {"onnx_ms", "answer_ms"} <= row.keys()
    assert not {"plain_ms", "folded_ms"} & row.keys()
    assert row["fits"] is False
