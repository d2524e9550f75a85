"""int8 files: ONNX Runtime's integer kernels compute what the quantised net computes in PyTorch."""

import copy
import functools

import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import nn

from fr_core.config.nets import IResNetNet, MobileFaceNetNet, QuantisedNet
from fr_core.errors import UserError
from fr_core.nets import onnx_net
from fr_core.nets.build import build_net
from fr_core.nets.calibration import calibrate
from fr_core.nets.onnx_net import INPUT, OUTPUT, open_onnx, saturates, write_onnx
from fr_core.nets.open import open_net
from fr_core.nets.qdq import qdq_model
from fr_core.nets.quantised import Quantised
from fr_core.nets.quantised_layers import QuantAdd, QuantConv, QuantPReLU
from fr_core.nets.verifications import Verified
from fr_core.ranks import Ranks

NETS = {
    "iresnet": IResNetNet(depth=10, width=8, input_size=32, embedding=16),
    "ir_se": IResNetNet(depth=10, width=16, input_size=32, embedding=16, se=True, inner_norm=False, shortcut="pool"),
    "mobilefacenet": MobileFaceNetNet(input_size=32, embedding=16),
}
FORMS = [
    ("mobilefacenet", 8, 8),
    ("ir_se", 8, 8),
    ("ir_se", 6, 6),
    *(("iresnet", *bits) for bits in ((8, 8), (6, 6), (4, 4), (8, 5))),
]


def noise(images, seed=1):
    return torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def quantised(kind, weights=8, activations=8):
    return copy.deepcopy(calibrated(kind, weights, activations))


@functools.cache
@torch.no_grad()
def calibrated(kind, weights, activations):
    """Return a random net with slopes below 0 and above 1, calibrated on noise."""
    torch.manual_seed(0)
    net = build_net(NETS[kind])
    for module in net.modules():
        if isinstance(module, nn.PReLU):
            module.weight.uniform_(-1.5, 1.8)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
    net.train()(noise(16))
    bits = {"weights": weights, "activations": activations}
    config = QuantisedNet(net=NETS[kind], ranges="extremes", equalise=False, **bits)
    out = Quantised(net.eval(), config)
    calibrate(out, lambda: [noise(16)], Ranks(), config)
    return out.requires_grad_(False)


def computed(model, names):
    """Return tensors of codes inside a model, as ONNX Runtime computes them."""
    model.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(names, {INPUT: 3 * noise(4, 2).numpy()})


@pytest.mark.parametrize(("kind", "weights", "activations"), FORMS)
def test_the_file_computes_what_the_net_does(kind, weights, activations, tmp_path):
    net = quantised(kind, weights, activations)
    write_onnx(net, tmp_path / "net.onnx", Verified(threshold=0.3))
    onnx.checker.check_model(tmp_path / "net.onnx", full_check=True)
    opened = open_net(tmp_path / "net.onnx")
    assert opened.verified == Verified(threshold=0.3)
    assert opened.net.name == ("mobilefacenet" if kind == "mobilefacenet" else "iresnet10")
    for images in (1, 5):
        x = noise(images, seed=2)
        wanted = net(x)
        assert torch.allclose(opened.net(x), wanted, atol=1e-5 * float(wanted.abs().max()))
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert (facts["weight_bits"], facts["activation_bits"]) == (str(weights), str(activations))


@pytest.mark.parametrize("kind", ["iresnet", "mobilefacenet"])
def test_every_layer_runs_in_integers(kind, tmp_path):
    model = qdq_model(quantised(kind), INPUT, OUTPUT)
    assert model.opset_import[0].version >= 17
    assert {entry.domain for entry in model.opset_import} == {""}
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert set(found) == {"QuantizeLinear", "Transpose", "QLinearConv", "Max", "QLinearAdd", "Flatten", "QGemm"}
    assert found.count("QLinearConv") == sum(node.op_type == "Conv" for node in model.graph.node)
    assert found.count("QuantizeLinear") == 1  # the pixels
    assert found.count("Transpose") == 2  # after the pixels, and before the last layer


