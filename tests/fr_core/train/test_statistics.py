"""Batch-norm statistics of the net at the end of a run."""

from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import fr_core.train.loop as loop
from fr_core.config.nets import IResNetNet
from fr_core.config.recipes import load_config
from fr_core.data.stream import blocks_in_process
from fr_core.nets.backbone import normalised
from fr_core.nets.build import build_net
from fr_core.nets.checkpoint_files import write_tensors
from fr_core.nets.open import open_net
from fr_core.ranks import Ranks
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import config_of, rank_run


@pytest.fixture
def trained(dataset, tmp_path):
    """Train a short run; return its embeddings of all faces of the dataset (float64) and the bias of its last norm."""

    def train(ranks, *overrides, method="bigface", data=dataset):
        given = [f"data.path={data}", "tracking.uri=off", "train.global_batch=60", "train.max_steps=8", *overrides]
        run_ranks(ranks, rank_run, load_config(f"debug_{method}", given), str(tmp_path / "run"))
        shards = [pq.read_table(path) for path in sorted(data.glob("shard-*"))]
        if data == dataset:
            files = [file for shard in shards for file in shard["image"].to_pylist()]
        else:
            files = [file for shard in shards for files in shard["images"].to_pylist() for file in files]
        images = np.stack([cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR_RGB) for file in files])
        net = open_net(tmp_path / "run").net
        with torch.no_grad():
            x_BD = net(torch.from_numpy(images).permute(0, 3, 1, 2).float().sub(127.5).div(net.input_std))
        return x_BD.double(), net.features.bias

    return train


@pytest.mark.parametrize("ranks", [1, 2])
def test_virtual_identities_leave_a_net_that_is_centred_on_the_real_ones(trained, ranks):
    x_BD, bias_D = trained(ranks, "data.variants=4", "data.variant_strength=0.1")
    assert (x_BD.mean(0) - bias_D).abs().max() < 1e-3
    assert (x_BD.var(0) - 1).abs().max() < 1e-2


@pytest.mark.parametrize("method", ["attfc", "dcq", "f2c", "virtual_fc"])
def test_so_do_methods_of_class_images(trained, grouped, method):
    """The shipped net is re-measured, also DCQ's key encoder."""
    given = ["data.variants=4", "data.variant_strength=0.1", "data.lanes=10"]
    x_BD, bias_D = trained(1, *given, method=method, data=grouped)
    assert (x_BD.mean(0) - bias_D).abs().max() < 1e-3


def test_without_them_the_running_statistics_stay(trained):
    x_BD, bias_D = trained(1)
    assert (x_BD.mean(0) - bias_D).abs().max() > 0.1


def test_a_verification_on_the_way_is_of_the_net_as_it_would_be_left(tmp_path, trained, monkeypatch):
    looks = []
    monkeypatch.setattr(
        loop, "verify", lambda config, state, *_: looks.append(state.backbone.features.running_mean.clone()) or {}
    )
    monkeypatch.setattr(
        loop, "measure_last_norm", lambda config, state, *_: state.backbone.features.running_mean.fill_(7)
    )
    (tmp_path / "pairs.csv").write_text("image_a,image_b,same\na,b,1\n")
    for name in ("a", "b"):
        (tmp_path / name).touch()
    given = [f"verify.pairs={tmp_path / 'pairs.csv'}", f"verify.images={tmp_path}"]
    trained(1, "data.variants=4", "train.verify_every=4", *given)
    assert len(looks) == 2
    assert all((mean_D == 7).all() for mean_D in looks)


@torch.no_grad()
def folded_weights(dataset, path):
    """Save a net as one comes back from an exporter: each norm behind a layer adds a shift and does nothing else."""
    torch.manual_seed(0)
    config = IResNetNet(depth=10, width=8, input_size=32, embedding=32)
    net = build_net(config)
    norms = {name: module for name, module in net.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    for norm in (*norms.values(), net.features):
        norm.momentum = 1.0
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.3)
    files = pq.read_table(next(dataset.glob("shard-*")))["image"].to_pylist()[:256]
    images = np.stack([cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR_RGB) for file in files])
    net.train()(normalised(torch.from_numpy(images), net))
    before = {"bn1": "conv1", "features": "fc"}
    before |= {name: name.replace("bn2", "conv1").replace("bn3", "conv2") for name in norms if name[-1] in "23"}
    before |= {name: name.replace("downsample.1", "downsample.0") for name in norms if "downsample" in name}
    for name, layer in before.items():
        if name == "bn2":
            continue
        norm, layer = net.get_submodule(name), net.get_submodule(layer)
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        layer.weight.mul_(gain.view(-1, *[1] * (layer.weight.ndim - 1)))
        norm.bias.sub_(gain * (norm.running_mean - (0 if layer.bias is None else layer.bias)))
        if layer.bias is not None:
            layer.bias.zero_()
        norm.weight.fill_(1)
        norm.running_mean.zero_()
        norm.running_var.fill_(1).sub_(norm.eps)
    write_tensors(path, net.state_dict(), {"net": config.model_dump_json()})
    return net.eval()


def started(ranks, config):
    """Return the statistics that a run begins with, of all norms."""
    state = loop.resume_or_init(config, Path("none"), ranks, blocks_in_process)
    return {name: buffer.clone() for name, buffer in state.backbone.named_buffers() if "running" in name}


@torch.no_grad()
def test_norms_that_were_folded_are_measured_before_training_and_change_nothing(dataset, tmp_path):
    before = folded_weights(dataset, tmp_path / "net.safetensors")
    config = config_of(dataset, f"init.backbone={tmp_path / 'net.safetensors'}")
    state = loop.resume_or_init(config, Path("none"), Ranks(), blocks_in_process)
    (batch, *_) = loop.plain_batches(config, state.plan, Ranks(), blocks_in_process, 1)
    x_BCHW = normalised(batch.images_BHWC, before)
    after = state.backbone.eval()
    wanted, found = before(x_BCHW), after(x_BCHW)
    assert (wanted - found).abs().max() < 1e-4 * wanted.abs().max()
    naive, settled = (torch.cosine_similarity(net.train()(x_BCHW), wanted).mean() for net in (before, after))
    assert settled > 0.95
    assert naive < settled - 0.1


def test_ranks_measure_the_same_norms(dataset, tmp_path):
    folded_weights(dataset, tmp_path / "net.safetensors")
    config = config_of(dataset, f"init.backbone={tmp_path / 'net.safetensors'}")
    one, (two, other) = started(Ranks(), config), run_ranks(2, started, config)
    for name, buffer in one.items():
        assert torch.equal(two[name], other[name])
        assert torch.allclose(two[name], buffer, rtol=1e-4, atol=1e-5)
