import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from fr_core.config.nets import IResNetNet, MobileFaceNetNet, QuantisedNet
from fr_core.errors import UserError
from fr_core.nets.build import build_net
from fr_core.nets.calibration import SHARES, calibrate, least_error
from fr_core.nets.quantised import Quantised
from fr_core.nets.quantised_layers import ActQuant, QuantPReLU, QuantSE, Weighted
from fr_core.ranks import Ranks
from tests.helpers.nets import random_net
from tests.helpers.ranks import run_ranks

NETS = {
    "iresnet": IResNetNet(depth=10, width=8, input_size=32, embedding=8),
    "ir_se": IResNetNet(depth=10, width=16, input_size=32, embedding=8, se=True, inner_norm=False, shortcut="pool"),
    "mobilefacenet": MobileFaceNetNet(input_size=32, embedding=8),
}


def images(count=16, seed=0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def trained(config):
    """Return a random net whose norms have statistics of its inputs, as after training."""
    torch.manual_seed(0)
    net = build_net(config)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, -0.5, 1.5)
    net.features.weight.data.fill_(1)
    with torch.no_grad():
        net.train()(images(32))
    return net.eval()


def quantised(net, config, **options):
    """Return ``net`` in integers, calibrated."""
    options = QuantisedNet(net=config, **options)
    made = Quantised(net, options)
    calibrate(made, lambda: iter(images(32).split(16)), Ranks(), options)
    return made


def cosine(a, b):
    return nn.functional.cosine_similarity(a, b).min().item()


@torch.no_grad()
@pytest.mark.parametrize("config", NETS.values(), ids=NETS)
def test_eight_bits_are_near_the_float_net_and_fewer_are_farther(config):
    """Compares means over 64 images: the least cosine depends on how a processor rounds one image."""
    net, x = trained(config), images(64, seed=1)
    made = (quantised(net, config, weights=bits, activations=bits) for bits in (8, 4))
    near, far = (nn.functional.cosine_similarity(one(x), net(x)).mean() for one in made)
    assert near > 0.95
    assert near > far + 0.05


@torch.no_grad()
@pytest.mark.parametrize("config", NETS.values(), ids=NETS)
@pytest.mark.parametrize("scheme", ["integer", "quantface"])
def test_without_rounding_it_is_the_float_net(config, scheme):
    """Folding, slopes above 1 and equalised channels change nothing but the grid."""
    net = random_net(config) if config.kind == "mobilefacenet" else trained(config)
    made = quantised(net, config, scheme=scheme)
    for module in list(made.modules()):
        if isinstance(module, Weighted):
            layer = module.layer
            layer.weight_quant.disable_quant = True
            layer.forward = _plain(layer)
        if isinstance(module, QuantPReLU):
            module._slopes = lambda module=module: module.slope
        if isinstance(module, QuantSE):
            module.rounded = False
        if isinstance(module, ActQuant):
            module.forward = lambda x: x
    x = images(8, seed=1)
    ours, theirs = made.train()(x), net(x)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def _plain(layer):
    if isinstance(layer, nn.Linear):
        return lambda x: nn.functional.linear(x, layer.weight, layer.bias)
    return lambda x: nn.functional.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, 1, layer.groups)


def test_activations_lie_on_their_grid_and_clipping_stops_gradients():
    quantiser = ActQuant(3)
    quantiser.set_range(torch.tensor(-1.0), torch.tensor(2.5))
    scale, zero = quantiser.scale.item(), quantiser.zero_point.item()
    assert (scale, zero) == (0.5, 2)
    x = torch.tensor([-9.0, -1.1, -0.74, 0.0, 0.25, 0.75, 1.3, 2.4, 9.0], requires_grad=True)
    y = quantiser(x)
    y.sum().backward()
    codes = np.clip(np.round(x.detach().numpy() / scale) + zero, 0, 7)  # NumPy rounds halves to even too
    assert y.tolist() == ((codes - zero) * scale).tolist()
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0]


def test_a_range_holds_zero():
    quantiser = ActQuant(8)
    quantiser.set_range(torch.tensor(3.0), torch.tensor(5.1))
    assert (quantiser.zero_point.item(), quantiser.scale.item()) == (0, pytest.approx(0.02))
    assert quantiser(torch.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("bits", "slope"), [(2, 1), (4, 1), (8, 1), (4, 0.1)])
