"""Folds the batch norms of a trained backbone into its convolutions and linear layers.

In eval mode a norm computes gain·x + shift in each channel. It folds exactly into the layer before it. It folds into
the layer after it too, unless that layer pads with zeros: a norm does not shift the padding. A padded convolution
therefore gets a bias for each channel and pixel: its response to an image that equals the shift everywhere. This is
exact for every gain, also 0. Padding with −shift / gain would be slower, and inexact for a gain of 0.

Legend: B batch, I input channels, O output channels, H W pixels, D embedding.
"""

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import TypeVar, assert_never

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fr_core.nets.ghostfacenet import GhostFaceNet
from fr_core.nets.iresnet import IResBlock, IResNet, Stage
from fr_core.nets.mobilefacenet import MobileFaceNet, Part
from fr_core.nets.moe import Mixture
from fr_core.nets.vit import ViT

Net = TypeVar("Net", bound=nn.Module)
Norm = nn.BatchNorm1d | nn.BatchNorm2d


class BiasMapConv(nn.Module):
    """Convolution 3×3 of stride 1, padded with zeros, plus a bias for each channel and pixel."""

    def __init__(self, weight_OI33: Tensor, bias_1OHW: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_OI33, requires_grad=False)
        self.bias = nn.Parameter(bias_1OHW, requires_grad=False)

    def forward(self, x_BIHW: Tensor) -> Tensor:
        """Convolve [B, I, H, W] into [B, O, H, W]."""
        return F.conv2d(x_BIHW, self.weight, padding=1).add_(self.bias)


@torch.no_grad()
def folded(net: Net, channelwise: bool = False) -> Net:
    """Return a copy of a net for inference, without norms. It computes what the net computes in eval mode.

    The copy takes images of the net's ``input_size`` only. Folding runs in float64; the new weights have the net's
    type. A kind of net that this module does not know keeps its norms.

    Args:
        net: Net to copy.
        channelwise: Turn a norm before a padded convolution into a depthwise conv1×1; this fits any ``input_size``.
    """
    net = copy.deepcopy(net).eval().requires_grad_(False)
    match net:
        case IResNet():
            _fold_iresnet(net, channelwise)
        case MobileFaceNet() | GhostFaceNet():
            _fold_parts(net)
        case ViT():
            _fold_after(net.reduce, net.bn)
            _fold_after(net.fc, net.features)
        case _:  # a quantised net, which has no norms, or a kind without folding rules here
            return net
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.Dropout):
            net.set_submodule(name, nn.Identity())
    return net


@torch.no_grad()
def bound_slopes(net: IResNet | MobileFaceNet) -> None:
    """Bring all PReLU slopes of a net folded ``channelwise`` to 1 or below; the net computes the same.

    PReLU_a(x) = −PReLU_{1/a}(−a·x). The layer before the PReLU takes the factor −a, the layers after it the sign.
    """
    for before, prelu, after in _around_prelu(net):
        steep_C = prelu.weight > 1
        factor_C = torch.where(steep_C, -prelu.weight, 1.0)
        prelu.weight.copy_(torch.where(steep_C, 1 / prelu.weight, prelu.weight))
        before.weight.mul_(factor_C[:, None, None, None])
        assert before.bias is not None  # holds the shift of the folded norm
        before.bias.mul_(factor_C)
        for layer in after:
            layer.weight.mul_(factor_C.sign().view((-1, 1, 1, 1) if layer.groups > 1 else (1, -1, 1, 1)))


def _around_prelu(net: IResNet | MobileFaceNet) -> Iterator[tuple[nn.Conv2d, nn.PReLU, list[nn.Conv2d]]]:
    """Yield every PReLU, with the convolution before it and the convolutions that read its output."""
    match net:
        case IResNet():
            blocks = [module for module in net.modules() if isinstance(module, IResBlock)]
            skip = shortcut(blocks[0])
            assert skip is not None
            yield net.conv1, net.prelu, [convolution(blocks[0].bn1), skip]
            for block in blocks:
                yield block.conv1, block.prelu, [block.conv2]
        case MobileFaceNet():
            inside = [part for block in net.blocks() for part in (block.expand, block.depthwise, block.project)]
            chain = [net.stem, net.stem_depthwise, *inside, net.expand, net.pool]
            for part, following in pairwise(chain):
                if part.prelu is not None:
                    yield part.conv, part.prelu, [following.conv]
        case _ as unknown:
            assert_never(unknown)


def convolution(module: nn.Module) -> nn.Conv2d:
    """Return a layer of a folded net, typed as the convolution that it has become."""
    assert isinstance(module, nn.Conv2d)
    return module


def shortcut(block: IResBlock) -> nn.Conv2d | None:
    """Return the convolution on the shortcut of a block folded ``channelwise``; None if the input passes as it is."""
    return convolution(block.downsample[0]) if isinstance(block.downsample, nn.Sequential) else None


