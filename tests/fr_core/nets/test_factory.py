"""Nets of somebody's own code: the contract, and who may run the code."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fr_core
from fr_core.config.nets import FactoryNet
from fr_core.config.recipes import load_config
from fr_core.errors import UserError
from fr_core.nets.backbone import Backbone
from fr_core.nets.build import build_net
from fr_core.nets.fold_bn import folded
from fr_core.nets.open import find_weights
from fr_core.nets.prune import narrower
from fr_core.train.memory import backbone_bytes, feature_bytes
from fr_core.train.work import backbone_size, backbone_work
from tests.helpers.own_nets import CALL, forget, was_imported, write_module


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    write_module(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    forget(tmp_path)


def section(**fields):
    return FactoryNet.model_validate({"call": CALL, "input_size": 32, "embedding": 32} | fields)


def test_the_functions_net_becomes_a_backbone():
    net = build_net(section(arguments={"width": 16}, input_mean=0.0, input_std=255.0))
    assert isinstance(net, Backbone)
    assert (net.input_mean, net.input_std, net.input_size, net.embedding) == (0.0, 255.0, 32, 32)
    assert net.net.conv.out_channels == 16
    assert [*net.blocks()] == [*net.net.blocks]
    assert net.last_norm is net.net.last_norm
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.randn(2, 3, 32, 32)).dtype == torch.float32


def test_blocks_may_be_a_method_and_need_not_be_there():
    net = build_net(section())
    net.net = nn.Flatten()
    assert net.blocks() == []
    assert net.last_norm is None
    inner = Backbone()
    inner.blocks = lambda: [inner]
    net.net = inner
    assert net.blocks() == [inner]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"call": "no_such_module:make"}, "net.call = no_such_module:make: No module named 'no_such_module': install"),
        ({"call": "somebodys_nets:no"}, "somebodys_nets has no function no: give package.module:function"),
        ({"call": "somebodys_nets:torch"}, "somebodys_nets has no function torch"),
        ({"call": "somebodys_nets:nothing"}, "somebodys_nets:nothing returns NoneType: return a torch.nn.Module"),
        ({"arguments": {"depth": 3}}, "net.arguments do not fit somebodys_nets:make: got an unexpected keyword"),
        ({"embedding": 16}, r"maps images \[2, 3, 32, 32\] to \[2, 32\]: return \[B, D\] with D = net.embedding"),
        ({"call": "somebodys_nets:maps"}, r"to \[2, 32, 29, 29\]: return \[B, D\]"),
        ({"call": "somebodys_nets:pairs"}, r"maps images \[2, 3, 32, 32\] to tuple: return \[B, D\]"),
    ],
)
def test_mistakes_are_told_in_one_line(fields, message):
    with pytest.raises(UserError, match=message) as error:
        build_net(section(**fields))(torch.randn(2, 3, 32, 32))
    assert "\n" not in str(error.value)


def test_a_call_of_another_form_is_refused():
    for call in ("os.system", "os:", ":make", "a b:c", "a:b:c"):
        with pytest.raises(UserError, match=r"net\.call: .*: write package\.module:function"):
            load_config("debug_bigface", [f"net={{kind='factory', call='{call}'}}"])


def test_arguments_join_as_other_tables_do():
    net = load_config("debug_bigface", ["net.kind=factory", f"net.call={CALL}"]).net
    assert net.arguments == {}
    given = ["net.kind=factory", f"net.call={CALL}", "net.arguments.width=16", "net.arguments.parts=[1, 2]"]
    assert load_config("debug_bigface", given).net.arguments == {"width": 16, "parts": [1, 2]}


def test_it_is_priced_without_memory():
    """Although its function asks for a number, which a tensor without memory does not have."""
    config = section()
    with FakeTensorMode():
        assert all(isinstance(weight, FakeTensor) for weight in build_net(config).parameters())
    real = build_net(config)
    assert backbone_size(config).numbers == sum(weight.numel() for weight in real.parameters())
    weights, saved, _ = backbone_bytes(config, 4, "float32")
    assert weights == sum(tensor.nbytes for tensor in (*real.parameters(), *real.buffers()))
    assert saved > 0
    work = backbone_work(config, 4, 32, "float32").forward
    images, patches, width = 4, 8 * 8, 8
    macs = images * (patches * width * (3 * 4 * 4) + 2 * patches * width * width + width * 32)
    assert sum(operator.flops * count for operator, count in work.items()) == 2 * macs


def test_layers_may_return_several_tensors():
    patches = 4 * 16 * 32 * 4  # bytes of 16 patches of 32 channels of 4 images, the largest map
    assert feature_bytes(section(call="somebodys_nets:attention"), 4, "float32") == 3 * patches


def test_its_code_runs_only_for_those_who_trust_it(module):
    config, path = section(), module / "net.safetensors"
    net = build_net(config).eval()
    save_file(net.state_dict(), path, {"net": config.model_dump_json()})
    for opening in (fr_core.open_net, find_weights):
        forget(module)
        with pytest.raises(UserError, match=r"that the code somebodys_nets:make makes: .* --trust-code") as error:
            opening(path)
        assert "\n" not in str(error.value)
        assert not was_imported(module)
    opened = fr_core.open_net(path, device=torch.device("cpu"), trust_code=True)
    assert was_imported(module)
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(opened.net(x), net(x), atol=1e-5)  # of about 1; channels-last sums in another order


def test_without_folding_rules_it_keeps_its_norms_and_is_not_pruned():
    net = build_net(section())
    assert any(isinstance(part, nn.BatchNorm2d) for part in folded(net).modules())
    with pytest.raises(UserError, match="nets of kind factory cannot be pruned"):
        narrower(section(), [0.2])