def test_least_error_finds_what_trying_all_ranges_finds(bits, slope):
    """Also for the output of a PReLU of that slope."""
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(bits)) ** 3  # long tails
    counts = torch.where(values < 0, slope**2, 1.0)

    def error(low, high):
        quantiser = ActQuant(bits)
        quantiser.set_range(low, high)
        left, wanted = (F.prelu(x, torch.tensor([float(slope)])) for x in (quantiser(values), values))
        return (left - wanted).square().mean().item()

    low, high = values.amin(), values.amax()
    shares = torch.arange(1, SHARES + 1) / SHARES
    best = min(error(low * a, high * b) for a in shares for b in shares)
    assert error(*least_error(values, counts, bits)) <= 1.02 * best  # it looks at a histogram only
    if bits < 8:
        assert best < 0.9 * error(low, high)


@pytest.mark.parametrize("bits", [2, 6, 8])
def test_weights_are_symmetric_integers_per_output_channel(bits):
    config = NETS["iresnet"]
    made = quantised(trained(config), config, weights=bits)
    most = 2 ** (bits - 1) - 1
    for module in made.modules():
        if isinstance(module, Weighted):
            codes, scale_O, _ = module.integers()
            weight = module.layer.weight.detach()
            assert codes.abs().flatten(1).amax(1).eq(most).all()
            assert torch.allclose(scale_O, weight.abs().flatten(1).amax(1) / most)
            steps = weight / scale_O.view(-1, *[1] * (weight.ndim - 1))
            assert (codes - steps).abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize("scheme", ["integer", "quantface"])
def test_every_parameter_gets_a_gradient(scheme):
    config = NETS["iresnet"]
    made = quantised(trained(config), config, weights=6, activations=6, scheme=scheme).train()
    made(images(8)).square().sum().backward()
    without = [name for name, weight in made.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert without == []


@torch.no_grad()
def test_quantfaces_weights_reach_from_least_to_greatest():
    config = NETS["iresnet"]
    made = Quantised(trained(config), QuantisedNet(net=config, weights=4, scheme="quantface"))
    conv = made.layers[1].layer
    on_grid = conv.quant_weight().value
    assert torch.allclose(on_grid.amax((1, 2, 3)), conv.weight.amax((1, 2, 3)), atol=0.02)
    assert torch.allclose(on_grid.amin((1, 2, 3)), conv.weight.amin((1, 2, 3)), atol=0.02)
    assert all(len(row.unique()) <= 16 for row in on_grid)


@pytest.mark.parametrize(("norms", "layer"), [(["bn3", "downsample.1"], "4.branch.3.out"), (["bn2"], "4.branch.1.out")])
def test_a_dead_layer_is_named(norms, layer):
    config = NETS["iresnet"]
    net = trained(config)
    for norm in norms:
        nn.init.zeros_(net.layer2[0].get_submodule(norm).weight)
        nn.init.zeros_(net.layer2[0].get_submodule(norm).bias)
    with pytest.raises(UserError, match=rf"all \d+ sampled outputs of layer {layer} are 0: .* without dead layers"):
        quantised(net, config)


def test_broken_weights_are_named():
    config = NETS["iresnet"]
    net = trained(config)
    net.layer3[0].conv2.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=r"outputs of layer \S+ are not finite"):
        quantised(net, config)


@torch.no_grad()
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_slope_rounds_above_one(bits):
    """Integer kernels compute max(x, slope·x), which is a PReLU only for slopes up to 1."""
    prelu = nn.PReLU(4)
    prelu.weight.copy_(torch.tensor([-1.26, 0.995, 1.0, 0.3]))
    module = QuantPReLU(prelu, QuantisedNet(net=NETS["iresnet"], weights=bits), ActQuant(8))
    codes_C, scale = module.int_slope()
    assert (codes_C * scale).max() <= 1 + 1e-6
    assert torch.allclose(codes_C * scale, module._slopes())


@pytest.mark.parametrize("field", ["weights", "activations"])
@pytest.mark.parametrize("bits", [1, 9])
def test_two_to_eight_bits(field, bits):
    with pytest.raises(ValidationError):
        QuantisedNet(net=NETS["iresnet"], **{field: bits})


def _calibrated(ranks, state):
    config = NETS["iresnet"]
    options = QuantisedNet(net=config, activations=6)
    net = build_net(config)
    net.load_state_dict(state)
    made = Quantised(net.eval(), options)
    share = slice(8 * ranks.rank, 8 * (ranks.rank + 1)) if ranks.size == 2 else slice(None)
    calibrate(made, lambda: (batch[share] for batch in images(32).split(16)), ranks, options)
    return copy.deepcopy(made.state_dict())


def test_two_ranks_calibrate_as_one():
    state = trained(NETS["iresnet"]).state_dict()
    alone = run_ranks(1, _calibrated, state)[0]
    for shared in run_ranks(2, _calibrated, state):
        for name, value in alone.items():
            assert torch.allclose(shared[name].float(), value.float(), rtol=1e-4, atol=1e-6), name
