"""LDAM's margins against float64 over the whole matrix, and what a run tells them of its data."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fr_core.config.methods import BigFace, LDAMMargin
from fr_core.data.schema import open_dataset
from fr_core.heads.ldam import margin_shares
from fr_core.heads.sharded_fc import ShardedFC, initial_rows
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import config_of, state_and_batches

N, D, G = 7, 6, 4
IMAGES = np.array([1, 16, 81, 256, 625, 1, 16])  # n^(−1/4): 1, 1/2, 1/3, 1/4, 1/5, 1, 1/2
LABELS = [0, 3, 3, 6]
MARGINS = {
    "cosine": LDAMMargin(scale=16),
    "angle": LDAMMargin(scale=16, m2=0.5, m3=0, stated="mean"),
    "both, square root": LDAMMargin(scale=16, m2=0.3, m3=0.1, power=0.5),
}


def embeddings():
    return torch.randn(G, D, generator=torch.Generator().manual_seed(0))


def sharded(ranks):
    found = {}
    own = slice(ranks.rank * G // ranks.size, (ranks.rank + 1) * G // ranks.size)
    for name, margin in MARGINS.items():
        head = ShardedFC(N, D, BigFace(margin=margin, tile=2), ranks, seed=1)
        head.margin.know(IMAGES, 1, torch.device("cpu"))
        x_BD = embeddings()[own].clone().requires_grad_()
        loss = head(ranks.gather(x_BD), torch.tensor(LABELS))
        loss.backward()
        found[name] = float(loss.detach()), x_BD.grad, head.weight.grad
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_losses_and_gradients_equal_the_whole_matrix_in_float64(size):
    """Tolerances as in test_sharded_fc.py."""
    results = run_ranks(size, sharded)
    for name, margin in MARGINS.items():
        x, weight = embeddings().double().requires_grad_(), initial_rows(0, N, D, 1).double().requires_grad_()
        cos, at = F.normalize(x) @ F.normalize(weight).T, (torch.arange(G), torch.tensor(LABELS))
        share = torch.from_numpy(IMAGES**-margin.power)
        share = (share if margin.stated == "largest" else share / share.mean())[LABELS]
        target = torch.cos(torch.acos(cos[at]) + share * margin.m2) - share * margin.m3
        loss = F.cross_entropy(16 * cos.index_put(at, target), torch.tensor(LABELS))
        loss.backward()
        own = [result[name] for result in results]
        assert all(found[0] == pytest.approx(float(loss.detach()), abs=1e-5) for found in own)
        assert torch.allclose(torch.cat([found[1] for found in own]).double(), x.grad, atol=1e-5)
        assert torch.allclose(torch.cat([found[2] for found in own]).double(), weight.grad, atol=2e-4, rtol=1e-4)


def test_the_stated_margin_is_that_of_the_rarest_or_of_the_mean_identity():
    largest = margin_shares(IMAGES, LDAMMargin())
    assert np.allclose(largest, [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1, 1 / 2])
    assert margin_shares(IMAGES, LDAMMargin(stated="mean")).mean() == pytest.approx(1)
    assert np.allclose(margin_shares(IMAGES, LDAMMargin(power=0)), 1)
    assert np.isfinite(margin_shares(np.array([0, 3]), LDAMMargin())).all()  # an identity without images


def test_a_run_knows_the_images_of_its_identities(dataset):
    """Each of two variants has its identity's margin."""
    config = config_of(dataset, "method.margin.kind=ldam", "data.variants=2", "train.max_steps=1")
    state, stream = state_and_batches(config)
    stream.close()
    margin = state.head.margin
    counts = open_dataset(dataset).identity_counts()
    share = (counts / counts.min()) ** -0.25
    assert share.min() < 0.95
    labels_G = torch.tensor([0, 1, 8, 79])
    faces = state.head(torch.ones(4, 32), labels_G)
    assert faces.isfinite()
    assert np.allclose(margin.share_N, share, atol=1e-6)
    assert margin.variants == 2
    assert not [name for name in state.head.state_dict() if name.startswith("margin")]
