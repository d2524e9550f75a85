import copy

import pytest
import torch
from torch import nn

from fr_core.config.nets import GhostFaceNetNet, IResNetNet, MobileFaceNetNet, MoENet, ViTNet
from fr_core.nets.build import build_net
from fr_core.nets.fold_bn import bound_slopes, folded
from fr_core.nets.iresnet import BLOCKS
from fr_core.nets.open import open_net
from tests.helpers.machine import REAL_DATA, needs_real_data
from tests.helpers.nets import NORMS, random_net

SMALL = [
    *(IResNetNet(depth=depth, width=8, input_size=32, embedding=8) for depth in BLOCKS),
    GhostFaceNetNet(width=0.5, input_size=48, embedding=8),
    IResNetNet(depth=10, width=8, input_size=48, embedding=8, dropout=0.4),
    IResNetNet(depth=18, width=8, input_size=32, stem_stride=2, embedding=8),  # last map of 1 × 1 pixel
    IResNetNet(depth=10, width=8, input_size=112, stem_stride=2, embedding=8),  # halvings that round up
    ViTNet(depth=2, width=16, heads=2, patch=8, input_size=32, embedding=8),
    IResNetNet(depth=18, width=32, input_size=32, embedding=8, se=True, inner_norm=False, shortcut="pool"),
    IResNetNet(depth=18, width=8, input_size=48, embedding=8, shortcut="pool", norm_eps=0.1),
    MoENet(depth=18, width=8, input_size=32, embedding=8, experts=3, active=2, se=True, inner_norm=False),
    MobileFaceNetNet(input_size=64, embedding=8),
]


@torch.no_grad()
def difference(net, other, images=3):
    """Return the largest difference of embeddings, relative to their largest value, and the least cosine."""
    x = torch.randn(images, 3, net.input_size, net.input_size)
    ours, theirs = net(x), other(x)
    assert ours.isfinite().all()
    cosine = torch.cosine_similarity(ours.double(), theirs.double())
    return float((ours - theirs).abs().max() / ours.abs().max()), float(cosine.min())


@pytest.mark.parametrize("config", SMALL)
def test_the_folded_net_is_the_net_without_norms(config):
    net = random_net(config)
    inference = folded(net)
    assert not any(isinstance(module, (NORMS, nn.Dropout)) for module in inference.modules())
    told = (inference.input_size, inference.embedding, inference.input_mean, inference.input_std)
    assert told == (net.input_size, net.embedding, net.input_mean, net.input_std)
    largest, cosine = difference(net, inference)
    assert largest < 1e-4
    assert cosine > 1 - 1e-7


@pytest.mark.parametrize("config", [SMALL[0], SMALL[1], SMALL[-4]])
def test_folding_is_exact(config):
    """Float64 leaves errors of the algebra alone. The last linear layer is left out: it is always float32."""
    net = random_net(config, torch.float64)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    plain, inference = (
        nn.Sequential(one.conv1, one.bn1, one.prelu, one.layer1, one.layer2, one.layer3, one.layer4)
        for one in (net, folded(net))
    )
    with torch.no_grad():
        assert float((plain(x) - inference(x)).abs().max() / plain(x).abs().max()) < 1e-12


def test_the_given_net_stays_as_it_is():
    net = random_net(SMALL[0]).train()
    before = copy.deepcopy(net.state_dict())
    inference = folded(net)
    assert net.training
    assert not inference.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in inference.parameters()}


def test_a_net_that_was_trained_folds():
    torch.manual_seed(1)
    net = build_net(IResNetNet(depth=10, width=8, input_size=48, embedding=8))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(10):
        x = torch.rand(16, 3, 48, 48)
        loss = (net(x) - x.mean((1, 2, 3))[:, None]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    largest, cosine = difference(net.eval(), folded(net))
    assert largest < 1e-4
    assert cosine > 1 - 1e-7


@needs_real_data
def test_the_published_teacher_folds():
    net = open_net(REAL_DATA / "teacher" / "mobilefacenet_y1.safetensors", "mobilefacenet", torch.device("cpu")).net
    largest, cosine = difference(net, folded(net))
    assert largest < 1e-4
    assert cosine > 1 - 1e-7


@pytest.mark.parametrize("config", [SMALL[1], SMALL[-4], SMALL[-1]])
def test_slopes_above_1_are_bounded_and_the_net_computes_the_same(config):
    net = random_net(config)
    for module in net.modules():
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, -1.5, 2.5)
    before = folded(net, channelwise=True)
    after = copy.deepcopy(before)
    bound_slopes(after)
    slopes = torch.cat([module.weight for module in after.modules() if isinstance(module, nn.PReLU)])
    assert slopes.max() <= 1
    assert slopes.min() < -1
    assert difference(before, after)[0] < 1e-4
