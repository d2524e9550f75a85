"""Frozen weights and the rates of layers."""

import pytest
import torch

from fr_core.config.nets import IResNetNet, MobileFaceNetNet
from fr_core.errors import UserError
from fr_core.nets.backbone import Backbone
from fr_core.nets.build import build_net
from fr_core.nets.finetune import freeze, layer_rates, set_mode
from fr_core.nets.ghost import use_ghost_batches

SMALL = IResNetNet(depth=18, width=8, input_size=32, embedding=16)
MOBILE = MobileFaceNetNet(input_size=32)


def frozen_names(net):
    return {name for name, param in net.named_parameters() if not param.requires_grad}


@pytest.mark.parametrize("ghost", [False, True])
def test_patterns_freeze_weights_and_the_modules_that_hold_no_others(ghost):
    net = build_net(SMALL)
    if ghost:
        use_ghost_batches(net, 2)
    frozen = freeze(net, ["conv1*", "layer1.*", "*.bn2.weight"])
    prefixes = ("conv1.", "layer1.")
    wanted = {n for n, _ in net.named_parameters() if n.startswith(prefixes) or n.endswith(".bn2.weight")}
    assert frozen_names(net) == wanted | {"features.weight"}
    assert {"conv1", "layer1", "layer1.0", "layer1.1.bn2"} <= frozen
    assert not {"", "layer2", "layer2.0", "layer2.0.bn2", "bn1", "features"} & frozen


def test_frozen_modules_stay_in_eval_mode_and_others_do_not():
    net = build_net(SMALL)
    frozen = freeze(net, ["layer1.*", "features.bias"])
    set_mode(net, True, frozen)
    assert not any(module.training for module in net.layer1.modules())
    assert not net.features.training  # its gain is fixed as well
    assert net.training
    assert net.layer2[0].bn1.training
    set_mode(net, False, frozen)
    assert not any(module.training for module in net.modules())


def test_a_gain_that_no_net_trains_freezes_no_norm():
    assert freeze(build_net(SMALL), []) == frozenset()
    assert "features" not in freeze(build_net(SMALL), ["layer1.*"])


def test_a_norm_without_weights_is_frozen_with_its_neighbours():
    class Net(Backbone):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4, affine=False))
            self.norm, self.fc = torch.nn.BatchNorm2d(4, affine=False), torch.nn.Linear(4, 2)

    assert freeze(Net(), ["stem.*"]) == {"stem", "stem.0", "stem.1"}


def test_the_backward_pass_ends_at_the_first_layer_that_is_trained():
    net = build_net(SMALL)
    set_mode(net, True, freeze(net, ["conv1*", "bn1*", "prelu*", "layer1.*", "layer2.*"]))
    reached = []
    for layer in (net.layer1, net.layer2, net.layer3):
        layer.register_forward_hook(lambda module, given, out: reached.append(out.requires_grad))
    net(torch.randn(4, 3, 32, 32)).sum().backward()
    assert reached == [False, False, True]
    assert all((param.grad is None) == (name in frozen_names(net)) for name, param in net.named_parameters())


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("layer5.*", r"no weight .* like layer5\.\*: did you mean layer\d\.\*\? Its parts: conv1, bn1, prelu, layer1"),
        ("layer1", r"did you mean layer1\.\*\?"),  # a pattern is of the whole name
        ("backbone.stages", "Its parts: conv1, bn1, .*, fc, features$"),
    ],
)
def test_a_pattern_that_matches_nothing_is_told_what_there_is(pattern, told):
    with pytest.raises(UserError, match=told) as error:
        freeze(build_net(SMALL), ["layer2.*", pattern])
    assert "\n" not in str(error.value)


def test_nothing_left_to_train_is_refused_with_what_trains_the_head_alone():
    with pytest.raises(UserError, match=r"finetune\.head_epochs=EPOCHS"):
        freeze(build_net(SMALL), ["*"])


@pytest.mark.parametrize(
    ("config", "layers", "blocks"),
    [
        (
            SMALL,
            {"conv1.weight": 0, "prelu.weight": 0, "layer1.0.bn1.bias": 1, "layer1.1.conv2.weight": 2}
            | {"layer3.0.downsample.0.weight": 5, "layer4.1.bn3.weight": 8, "bn2.weight": 9, "fc.weight": 9},
            8,
        ),
        (
            MOBILE,
            {"stem.conv.weight": 0, "stem_depthwise.bn.bias": 0, "stage3.0.expand.conv.weight": 1}
            | {"stage3.4.project.bn.weight": 5, "stage4.0.expand.conv.weight": 6, "stage5.2.project.bn.bias": 15}
            | {"expand.conv.weight": 16, "pool.conv.weight": 16, "features.bias": 16},
            15,
        ),
    ],
    ids=["iresnet", "mobilefacenet"],
)
def test_the_rate_of_each_layer_follows_the_formula(config, layers, blocks):
    net = build_net(config)
    rates = layer_rates(net, 0.5)  # a power of two has exact powers
    assert len(rates) == len(list(net.parameters()))
    for name, layer in layers.items():
        assert rates[net.get_parameter(name)] == 2.0 ** -(blocks + 1 - layer), name


def test_what_lies_between_blocks_belongs_to_the_block_before():
    class Net(Backbone):
        def __init__(self):
            super().__init__()
            self.token = torch.nn.Parameter(torch.zeros(2))
            self.one, self.between, self.two, self.end = (torch.nn.Linear(2, 2) for _ in range(4))

        def blocks(self):
            return [self.one, self.two]

    net = Net()
    shares = [layer_rates(net, 0.5)[param] for param in net.parameters()]
    assert shares == [1 / 8, *[1 / 4] * 4, *[1 / 2] * 2, *[1.0] * 2]


def test_a_net_without_blocks_has_no_rates_of_layers():
    class Net(Backbone):
        pass

    assert layer_rates(Net(), 1.0) == {}
    with pytest.raises(UserError, match="names none: leave it out"):
        layer_rates(Net(), 0.9)
