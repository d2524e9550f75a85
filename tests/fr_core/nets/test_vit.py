"""The vision transformer: its published sizes, its formula, and what training leaves out. Legend: as in vit.py."""

import math

import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from fr_core.config.nets import QuantisedNet, ViTNet
from fr_core.config.recipes import parse_config
from fr_core.errors import UserError
from fr_core.nets.build import build_net
from fr_core.nets.fold_bn import folded
from fr_core.nets.onnx_net import open_onnx, write_onnx
from fr_core.nets.open import open_net
from fr_core.nets.prune import narrower
from fr_core.nets.vit import Tower
from fr_core.optim.optimizers import make_optimizers
from fr_core.ranks import Ranks
from fr_core.train.work import backbone_work
from pipelines.bench.latency import NETS, name_of
from pipelines.nets.quantize import float_net
from tests.helpers.nets import random_net

SMALL = {"depth": 3, "width": 32, "heads": 4, "patch": 9, "input_size": 48, "embedding": 16}
# Section, giga-multiplications that insightface publishes (arcface_torch/README.md, "ViT For Face Recognition").
PUBLISHED = {
    "ViT-T": (ViTNet(width=256), 1.5),
    "ViT-S": (ViTNet(), 5.7),
    "ViT-B": (ViTNet(depth=24, mask=0.1), 11.4),
    "ViT-L": (ViTNet(depth=24, width=768, mask=0.1), 25.3),
}
# Millions of parameters. insightface and CVLface publish none: these count the layers of their code.
PARAMETERS = {
    "ViT-T": 19.138,
    "ViT-S": 76.023,
    "ViT-B": 113.833,
    "ViT-L": 255.684,
    "CVLface small": 95.952,
    "CVLface base": 114.870,
}
CVLFACE = {
    "CVLface small": ViTNet(patch=8, mlp_ratio=5),
    "CVLface base": ViTNet(patch=8, mlp_ratio=3, depth=24, heads=16),
}


