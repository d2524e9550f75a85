import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fr_core.config.nets import GhostFaceNetNet
from fr_core.config.recipes import load_config
from fr_core.errors import UserError
from fr_core.nets.backbone import normalised
from fr_core.nets.build import build_net
from fr_core.nets.fold_bn import folded
from fr_core.nets.onnx_net import open_onnx, write_onnx
from fr_core.nets.prelu import PReLU
from fr_core.nets.prune import narrower
from tests.helpers.nets import random_net
from tests.helpers.runs import config_of, interrupted, last_weights, losses, run

# Of GhostFaceNetV1 1.3-1 and 1.3-2. Later papers quote 4.1 million parameters for 1.3-1; Keras counts the statistics of
# norms, too. MFLOPs are those of plot_parameters.py in github.com/HamadYA/GhostFaceNets, the code of the paper (IEEE
# Access 2023, doi 10.1109/ACCESS.2023.3266068).
PUBLISHED = {1: (4.1, 215.7), 2: (None, 60.3)}
SMALL = GhostFaceNetNet(width=0.5, input_size=32, embedding=32)
NET = "net={kind='ghostfacenet', width=0.5, input_size=32, embedding=32}"
LENGTH = ("train.max_steps=6", "train.save_every=2")


@pytest.mark.parametrize("stem_stride", PUBLISHED)
def test_parameters_and_flops_are_the_published_ones(stem_stride):
    """Keras counts a multiplication with its addition as one, and half of each number out of a norm or a PReLU."""
    config = GhostFaceNetNet(stem_stride=stem_stride)
    millions, mflops = PUBLISHED[stem_stride]
    fake = FakeTensorMode()  # shapes without memory
    with fake:
        net = build_net(config)
    tensors = [*net.parameters(), *(buffer for buffer in net.buffers() if buffer.ndim)]
    if millions:
        assert round(sum(tensor.numel() for tensor in tensors) / 1e6, 1) == millions
    found = 0.0

    def count(module, given, out):
        nonlocal found
        swept = isinstance(module, nn.BatchNorm2d | PReLU)
        found += out[0].numel() * (0.5 if swept else module.weight[0].numel())

    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | PReLU | nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with fake:
        net.eval()(torch.empty(1, 3, 112, 112))
    assert round(found / 1e6, 1) == mflops


@pytest.mark.parametrize("config", [SMALL, GhostFaceNetNet(input_size=112, stem_stride=2, width=1.0, embedding=16)])
def test_it_maps_images_to_embeddings_and_each_weight_gets_a_gradient(config):
    net = build_net(config)
    size = config.input_size
    with torch.autocast("cpu", torch.bfloat16):
        out = net(torch.randn(3, 3, size, size))
    assert out.shape == (3, config.embedding)
    assert out.dtype == torch.float32
    (out * torch.randn_like(out)).sum().backward()
    still = [name for name, weight in net.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert still == ["features.weight"]


def test_the_first_maps_neither_vanish_nor_grow():
    """The weights of a depthwise filter are drawn for its one input."""
    torch.manual_seed(0)
    net = build_net(SMALL)
    for name, conv in net.named_modules():
        if isinstance(conv, nn.Conv2d) and conv.weight.numel() > 1000:
            fan = conv.weight[0].numel() if conv.groups > 1 else conv.weight[0, 0].numel() * conv.out_channels
            assert float(conv.weight.detach().std()) == pytest.approx((2 / fan) ** 0.5, rel=0.2), name


def test_its_onnx_file_computes_the_same_for_one_face_and_for_eight(tmp_path):
    net = random_net(SMALL)
    write_onnx(folded(net), tmp_path / "net.onnx", None)
    opened = open_onnx(tmp_path / "net.onnx")
    for faces in (1, 8):
        x = normalised(torch.randint(0, 256, (faces, 32, 32, 3), dtype=torch.uint8), net)
        with torch.no_grad():
            ours = net(x)
        assert float((ours - opened(x)).abs().max() / ours.abs().max()) < 1e-5


@pytest.mark.parametrize(
    "extra",
    [
        ["optim={kind='muon'}", "train.ghost_batch=8"],
        ["optim={kind='lars', lr=2.0, head={lr=0.05}}", "train.ema=0.5"],
    ],
)
def test_a_resumed_run_is_bit_identical(dataset, tmp_path, monkeypatch, extra):
    config = config_of(dataset, NET, *LENGTH, *extra)
    run(config, tmp_path / "whole")
    interrupted(config, tmp_path / "resumed", 3, monkeypatch)
    run(config, tmp_path / "resumed")
    assert losses(tmp_path / "whole") == losses(tmp_path / "resumed")
    ours, theirs = last_weights(tmp_path / "whole"), last_weights(tmp_path / "resumed")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_it_does_not_support_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"recompute is for residual nets: leave it out with net\.kind = ghostfacenet"):
        load_config("debug_bigface", [NET, "train.recompute=true"])
    with pytest.raises(UserError, match="nets of kind ghostfacenet cannot be pruned"):
        narrower(SMALL, [0.2])
    with pytest.raises(UserError, match="ghostfacenet"):
        load_config("quantize_ekd", ["net.net={kind='ghostfacenet'}"])
