"""Quantised nets: integer arithmetic, simulated in floating point so that it can be trained.

docs/quantisation.md explains the integers, docs/methods/quantface.md the training (Ef-QuantFace).

The batch norms of a net are folded first. Then the weights of every layer lie on a grid of ``weights`` bits, and the
inputs of every layer on a grid of ``activations`` bits. Rounding passes gradients straight through, clipping stops
them. The output of a convolution before a PReLU or an addition always has 8 bits, since integer kernels store it so.
The pixels have 8 bits too, and the embedding is float.

Scheme ``integer`` is what integer kernels run. In eval mode the net computes exactly what they do: sums of products
of codes, times a float32 factor, rounded. Only equal arithmetic gives equal embeddings. One code that is rounded the
other way grows, layer by layer, to an error as large as quantisation's own. Weights are symmetric per output channel,
and their range follows them in training. Activations are asymmetric per tensor, and their range is measured once
(``fr_core/nets/calibration.py``).

Scheme ``quantface`` is the simulation of QuantFace (Boutros et al., 2022), with asymmetric weights. Batch norms,
shortcuts and the outputs of convolutions before a PReLU or an addition stay in float.

Legend: B batch, C channels, I input and O output channels, H W pixels, D embedding.
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import assert_never

import torch
from torch import Tensor, nn

from fr_core.config.nets import QuantisedNet
from fr_core.nets.backbone import Backbone
from fr_core.nets.fold_bn import bound_slopes, convolution, folded, shortcut
from fr_core.nets.iresnet import IResBlock, IResNet, SqueezeExcitation
from fr_core.nets.mobilefacenet import MobileFaceNet
from fr_core.nets.names import weights_name
from fr_core.nets.quantised_layers import (
    ActQuant,
    QuantAdd,
    QuantConv,
    QuantLinear,
    QuantPReLU,
    QuantSE,
    ResidualPath,
)


class Quantised(Backbone):
    """A net in integers, from normalised pixels to float embeddings.

    The ranges of activations must be set afterwards, by :func:`fr_core.nets.calibration.calibrate` or from a
    checkpoint.

    Args:
        net: Float net to copy.
        config: Section of the quantised net.
    """

    in_integers = True

    def __init__(self, net: IResNet | MobileFaceNet, config: QuantisedNet) -> None:
        super().__init__()
        self.input_size, self.embedding = net.input_size, net.embedding
        self.input_mean, self.input_std = net.input_mean, net.input_std
        self.name = weights_name(net.state_dict())  # of the float net
        self.scheme, self.weights, self.activations = config.scheme, config.weights, config.activations
        plain = folded(net, channelwise=True)
        if config.scheme == "integer":
            bound_slopes(plain)
        match plain:
            case IResNet():
                layers = _iresnet_layers(plain, config)
            case MobileFaceNet():
                layers = _mobilefacenet_layers(plain, config)
            case _ as unknown:
                assert_never(unknown)
        pixels = _pixels(net, config)
        chain = [*layers, nn.Flatten(), QuantLinear(plain.fc, config)]
        self.layers = nn.Sequential(pixels, *chain)
        self.requires_grad_(True)
        if isinstance(pixels, ActQuant):
            _connect(chain, pixels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map normalised pixels [B, 3, H, W] to embeddings float32 [B, D], not L2-normalised."""
        with nullcontext() if self.training else torch.autocast(x_BCHW.device.type, enabled=False):
            return self.layers(x_BCHW)

    def ranges(self) -> dict[str, ActQuant]:
        """Return the quantisers of activations whose ranges are measured, by name."""
        return {name: module for name, module in self.layers[1:].named_modules() if isinstance(module, ActQuant)}


