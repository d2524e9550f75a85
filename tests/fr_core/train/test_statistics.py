"""Batch-norm statistics of the net at the end of a run."""

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from fr_core.config.recipes import load_config
from fr_core.nets.open import open_net
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import rank_run


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
    import fr_core.train.loop as loop

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
