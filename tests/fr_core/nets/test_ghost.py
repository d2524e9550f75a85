import pytest
import torch
from torch import nn

from fr_core.nets.ghost import GhostBatchNorm, use_ghost_batches
from fr_core.nets.iresnet import IResNet


@pytest.mark.parametrize("shape", [(12, 5), (12, 5, 4, 3)])
@pytest.mark.parametrize("size", [2, 4, 12])
def test_ghost_batches_are_batch_norm_of_one_group_after_the_other(shape, size):
    norms = [(nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(5, eps=1e-3, momentum=0.3) for _ in range(2)]
    for norm in norms:
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    plain, ghost = norms[0], GhostBatchNorm(norms[1], size)
    random = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(shape, generator=random.manual_seed(0)).requires_grad_() for _ in range(2))
    toward = torch.randn(shape, generator=random)
    expected = torch.cat([plain(group) for group in theirs.split(size)])
    out = ghost(ours)
    assert torch.allclose(out, expected, atol=1e-6)
    for value in (out, expected):
        (value * toward).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)
    assert torch.allclose(ghost.weight.grad, plain.weight.grad, atol=1e-5)
    assert torch.allclose(ghost.bias.grad, plain.bias.grad, atol=1e-5)
    assert ghost.num_batches_tracked == plain.num_batches_tracked == 12 // size
    for name, buffer in plain.named_buffers():
        assert torch.allclose(ghost.get_buffer(name).float(), buffer.float(), atol=1e-6)
    assert torch.allclose(ghost.eval()(ours), plain.eval()(ours), atol=1e-6)


def test_a_net_keeps_its_names_weights_and_memory_format():
    net = IResNet(10, width=8, input_size=32, embedding=8).to(memory_format=torch.channels_last)
    before = dict(net.state_dict())
    use_ghost_batches(net, 2)
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].data_ptr() == after[name].data_ptr() for name in before)
    assert not net.features.weight.requires_grad
    assert not any(isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) for module in net.modules())
    x = torch.randn(4, 8, 6, 6).to(memory_format=torch.channels_last)
    assert net.bn1(x).is_contiguous(memory_format=torch.channels_last)