def _fold_iresnet(net: IResNet, channelwise: bool) -> None:
    """Fold the norms of an IR-ResNet in place; ``side`` tracks the height of the feature maps."""
    _fold_after(net.conv1, net.bn1)
    side = -(-net.input_size // net.conv1.stride[0])
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        if isinstance(stage, Mixture):
            _fold_before(stage.gate, *_affine(stage.norm))
        for part in [
            module for module in stage.modules() if isinstance(module, Stage)
        ]:  # the stage, or a mixture's experts
            for i, block in enumerate(part.blocks()):
                if channelwise:
                    block.set_submodule("bn1", _depthwise(block.bn1))
                    _fold_after(block.conv1, block.bn2)
                else:
                    _fold_into_conv1(block, side if i == 0 else -(-side // 2))
                _fold_after(block.conv2, block.bn3)
                if isinstance(block.downsample, nn.Sequential):
                    _fold_after(*block.downsample)
                elif isinstance(block.downsample, nn.AvgPool2d) and channelwise:
                    block.downsample = nn.Sequential(_every_other_pixel(block.conv1))
        side = -(-side // 2)
    gain_O, shift_O = _affine(net.bn2)
    pixels = side**2  # the last linear layer reads channel after channel
    _fold_before(net.fc, gain_O.repeat_interleave(pixels), shift_O.repeat_interleave(pixels))
    _fold_after(net.fc, net.features)


def _every_other_pixel(like: nn.Conv2d) -> nn.Conv2d:
    """Return a pool 1×1 of stride 2 as a depthwise conv1×1, for the input of the convolution ``like``."""
    channels = like.in_channels
    conv = nn.Conv2d(channels, channels, 1, 2, groups=channels).to(like.weight)
    _put(conv, torch.ones_like(conv.weight), conv.weight.new_zeros(channels))
    return conv


def _depthwise(norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Return a norm as a depthwise conv1×1."""
    channels = norm.num_features
    conv = nn.Conv2d(channels, channels, 1, groups=channels).to(norm.weight)
    gain_C, shift_C = _affine(norm)
    _put(conv, gain_C[:, None, None, None], shift_C)
    return conv


def _fold_into_conv1(block: IResBlock, side: int) -> None:
    """Fold both norms around a block's first convolution, whose input has ``side`` × ``side`` pixels."""
    gain_I, shift_I = _affine(block.bn1)
    gain_O, shift_O = _affine_of(block.conv1, block.bn2)
    weight_OI33 = block.conv1.weight.double()
    bias_OHW = gain_O[:, None, None] * _response(weight_OI33, shift_I, side) + shift_O[:, None, None]
    weight_OI33 = gain_O[:, None, None, None] * weight_OI33 * gain_I[:, None, None]
    like = block.conv1.weight
    block.set_submodule("conv1", BiasMapConv(weight_OI33.to(like), bias_OHW[None].to(like)))


def _response(weight_OI33: Tensor, shift_I: Tensor, side: int) -> Tensor:
    """Return a padded convolution's response to an image that equals ``shift_I`` everywhere: [O, side, side].

    Only corners, edges and the inside differ, so a small image of 3 × 3 pixels has all values.
    """
    small = min(side, 3)
    image_IHW = shift_I[:, None, None].expand(-1, small, small)
    response_OHW = F.conv2d(image_IHW[None], weight_OI33, padding=1)[0]
    rows = torch.arange(side, device=shift_I.device).clamp(max=1)
    rows[-1] = small - 1
    return response_OHW[:, rows][:, :, rows]


def _fold_parts(net: MobileFaceNet | GhostFaceNet) -> None:
    """Fold the norms of a net of parts in place."""
    for module in net.modules():
        if isinstance(module, Part):
            _fold_after(module.conv, module.bn)
    _fold_after(net.fc, net.features)


def _fold_after(layer: nn.Module, norm: nn.Module) -> None:
    """Fold a norm into the layer before it."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    gain_O, shift_O = _affine_of(layer, norm)
    weight = gain_O.view(-1, *[1] * (layer.weight.ndim - 1)) * layer.weight.double()
    _put(layer, weight, shift_O if layer.bias is None else gain_O * layer.bias.double() + shift_O)


def _fold_before(linear: nn.Linear, gain_I: Tensor, shift_I: Tensor) -> None:
    """Fold gain and shift of a linear layer's inputs into the layer."""
    weight_OI = linear.weight.double()
    _put(linear, weight_OI * gain_I, linear.bias.double() + weight_OI @ shift_I)


def _put(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias_O: Tensor) -> None:
    """Replace weight and bias of a layer, in the type and on the device of its old weight."""
    like = layer.weight
    layer.weight = nn.Parameter(weight.to(like), requires_grad=False)
    layer.bias = nn.Parameter(bias_O.to(like), requires_grad=False)


def _affine_of(layer: nn.Conv2d | nn.Linear, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return gain and shift of the norm behind a layer, float64; without a norm they are 1 and 0."""
    if isinstance(norm, Norm):
        return _affine(norm)
    one_O = torch.ones(len(layer.weight), dtype=torch.float64, device=layer.weight.device)
    return one_O, torch.zeros_like(one_O)


def _affine(norm: Norm) -> tuple[Tensor, Tensor]:
    """Return gain and shift of a norm in eval mode, float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return gain, norm.bias.double() - norm.running_mean.double() * gain
