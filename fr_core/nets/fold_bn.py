"""Batch norm of a trained backbone, folded into its convolutions and linear layers (METHODS §5).

In eval mode a norm is gain·x + shift in each channel. It folds exactly into the layer before it, and into the layer
after it unless that one pads with zeros: the norm would not have shifted those. So a padded convolution gets, in
place of a bias in each channel, its answer to an image that is the shift everywhere, borders as they are. That is
exact for every gain, also 0, and faster than padding with −shift / gain, which is not.

Legend: B batch, I input channels, O output channels, H W pixels, D embedding.
"""

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import TypeVar, assert_never

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fr_core.nets.iresnet import IResBlock, IResNet, Stage
from fr_core.nets.mobilefacenet import MobileFaceNet, Part
from fr_core.nets.moe import Mixture

Net = TypeVar("Net", bound=nn.Module)
Norm = nn.BatchNorm1d | nn.BatchNorm2d


class BiasMapConv(nn.Module):
    """conv3×3 of stride 1, padded with zeros, plus a bias for each channel and pixel."""

    def __init__(self, weight_OI33: Tensor, bias_1OHW: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_OI33, requires_grad=False)
        self.bias = nn.Parameter(bias_1OHW, requires_grad=False)

    def forward(self, x_BIHW: Tensor) -> Tensor:
        return F.conv2d(x_BIHW, self.weight, padding=1).add_(self.bias)


@torch.no_grad()
def folded(net: Net, channelwise: bool = False) -> Net:
    """The same net for inference, without a norm: its eval mode, for images of its own ``input_size`` only.

    The net that is given stays as it is. Folding is done in float64; the weights that come out are of the net's type.
    Nets that nothing here folds keep their norms: a quantised one has none, any other computes the same, more slowly.

    Args:
        channelwise: make of a norm before a padded convolution a depthwise conv1×1 instead; for any ``input_size``.
    """
    net = copy.deepcopy(net).eval().requires_grad_(False)
    match net:
        case IResNet():
            _fold_iresnet(net, channelwise)
        case MobileFaceNet():
            _fold_mobilefacenet(net)
        case _:  # how its norms fold is written nowhere: they stay
            return net
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.Dropout):
            net.set_submodule(name, nn.Identity())
    return net


@torch.no_grad()
def bound_slopes(net: IResNet | MobileFaceNet) -> None:
    """Lets no PReLU of a net that is folded ``channelwise`` have a slope above 1; it computes the same.

    PReLU of slope a is −PReLU of slope 1 / a of −a·x: the layer before takes the factor, those after it the sign.
    """
    for before, prelu, after in _around_prelu(net):
        steep_C = prelu.weight > 1
        factor_C = torch.where(steep_C, -prelu.weight, 1.0)
        prelu.weight.copy_(torch.where(steep_C, 1 / prelu.weight, prelu.weight))
        before.weight.mul_(factor_C[:, None, None, None])
        assert before.bias is not None  # the norm's shift is in it
        before.bias.mul_(factor_C)
        for layer in after:
            layer.weight.mul_(factor_C.sign().view((-1, 1, 1, 1) if layer.groups > 1 else (1, -1, 1, 1)))


def _around_prelu(net: IResNet | MobileFaceNet) -> Iterator[tuple[nn.Conv2d, nn.PReLU, list[nn.Conv2d]]]:
    """Every PReLU, with the convolution before it and those that read it."""
    match net:
        case IResNet():
            blocks = [module for module in net.modules() if isinstance(module, IResBlock)]
            assert blocks[0].downsample is not None
            yield net.conv1, net.prelu, [convolution(blocks[0].bn1), convolution(blocks[0].downsample[0])]
            for block in blocks:
                yield block.conv1, block.prelu, [block.conv2]
        case MobileFaceNet():
            inside = [part for block in net.bottlenecks() for part in (block.expand, block.depthwise, block.project)]
            chain = [net.stem, net.stem_depthwise, *inside, net.expand, net.pool]
            for part, following in pairwise(chain):
                if part.prelu is not None:
                    yield part.conv, part.prelu, [following.conv]
        case _ as unknown:
            assert_never(unknown)


