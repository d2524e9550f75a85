import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fr_core.config.nets import IResNetNet, MoENet
from fr_core.errors import UserError
from fr_core.nets.build import build_net
from fr_core.nets.fold_bn import folded
from fr_core.nets.moe import load_balance, take_balance
from fr_core.nets.onnx_net import open_onnx, write_onnx
from fr_core.nets.open import load_weights, open_net

SHAPE = {"depth": 10, "width": 8, "input_size": 32, "embedding": 8}


def mixture_net(**given):
    torch.manual_seed(0)
    net = build_net(MoENet(**SHAPE, **given))
    torch.nn.init.normal_(net.layer4.gate.weight, 0, 2)  # different experts get different images
    return net


@pytest.mark.parametrize("active", [1, 2, 3])
def test_gate_and_routing_against_a_loop_over_images(active):
    net = mixture_net(experts=3, active=active).eval()
    mixture = net.layer4
    x = torch.randn(9, 32, 4, 4)
    features = (x.mean((2, 3)) - mixture.norm.running_mean) / (mixture.norm.running_var + mixture.norm.eps).sqrt()
    logits = features @ mixture.gate.weight.T + mixture.gate.bias
    expected, picked = [], []
    for image, row in zip(x, logits.tolist(), strict=True):
        chances = [np.exp(a) / sum(np.exp(b) for b in row) for a in row]
        best = sorted(range(3), key=lambda e, chances=chances: -chances[e])[:active]
        expected.append(sum(chances[e] * mixture.experts[e](image[None])[0] for e in best))
        picked += best
    assert set(picked) == {0, 1, 2}
    assert torch.allclose(mixture(x), torch.stack(expected), atol=1e-5)


def test_training_and_inference_compute_the_same_where_batch_norm_is_fixed():
    net = mixture_net(experts=3)
    mixture, x = net.layer4, torch.randn(9, 32, 4, 4)
    routed = mixture.eval()(x)
    mixture.training = True  # only the mixture: its norms stay in eval mode
    assert torch.allclose(mixture(x), routed, atol=1e-5)
    assert mixture.eval()(x[:1]).shape == (1, 64, 2, 2)


def test_a_mixture_in_onnx_routes_every_image_as_here(tmp_path):
    pytest.importorskip("onnxruntime")
    net = mixture_net(experts=3).eval()
    write_onnx(folded(net), tmp_path / "net.onnx")
    x_BCHW = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(open_onnx(tmp_path / "net.onnx")(x_BCHW), net(x_BCHW), rtol=1e-3, atol=1e-4)


def test_load_balance_is_switch_transformers():
    """Three of four images choose expert 0: 2·(3/4·mean p0 + 1/4·mean p1)."""
    probability = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]], requires_grad=True)
    chosen = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    term = load_balance(probability, chosen)
    assert term.item() == pytest.approx(2 * (0.75 * 0.7 + 0.25 * 0.3))
    term.backward()
    assert torch.allclose(probability.grad, torch.tensor([[0.375, 0.125]]).expand(4, 2))
    even = torch.eye(4)[torch.arange(8) % 4]
    assert float(load_balance(torch.full((8, 4), 0.25), even)) == pytest.approx(1)
    assert float(load_balance(torch.full((8, 4), 0.25), torch.ones(8, 4))) == pytest.approx(1)


@pytest.mark.parametrize("active", [1, 2])
def test_a_plain_net_with_few_active_experts_keeps_its_embeddings_directions(tmp_path, active):
    """The probabilities of the active experts do not sum to 1; the next norm is scaled for it."""
    plain = build_net(IResNetNet(**SHAPE))
    x = torch.randn(32, 3, 32, 32)
    for _ in range(60):
        plain.train()(x)
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    torch.manual_seed(0)
    net = build_net(MoENet(**SHAPE, experts=4, active=active))
    load_weights(net, tmp_path / "plain.safetensors")
    with torch.no_grad():
        assert torch.cosine_similarity(net.eval()(x), plain.eval()(x)).min() > 0.98


def test_a_mixture_that_trains_can_be_copied_and_folded():
    net = mixture_net(experts=2)
    net.train()(torch.randn(4, 3, 32, 32)).sum().backward()
    assert float(take_balance(net).detach()) > 0
    folded(net)


def test_every_expert_has_a_gradient_in_training():
    net = mixture_net(experts=4)
    torch.nn.init.constant_(net.layer4.gate.bias[0], 100.0)
    net(torch.randn(6, 3, 32, 32)).square().sum().backward()
    grads = [expert[0].conv1.weight.grad.abs().sum() for expert in net.layer4.experts]
    assert grads[0] > 0
    assert [float(grad) for grad in grads[1:]] == [0, 0, 0]
    assert float(take_balance(net).detach()) == pytest.approx(4)


def test_a_plain_net_becomes_a_mixture_and_one_expert_is_the_plain_net(tmp_path):
    plain = build_net(IResNetNet(**SHAPE))
    x = torch.randn(6, 3, 32, 32)
    plain.train()(x)  # sets running statistics
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    one, three = mixture_net(experts=1), mixture_net(experts=3, active=3)
    for net in (one, three):
        load_weights(net, tmp_path / "plain.safetensors")
        assert torch.allclose(
            net.eval()(x), plain.eval()(x), atol=1e-5
        )  # all experts are equal and probabilities sum to 1
    assert torch.allclose(one.train()(x), plain.train()(x), atol=1e-5)
    config = MoENet(**SHAPE, experts=3, active=3)
    save_file(three.state_dict(), tmp_path / "moe.safetensors", {"net": config.model_dump_json()})
    opened = open_net(tmp_path / "moe.safetensors").net
    assert all(torch.equal(opened.state_dict()[name], tensor) for name, tensor in three.state_dict().items())
    with pytest.raises(UserError, match="do not fit"):
        load_weights(mixture_net(experts=2), tmp_path / "moe.safetensors")
