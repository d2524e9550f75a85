import copy

import pytest
import torch
from torch import nn

from fr_core.config.nets import IResNetNet, MobileFaceNetNet, MoENet, QuantisedNet
from fr_core.errors import UserError
from fr_core.nets.build import build_net
from fr_core.nets.fold_bn import folded
from fr_core.nets.iresnet import IResNet, SqueezeExcitation
from fr_core.nets.mobilefacenet import MobileFaceNet
from fr_core.nets.prune import narrower, pruned

pytest.importorskip("torch_pruning")

MILLIONS = {18: 17.39, 34: 23.83, 50: 29.83}  # the nets "sp02" of Ef-QuantFace
RESNET = IResNetNet(depth=18, width=16, input_size=48, embedding=8, dropout=0.2)
NETS = [
    RESNET,
    IResNetNet(depth=10, width=16, stem_stride=2, input_size=32, embedding=8),
    IResNetNet(depth=10, width=32, input_size=32, embedding=8, se=True, shortcut="pool"),
    IResNetNet(depth=18, width=16, input_size=32, embedding=8, shortcut="pool", input_mean=0, input_std=255),
    MobileFaceNetNet(input_size=64, embedding=8),
]


@pytest.mark.parametrize("depth", MILLIONS)
def test_a_fifth_less_leaves_the_published_parameters(depth):
    """The count has convolutions, the last linear layer, norms and PReLUs."""
    config = narrower(IResNetNet(depth=depth), [0.2])
    assert config.widths == (51, 102, 204, 409)
    with torch.device("meta"):
        count = sum(p.numel() for p in build_net(config).parameters())
    assert round(count / 1e6, 2) == MILLIONS[depth]


def test_widths_by_stage_and_rounded():
    plain, mobile = IResNetNet(depth=34, dropout=0.4), MobileFaceNetNet()
    assert narrower(plain, [0.2], 8).widths == (48, 96, 200, 408)
    found = narrower(plain, [0, 0.25, 0.5, 0.3], 10)
    assert found == IResNetNet(depth=34, dropout=0.4, widths=(64, 90, 120, 350))
    assert narrower(mobile, [0.2]).widths == (51, 102, 51, 204, 102, 409, 204, 102, 409)
    assert narrower(mobile, [0.5, 0.25, 0]).widths == (32, 64, 32, 192, 96, 512, 256, 128, 512)
    assert narrower(found, [0.5]).widths == (32, 45, 60, 175)
    assert narrower(IResNetNet(width=10), [0.1, 0, 0, 0]).widths == (9, 20, 40, 80)
    assert narrower(IResNetNet(width=100), [0.9]).widths == (10, 20, 40, 80)  # 100·(1 − .9) is 9.99…


@pytest.mark.parametrize(
    ("config", "ratios", "message"),
    [
        (RESNET, [1.0], "between 0 and 1"),
        (RESNET, [0.0], "between 0 and 1"),
        (RESNET, [0.2, -0.1, 0.2, 0.2], "between 0 and 1"),
        (RESNET, [float("nan")], "between 0 and 1"),
        (RESNET, [0.2, 0.2], "one for each of 4 stages"),
        (MobileFaceNetNet(), [0.2] * 4, "one for each of 3 stages"),
        (RESNET, [], "one for each"),
        (RESNET, [0.6], "6 channels, less than 8"),
        (MoENet(depth=10), [0.2], "kind moe"),
        (QuantisedNet(net=RESNET), [0.2], "kind quantised"),
    ],
)
def test_wrong_ratios_and_nets_are_explained(config, ratios, message):
    with pytest.raises(UserError, match=message):
        narrower(config, ratios)


def norms_of_channels(net):
    """Return groups of norms with the same channels, without torch-pruning."""
    if isinstance(net, MobileFaceNet):
        stages = {stage: len(net.get_submodule(stage)) for stage in ("stage3", "stage4", "stage5")}
        inside = [[f"{s}.{i}.expand", f"{s}.{i}.depthwise"] for s, blocks in stages.items() for i in range(blocks)]
        across = [[f"{s}.{i}.project" for i in range(blocks)] for s, blocks in stages.items()]
        groups = [["stem", "stem_depthwise"], *inside, *across, ["expand", "pool"]]
        return [[f"{layer}.bn" for layer in group] for group in groups]
    stages = [len(stage) for stage in (net.layer1, net.layer2, net.layer3, net.layer4)]
    inside = [[f"layer{s}.{i}.bn2"] for s, blocks in enumerate(stages, 1) for i in range(blocks)]
    across = [[f"layer{s}.0.downsample.1", f"layer{s}.0.bn3"] for s in (1, 2, 3, 4)]
    pooled = isinstance(net.layer1[0].downsample, nn.AvgPool2d)
    if pooled:  # the stem's channels go on to the first stage
        across[0] = ["bn1", "layer1.0.bn1", "layer1.0.bn3"]
    for s, blocks in enumerate(stages, 1):
        across[s - 1] += [f"layer{s}.{i}.{norm}" for i in range(1, blocks) for norm in ("bn1", "bn3")]
        across[s - 1] += [f"layer{s + 1}.0.bn1" if s < 4 else "bn2"]
    return [*([] if pooled else [["bn1", "layer1.0.bn1"]]), *inside, *across]