def convolution(module: nn.Module) -> nn.Conv2d:
    """A layer of a folded net whose class says less than what stands there now."""
    assert isinstance(module, nn.Conv2d)
    return module


def _fold_iresnet(net: IResNet, channelwise: bool) -> None:
    _fold_after(net.conv1, net.bn1)
    side = -(-net.input_size // net.conv1.stride[0])
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        if isinstance(stage, Mixture):
            _fold_before(stage.gate, *_affine(stage.norm))
        for part in [module for module in stage.modules() if isinstance(module, Stage)]:  # itself, or the experts
            for i, block in enumerate(part.blocks()):
                if channelwise:
                    block.set_submodule("bn1", _depthwise(block.bn1))
                    _fold_after(block.conv1, block.bn2)
                else:
                    _fold_into_conv1(block, side if i == 0 else -(-side // 2))
                _fold_after(block.conv2, block.bn3)
                if block.downsample is not None:
                    conv, norm = block.downsample
                    _fold_after(conv, norm)
        side = -(-side // 2)
    gain_O, shift_O = _affine(net.bn2)
    pixels = side**2  # the last linear layer reads channel after channel
    _fold_before(net.fc, gain_O.repeat_interleave(pixels), shift_O.repeat_interleave(pixels))
    _fold_after(net.fc, net.features)


def _depthwise(norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A norm as a convolution."""
    channels = norm.num_features
    conv = nn.Conv2d(channels, channels, 1, groups=channels).to(norm.weight)
    gain_C, shift_C = _affine(norm)
    _put(conv, gain_C[:, None, None, None], shift_C)
    return conv


def _fold_into_conv1(block: IResBlock, side: int) -> None:
    """Folds both norms around a block's padded convolution; ``side``: pixels of its input."""
    gain_I, shift_I = _affine(block.bn1)
    gain_O, shift_O = _affine(block.bn2)
    weight_OI33 = block.conv1.weight.double()
    bias_OHW = gain_O[:, None, None] * _answer(weight_OI33, shift_I, side) + shift_O[:, None, None]
    weight_OI33 = gain_O[:, None, None, None] * weight_OI33 * gain_I[:, None, None]
    like = block.conv1.weight
    block.set_submodule("conv1", BiasMapConv(weight_OI33.to(like), bias_OHW[None].to(like)))


def _answer(weight_OI33: Tensor, shift_I: Tensor, side: int) -> Tensor:
    """A padded convolution of the image that is ``shift_I`` everywhere: [O, side, side].

    Only corners, edges and the inside differ, so three pixels a side tell all.
    """
    few = min(side, 3)
    answer_OHW = F.conv2d(shift_I[:, None, None].expand(-1, few, few)[None], weight_OI33, padding=1)[0]
    which = torch.arange(side, device=shift_I.device).clamp(max=1)
    which[-1] = few - 1
    return answer_OHW[:, which][:, :, which]


def _fold_mobilefacenet(net: MobileFaceNet) -> None:
    for module in net.modules():
        if isinstance(module, Part):
            _fold_after(module.conv, module.bn)
    _fold_after(net.fc, net.features)


def _fold_after(layer: nn.Module, norm: nn.Module) -> None:
    """Folds the norm after a layer into it."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    assert isinstance(norm, Norm)
    gain_O, shift_O = _affine(norm)
    weight = gain_O.view(-1, *[1] * (layer.weight.ndim - 1)) * layer.weight.double()
    _put(layer, weight, shift_O if layer.bias is None else gain_O * layer.bias.double() + shift_O)


def _fold_before(linear: nn.Linear, gain_I: Tensor, shift_I: Tensor) -> None:
    """Folds gain and shift of a linear layer's inputs into it."""
    weight_OI = linear.weight.double()
    _put(linear, weight_OI * gain_I, linear.bias.double() + weight_OI @ shift_I)


def _put(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias_O: Tensor) -> None:
    like = layer.weight
    layer.weight = nn.Parameter(weight.to(like), requires_grad=False)
    layer.bias = nn.Parameter(bias_O.to(like), requires_grad=False)


def _affine(norm: Norm) -> tuple[Tensor, Tensor]:
    """Gain and shift of a norm in eval mode, float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return gain, norm.bias.double() - norm.running_mean.double() * gain