def test_of_squeeze_and_excitation_the_gates_alone_are_float(tmp_path):
    model = qdq_model(quantised("ir_se"), INPUT, OUTPUT)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    blocks = 4
    assert found.count("QLinearMul") == found.count("GlobalAveragePool") == blocks
    assert found.count("QLinearConv") == sum(node.op_type == "Conv" for node in model.graph.node) - 2 * blocks


@pytest.mark.parametrize("activations", [6, 4])
def test_codes_of_fewer_bits_end_where_they_must(activations):
    model = qdq_model(quantised("iresnet", activations, activations), INPUT, OUTPUT)
    caps = [node for node in model.graph.node if node.op_type == "Min"]
    codes = computed(model, [name for node in caps for name in (node.input[0], node.output[0])])
    assert max(int(before.max()) for before in codes[::2]) > 2**activations - 1
    assert max(int(after.max()) for after in codes[1::2]) == 2**activations - 1


def test_integers_differ_from_the_float_simulation_by_rounding_alone():
    net = quantised("iresnet", 6, 6)
    layers = [layer for layer in net.modules() if isinstance(layer, QuantConv | QuantPReLU | QuantAdd)]
    seen = []
    hooks = [layer.register_forward_hook(lambda layer, x, y: seen.append((layer, x, y))) for layer in layers]
    net(noise(2, 2))
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(layers)
    net.train()
    for layer, inputs, exact in seen:
        steps = ((layer(*inputs) - exact) / layer.out.scale).abs()
        assert float(steps.max()) < 1.01
        assert float((steps > 0.5).float().mean()) < 0.03  # codes at halves


def test_a_channel_whose_weights_are_next_to_nothing_keeps_its_bias(tmp_path):
    net = quantised("iresnet")
    conv = net.layers[1].layer
    conv.weight[0] = 1e-9
    conv.weight[1] = 0
    conv.bias[:2] = 0.5
    x = noise(2, 2)
    y = net.layers[1](net.layers[0](x))
    assert torch.allclose(y[:, :2], torch.full_like(y[:, :2], 0.5), atol=float(net.layers[1].out.scale))
    write_onnx(net, tmp_path / "net.onnx")
    assert torch.allclose(open_onnx(tmp_path / "net.onnx")(x), net(x), rtol=1e-4, atol=1e-4)


def test_slopes_that_training_pushes_beyond_1_count_as_1(tmp_path):
    net = quantised("iresnet")
    prelu = net.layers[2]
    prelu.slope[:4] = 3.0
    codes, scale = prelu.int_slope()
    assert float((codes * scale).max()) == pytest.approx(1, abs=0.01)
    write_onnx(net, tmp_path / "net.onnx")
    x = noise(2, 2)
    assert torch.allclose(open_onnx(tmp_path / "net.onnx")(x), net(x), rtol=1e-4, atol=1e-4)


def test_a_file_is_small():
    config = QuantisedNet(net=MobileFaceNetNet())
    net = Quantised(build_net(config.net), config)
    floats = sum(parameter.nbytes for parameter in net.parameters())
    assert len(qdq_model(net, INPUT, OUTPUT).SerializeToString()) < 0.3 * floats


def test_only_the_scheme_of_integer_kernels_can_be_a_file(tmp_path):
    config = QuantisedNet(net=NETS["iresnet"], scheme="quantface")
    with pytest.raises(UserError, match="zero point for each channel"):
        write_onnx(Quantised(build_net(config.net), config), tmp_path / "net.onnx")


def test_kernels_that_clip_are_not_used(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert [saturates(bits) for bits in (None, 7, 8)] == [False, False, True]
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert not saturates(8)
    write_onnx(quantised("iresnet"), tmp_path / "net.onnx")
    monkeypatch.setattr(onnx_net, "saturates", lambda bits: bits == 8)
    options = open_onnx(tmp_path / "net.onnx").session.get_session_options()
    assert options.get_session_config_entry("session.x64quantprecision") == "1"


def test_training_mode_has_gradients():
    net = quantised("iresnet", 6, 6).requires_grad_(True)
    net.train()(noise(2)).sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in net.parameters())