@torch.no_grad()
def settled(config):
    """Return a random net whose norms have statistics of noise and gains between 1 and 2."""
    torch.manual_seed(0)
    net = build_net(config)
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)):
        norm.momentum = 1.0
        norm.weight.uniform_(1, 2)
        norm.bias.normal_(0, 0.5)
    for prelu in (module for module in net.modules() if isinstance(module, nn.PReLU)):
        prelu.weight.uniform_(-1, 1)
    net.train()(torch.randn(4, 3, config.input_size, config.input_size))
    return net.eval()


@torch.no_grad()
@pytest.mark.parametrize("config", NETS)
def test_without_its_dead_channels_a_net_is_what_it_was(config):
    """Norms silence a random fifth of the channels; the last linear layer still has weights for them."""
    net = settled(config)
    smaller = narrower(config, [0.2])
    for group in norms_of_channels(net):
        norms = [net.get_submodule(name) for name in group]
        channels = len(norms[0].weight)
        dead = torch.randperm(channels)[: channels - int(channels * 0.8)]
        for norm in norms:
            norm.weight[dead], norm.bias[dead] = 0, 0
    for se in (module for module in net.modules() if isinstance(module, SqueezeExcitation)):
        inside, channels = se.fc1.weight.shape[:2]
        se.fc1.weight[: inside - max(1, int(channels * 0.8) // 16)] = 0
    before = copy.deepcopy(net.state_dict())
    left = pruned(net, smaller, "bn").eval()
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert {name: t.shape for name, t in left.state_dict().items()} == {
        name: t.shape for name, t in build_net(smaller).state_dict().items()
    }
    x = torch.randn(3, 3, config.input_size, config.input_size)
    whole, out = net(x), left(x)
    assert whole.abs().max() > 0.1
    assert (whole - out).abs().max() < 1e-5 * whole.abs().max()
    assert (folded(left)(x) - out).abs().max() < 1e-4 * out.abs().max()  # pruned nets can be folded


@pytest.mark.parametrize(("importance", "power"), [("l1", 1), ("l2", 2)])
def test_the_channels_of_largest_weights_stay(importance, power):
    """A channel inside a block is worth its filter, its gain and the weights that read it."""
    net = settled(RESNET)
    left = pruned(net, narrower(RESNET, [0.2]), importance)
    for name in ("layer1.1", "layer3.0", "layer4.1"):
        block, found = net.get_submodule(name), left.get_submodule(name)
        made = block.conv1.weight.abs().pow(power).sum((1, 2, 3))
        read = block.conv2.weight.abs().pow(power).sum((0, 2, 3))
        worth = made + block.bn2.weight.abs().pow(power) + read
        kept = worth.topk(int(0.8 * len(worth))).indices.sort().values
        assert torch.equal(found.bn2.weight, block.bn2.weight[kept])
        assert torch.equal(found.prelu.weight, block.prelu.weight[kept])


def test_gains_alone_may_decide():
    net = settled(RESNET)
    left = pruned(net, narrower(RESNET, [0.2]), "bn")
    gain = net.layer2[0].bn2.weight
    assert torch.equal(left.layer2[0].bn2.weight, gain[gain.topk(25).indices.sort().values])


def test_a_stage_that_loses_nothing_stays():
    net = settled(RESNET)
    left = pruned(net, narrower(RESNET, [0, 0, 0, 0.5]))
    assert isinstance(left, IResNet)
    assert torch.equal(left.layer3[1].conv2.weight, net.layer3[1].conv2.weight)
    assert left.layer4[1].conv1.weight.shape == (64, 64, 3, 3)
    assert left.features.weight.requires_grad is False
    assert left.conv1.weight.requires_grad


def test_an_unknown_importance_is_refused():
    with pytest.raises(UserError, match="one of l1, l2, bn"):
        pruned(build_net(RESNET), narrower(RESNET, [0.2]), "taylor")