def parameters_of(width, depth, tokens, patch, ratio, mask):
    """Count the layers of insightface's and CVLface's code one by one."""
    norm, linear = 2 * width, ratio * width * width
    block = norm + 3 * width**2 + (width**2 + width) + norm + (linear + ratio * width) + (linear + width)
    start = 3 * patch**2 * width + width + tokens * width + mask * width
    return start + depth * block + norm + tokens * width**2 + 2 * width + 512 * width + 2 * 512


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_published_code(name):
    config = (CVLFACE | {name: section for name, (section, _) in PUBLISHED.items()})[name]
    with torch.device("meta"):
        count = sum(p.numel() for p in build_net(config).parameters())
    tokens = (112 // config.patch) ** 2
    sizes = (config.width, config.depth, tokens, config.patch, config.mlp_ratio)
    assert count == parameters_of(*sizes, config.mask > 0)
    assert count / 1e6 == pytest.approx(PARAMETERS[name], abs=1e-3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_multiplications_are_the_published_ones(name):
    """The published count has all patches."""
    config, giga = PUBLISHED[name]
    counted = backbone_work(config.model_copy(update={"mask": 0.0}), 2, 112, "float32").forward
    flops = sum(operator.flops * count for operator, count in counted.items())
    assert round(flops / 2 / 2e9, 1) == giga  # of two images, and a multiplication and an addition each


def norm_of(x, layer):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer["weight"] + layer["bias"]


def tower_of(state, x_BTC, heads, depth):
    """The blocks by their formulas, head by head, in the precision of ``x_BTC``."""
    for i in range(depth):
        part = {name.removeprefix(f"tower.{i}."): t for name, t in state.items() if name.startswith(f"tower.{i}.")}
        layer = {
            name: {k.removeprefix(f"{name}."): t for k, t in part.items() if k.startswith(f"{name}.")}
            for name in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2")
        }
        query, key, value = (norm_of(x_BTC, layer["norm1"]) @ layer["qkv"]["weight"].T).chunk(3, 2)
        channels, mixed = x_BTC.shape[2] // heads, []
        for q, k, v in zip(query.split(channels, 2), key.split(channels, 2), value.split(channels, 2), strict=True):
            mixed.append((q @ k.mT / math.sqrt(channels)).softmax(2) @ v)
        x_BTC = x_BTC + torch.cat(mixed, 2) @ layer["proj"]["weight"].T + layer["proj"]["bias"]
        inside = norm_of(x_BTC, layer["norm2"]) @ layer["fc1"]["weight"].T + layer["fc1"]["bias"]
        x_BTC = x_BTC + inside.clamp(0, 6) @ layer["fc2"]["weight"].T + layer["fc2"]["bias"]
    return x_BTC


def embedding_of(state, x_BCHW, heads, depth, patch):
    side = x_BCHW.shape[2] // patch
    tiles = x_BCHW[:, :, : side * patch, : side * patch].unfold(2, patch, patch).unfold(3, patch, patch)
    flat = tiles.permute(0, 2, 3, 1, 4, 5).reshape(len(x_BCHW), side**2, -1)
    x_BTC = flat @ state["patches.weight"].flatten(1).T + state["patches.bias"]
    x = tower_of(state, x_BTC + state["positions"].view(side**2, -1), heads, depth)
    x = norm_of(x, {"weight": state["norm.weight"], "bias": state["norm.bias"]}).flatten(1)
    for linear, norm in (("reduce", "bn"), ("fc", "features")):
        x = x @ state[f"{linear}.weight"].T - state[f"{norm}.running_mean"]
        x = x / (state[f"{norm}.running_var"] + 2e-5).sqrt() * state[f"{norm}.weight"] + state[f"{norm}.bias"]
    return x


def loud(net):
    """Multiply the small initial weights, so that attention is far from equal and ReLU6 clips on both sides."""
    with torch.no_grad():
        for param in net.tower.parameters():
            param.add_(torch.randn_like(param), alpha=0.5)
    return net


def test_blocks_follow_the_formula_with_their_gradients():
    """In float64, whose products and sums leave relative errors of about 1e-14 in three blocks."""
    torch.manual_seed(0)
    tower = loud(build_net(ViTNet(**SMALL))).double().eval().tower
    x_BTC = torch.randn(2, 7, 32, dtype=torch.float64)
    state = {f"tower.{name}": t.detach().clone().requires_grad_() for name, t in tower.named_parameters()}
    ours, theirs = tower(x_BTC), tower_of(state, x_BTC, 4, 3)
    assert (ours - theirs).abs().max() < 1e-11 * theirs.abs().max()
    toward = torch.randn_like(ours)
    (ours * toward).sum().backward()
    (theirs * toward).sum().backward()
    for name, param in tower.named_parameters():
        expected = state[f"tower.{name}"].grad
        assert (param.grad - expected).abs().max() < 1e-10 * expected.abs().max().clamp(min=1)


def test_the_whole_net_follows_the_formula():
    """float32 against float64: about a hundred roundings of 6e-8 in a row stay far below 1e-4."""
    net = loud(random_net(ViTNet(**SMALL)))
    x_BCHW = torch.randn(3, 3, 48, 48)
    state = {name: tensor.double() for name, tensor in net.state_dict().items()}
    expected = embedding_of(state, x_BCHW.double(), 4, 3, 9)
    with torch.no_grad():
        assert (net(x_BCHW) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("patch", [6, 8, 9])
def test_embeddings_are_float32_at_any_size_and_under_autocast(patch):
    config = ViTNet(**SMALL | {"patch": patch})
    net = build_net(config)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = net(torch.randn(3, 3, 48, 48))
        assert out.shape == (3, 16)
        assert out.dtype == torch.float32
    with pytest.raises(RuntimeError):
        net(torch.randn(3, 3, 64, 64))  # has no positions for more patches


def test_initial_weights_have_the_published_scale():
    """A standard deviation of n numbers is known to 1 / √(2n) of itself: to 1.3 % for 3,200 positions."""
    net = build_net(ViTNet(depth=1, width=128, patch=9, input_size=48, mask=0.5))
    for weight in (net.tower[0].qkv.weight, net.tower[0].fc2.weight, net.fc.weight, net.positions):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.07)
    assert float(net.mask_token.detach().std()) == pytest.approx(0.02, rel=0.35)  # 128 numbers
    assert not net.tower[0].fc1.bias.any()


# What training leaves out


def test_branches_are_skipped_the_more_often_the_later_they_are():
    """A mean over n choices lies within 5 standard deviations of its expectation."""
    tower = Tower(*(torch.nn.Identity() for _ in range(4)))
    tower.drop_path = 0.6
    torch.manual_seed(0)
    shares_N2B = tower.draw(torch.zeros(5000, 1, 1))[..., 0, 0]
    for block, chance in enumerate((0.0, 0.2, 0.4, 0.6)):
        kept = shares_N2B[block][shares_N2B[block] > 0]
        assert torch.allclose(kept, torch.full_like(kept, 1 / (1 - chance)))
        off = abs(float((shares_N2B[block] == 0).float().mean()) - chance)
        assert off <= 5 * (chance * (1 - chance) / 10_000) ** 0.5
    assert bool((shares_N2B[3, 0] != shares_N2B[3, 1]).any())  # both branches are drawn apart


def test_a_skipped_branch_adds_nothing_and_another_its_share():
    net = loud(build_net(ViTNet(**SMALL)))
    block, x_BTC = net.tower[0], torch.randn(2, 5, 32)
    share_2B11 = torch.tensor([[0.0, 2.0], [0.0, 0.0]])[:, :, None, None]
    out = block(x_BTC, share_2B11)
    assert torch.equal(out[0], x_BTC[0])
    assert torch.equal(out[1], (x_BTC + 2 * block.attend(x_BTC))[1])


def test_masked_patches_pass_no_gradient_and_leave_the_mask_token():
    net = build_net(ViTNet(**SMALL, mask=0.3)).train()
    seen = {}
    net.tower.register_forward_pre_hook(lambda _, given: seen.update(tokens=given[0].shape[1]))
    net.reduce.register_forward_pre_hook(lambda _, given: seen.update(all=given[0].detach()))
    x_BCHW = torch.randn(2, 3, 48, 48, requires_grad=True)
    net(x_BCHW).square().sum().backward()
    assert seen["tokens"] == int(25 * 0.7) == 17
    masked_BT = (seen["all"].view(2, 25, 32) == net.mask_token).all(2)
    assert masked_BT.sum(1).tolist() == [8, 8]
    assert not torch.equal(*masked_BT)  # each image has its own
    tiles = x_BCHW.grad[:, :, :45, :45].unfold(2, 9, 9).unfold(3, 9, 9).abs().sum((1, 4, 5)).flatten(1)
    assert torch.equal(tiles == 0, masked_BT)
    assert bool(net.mask_token.grad.any())
    net.eval()(x_BCHW)
    assert seen["tokens"] == 25


def test_an_encoder_leaves_nothing_out():
    net = build_net(ViTNet(**SMALL, mask=0.3, drop_path=0.5)).train()
    net.stop_dropout()
    x_BCHW = torch.randn(4, 3, 48, 48)
    assert torch.equal(net(x_BCHW), net(x_BCHW))


def test_norms_biases_and_positions_do_not_decay():
    config = parse_config({"optim": {"kind": "adamw"}, "method": {"kind": "quantface"}}, "test")
    net = build_net(ViTNet(**SMALL, mask=0.3))
    matrices, vectors = make_optimizers(config, net, None, Ranks())["backbone"].param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.05, 0)
    decayed = {id(param) for param in matrices["params"]}
    names = {name for name, param in net.named_parameters() if id(param) in decayed}
    blocks = {f"tower.{i}.{layer}.weight" for i in range(3) for layer in ("qkv", "proj", "fc1", "fc2")}
    assert names == blocks | {"patches.weight", "reduce.weight", "fc.weight"}


# Around the net


@pytest.mark.parametrize("patch", [6, 9])
def test_onnx_files_agree_at_batch_one_and_eight(tmp_path, patch):
    """float32 against float32: as in the formula's test, and ONNX Runtime may sum in another order."""
    net = loud(random_net(ViTNet(**SMALL | {"patch": patch})))
    write_onnx(folded(net), tmp_path / "net.onnx")
    opened = open_onnx(tmp_path / "net.onnx")
    assert opened.name == "vit"
    for images in (1, 8):
        x_BCHW = torch.randn(images, 3, 48, 48)
        with torch.no_grad():
            expected = net(x_BCHW)
        assert (opened(x_BCHW) - expected).abs().max() < 1e-5 * expected.abs().max()
    model = onnx.load(tmp_path / "net.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions


def test_what_cannot_be_done_with_it_is_refused_in_one_line(tmp_path):
    config, path = ViTNet(**SMALL), tmp_path / "net.safetensors"
    net = build_net(config)
    save_file(net.state_dict(), path, {"net": config.model_dump_json()})
    assert open_net(path, "vit").config == config
    with pytest.raises(UserError, match=r'net\.kind = "vit" cannot be quantised: take an iresnet'):
        float_net(str(path), None)
    with pytest.raises(UserError, match=r"nets of kind vit cannot be pruned: give an iresnet"):
        narrower(config, [0.2])
    with pytest.raises(ValueError, match="iresnet"):
        QuantisedNet.model_validate({"net": config.model_dump()})
    save_file(net.state_dict(), path)
    with pytest.raises(UserError, match=r"net\.safetensors holds a vision transformer of bigface, without its section"):
        open_net(path)


@pytest.mark.parametrize(
    ("net", "other", "mistake"),
    [
        ({"width": 100}, {}, r"net.heads = 8 does not divide net.width = 100"),
        ({"patch": 120}, {}, r"net.patch = 120 is more than net.input_size = 112"),
        ({"patch": 112, "mask": 0.1}, {}, r"net.mask = 0.1 leaves no patch: lower it"),
        (
            {},
            {"data": {"progressive": {"size": 96, "share": 0.5}}},
            r"data.progressive is for nets that take smaller images",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(net, other, mistake):
    with pytest.raises(UserError, match=mistake):
        parse_config({"net": {"kind": "vit"} | net} | other, "test")


def test_the_latency_bench_tells_its_nets_apart():
    names = [name_of(config) for config in NETS]
    assert len(set(names)) == len(names)
    assert {"vit256x12", "vit512x12", "vit512x24"} <= set(names)


def test_the_reference_of_this_file_clips_as_relu6_does():
    x = torch.linspace(-3, 9, 50)
    assert torch.equal(x.clamp(0, 6), F.relu6(x))