def _connect(layers: Iterable[nn.Module], source: ActQuant) -> ActQuant:
    """Give the layers of a chain the quantisers of their inputs; return the quantiser of the last output."""
    for layer in layers:
        match layer:
            case ResidualPath():
                branch = _connect(layer.branch, source)
                skip = _connect([layer.skip], source) if layer.skip else source
                layer.add.inputs = (branch, skip)
                source = layer.add.output()
            case QuantConv() | QuantPReLU() | QuantSE():
                layer.inputs = (source,)
                source = layer.output()
            case QuantLinear():
                layer.inputs = (source,)
    return source


def _iresnet_layers(net: IResNet, config: QuantisedNet) -> Iterator[nn.Module]:
    """Yield the layers between pixels and the last linear layer."""
    yield from _conv_prelu(net.conv1, net.prelu, config)
    for block in [module for module in net.modules() if isinstance(module, IResBlock)]:
        norm, skip = convolution(block.bn1), shortcut(block)
        integer = config.scheme == "integer"
        branch = [
            QuantConv(norm, config, _input_quantiser(config)) if integer else norm,
            *_conv_prelu(block.conv1, block.prelu, config),
            QuantConv(block.conv2, config, _inner_quantiser(config)),
        ]
        if isinstance(block.se, SqueezeExcitation):
            branch.append(QuantSE(block.se, config, _inner_quantiser(config)))
        way = QuantConv(skip, config, _inner_quantiser(config)) if skip and integer else skip
        yield ResidualPath(nn.Sequential(*branch), way, QuantAdd(_input_quantiser(config)))


def _mobilefacenet_layers(net: MobileFaceNet, config: QuantisedNet) -> Iterator[nn.Module]:
    """Yield the layers between pixels and the last linear layer."""
    yield from _conv_prelu(net.stem.conv, net.stem.prelu, config)
    yield from _conv_prelu(net.stem_depthwise.conv, net.stem_depthwise.prelu, config)
    for block in net.blocks():
        inside = (block.expand, block.depthwise)
        branch = [layer for part in inside for layer in _conv_prelu(part.conv, part.prelu, config)]
        out = _inner_quantiser(config) if block.residual else _input_quantiser(config)
        branch.append(QuantConv(block.project.conv, config, out))
        if block.residual:
            yield ResidualPath(nn.Sequential(*branch), None, QuantAdd(_input_quantiser(config)))
        else:
            yield from branch
    yield from _conv_prelu(net.expand.conv, net.expand.prelu, config)
    yield QuantConv(net.pool.conv, config, _input_quantiser(config))


def _conv_prelu(conv: nn.Conv2d, prelu: nn.PReLU | None, config: QuantisedNet) -> list[nn.Module]:
    """Return a quantised convolution and its PReLU.

    With 8 bits both share one quantiser: slopes are at most 1, so the range of the input holds the output.
    """
    assert prelu is not None
    shared = config.scheme == "integer" and config.activations == 8
    return [
        QuantConv(conv, config, _inner_quantiser(config)),
        QuantPReLU(prelu, config, None if shared else _input_quantiser(config)),
    ]


def _input_quantiser(config: QuantisedNet) -> nn.Module:
    """Return a quantiser for the input of a layer with weights."""
    return ActQuant(config.activations)


def _inner_quantiser(config: QuantisedNet) -> nn.Module:
    """Return a quantiser for the output of a convolution before a PReLU or an addition."""
    return ActQuant(8) if config.scheme == "integer" else nn.Identity()


def _pixels(net: Backbone, config: QuantisedNet) -> nn.Module:
    """Return the quantiser of normalised pixels.

    A whole mean is a code itself, and every pixel value has its own. For a mean of 127.5 zero is code 127, and 255 of
    256 pixel values have distinct codes.
    """
    if config.scheme != "integer":
        return nn.Identity()
    quantiser, mean = ActQuant(8), torch.tensor(net.input_mean)
    low, high = (-mean, 255 - mean) if net.input_mean % 1 == 0 else (-mean, (255 - mean) * 128 / 127)
    quantiser.set_range(low / net.input_std, high / net.input_std)
    return quantiser
