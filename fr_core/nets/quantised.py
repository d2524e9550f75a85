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

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, assert_never

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fr_core.config.nets import QuantisedNet
from fr_core.errors import UserError
from fr_core.nets.backbone import Backbone
from fr_core.nets.fold_bn import bound_slopes, convolution, folded
from fr_core.nets.iresnet import IResBlock, IResNet
from fr_core.nets.mobilefacenet import MobileFaceNet
from fr_core.nets.names import weights_name
from fr_core.nets.prelu import prelu

try:
    import brevitas.nn as qnn
    from brevitas.quant import Int8WeightPerChannelFloat, ShiftedUint8WeightPerChannelFloat
except ImportError:
    raise UserError("quantised nets need: pip install 'bigface[compress]'") from None

LARGEST_BIAS = 2**30  # largest code of a bias
SMALLEST = 1e-8  # least scale; values that are all 0 have it


class _OnGrid(torch.autograd.Function):
    """Clip to [low, high] and round to multiples of ``scale``; clipped values pass no gradient.

    Both ``low`` and ``high`` are multiples of ``scale``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.range = low, high
        return F.hardtanh(x, low, high).div_(scale).round_().mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return torch.ops.aten.hardtanh_backward(gradient, *ctx.saved_tensors, *ctx.range), None, None, None


class ActQuant(nn.Module):
    """Quantiser of activations: rounds them to a grid of 2^bits values, one of which is zero.

    code = clamp(round(x / scale) + zero_point, 0, 2^bits − 1), halves to even.
    """

    scale: Tensor  # float32 scalar
    zero_point: Tensor  # int32 scalar

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self.observer: Callable[[Tensor], None] | None = None  # if set, it sees the values, which pass unchanged

    def forward(self, x: Tensor) -> Tensor:
        """Return the nearest values of the grid."""
        if self.observer:
            self.observer(x)
            return x
        most = 2**self.bits - 1
        if x.device.type == "cpu":  # PyTorch's operator takes seven times as long there
            scale, zero = self.scale.item(), self.zero_point.item()
            return _OnGrid.apply(x.float(), scale, -zero * scale, (most - zero) * scale)
        return torch.fake_quantize_per_tensor_affine(x.float(), self.scale, self.zero_point, 0, most)

    def codes(self, x: Tensor) -> Tensor:
        """Return code − zero_point of values on the grid, as integers in float32."""
        return (x / self.scale).round()

    def from_sums(self, sums: Tensor, unit: Tensor) -> Tensor:
        """Return the grid's values for integer ``sums`` in units of ``unit``, in the arithmetic of integer kernels."""
        return self.from_codes((sums * (unit / self.scale)).round() + self.zero_point)

    def from_codes(self, codes: Tensor) -> Tensor:
        """Return the values of codes, which are clipped to the grid first."""
        return (codes.clamp(0, 2**self.bits - 1) - self.zero_point) * self.scale

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set scale and zero point so that the codes span [low, high], widened to hold 0."""
        low, high = low.clamp(max=0), high.clamp(min=0)
        self.scale.copy_(((high - low) / (2**self.bits - 1)).clamp(min=SMALLEST))
        self.zero_point.copy_((-low / self.scale).round())


class IntegerLayer(nn.Module):
    """A layer of a quantised net. In scheme ``integer`` it knows the quantisers of its inputs."""

    inputs: tuple[ActQuant, ...] = ()
    out: nn.Module  # quantiser of the output, or an identity in scheme ``quantface``; the last layer has none

    def exact(self) -> bool:
        """Return whether to compute with integers. Training computes with floats, since it needs gradients."""
        return not self.training and bool(self.inputs)

    def output(self) -> ActQuant:
        """Return the quantiser of the output in scheme ``integer``."""
        assert isinstance(self.out, ActQuant)
        return self.out


class Weighted(IntegerLayer):
    """A layer with quantised weights: a Brevitas ``layer`` with the weights and bias of the float layer."""

    def __init__(self, layer: qnn.QuantConv2d | qnn.QuantLinear, plain: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.layer.load_state_dict(plain.state_dict())

    def integers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the codes of weights and bias.

        The unit of the bias is the weights' scale times the input's scale. Where a bias would not fit, the row's
        scale is raised; the weights of such a row are nearly 0.

        Returns:
            Weights int8 [O, …], their scale float32 [O], and the bias int32 [O].
        """
        (source,), layer, weight = self.inputs, self.layer, self.layer.quant_weight()
        weight_scale_O, bias_O = weight.scale.detach().flatten(), layer.bias.detach()
        least_scale_O = bias_O.abs() / (source.scale * LARGEST_BIAS)
        scale_O = torch.maximum(weight_scale_O, least_scale_O)
        ratio_O = (weight_scale_O / scale_O).view(-1, *[1] * (layer.weight.ndim - 1))
        codes = (weight.int().detach() * ratio_O).round().to(torch.int8)
        bias_codes_O = (bias_O.double() / (source.scale * scale_O).double()).round().int()
        return codes, scale_O, bias_codes_O


class QuantConv(Weighted):
    """A convolution with quantised weights, and the quantiser of its output."""

    def __init__(self, conv: nn.Conv2d, config: QuantisedNet, out: nn.Module) -> None:
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        super().__init__(qnn.QuantConv2d(*shape, groups=conv.groups, **_weight_quant(config)), conv)
        self.out = out

    def forward(self, x_BIHW: Tensor) -> Tensor:
        """Convolve [B, I, H, W] and quantise the output [B, O, H, W]."""
        if not self.exact():
            return self.out(self.layer(x_BIHW))
        (source,), conv, (weight, scale_O, bias_O) = self.inputs, self.layer, self.integers()
        sums_BOHW = F.conv2d(source.codes(x_BIHW), weight.float(), None, conv.stride, conv.padding, 1, conv.groups)
        return self.output().from_sums(sums_BOHW + bias_O[:, None, None], (source.scale * scale_O)[:, None, None])


class QuantLinear(Weighted):
    """The last layer, with quantised weights and float embeddings."""

    def __init__(self, linear: nn.Linear, config: QuantisedNet) -> None:
        super().__init__(qnn.QuantLinear(linear.in_features, linear.out_features, **_weight_quant(config)), linear)

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return the embeddings float32 [B, D]."""
        if not self.exact():
            with torch.autocast(x_BI.device.type, enabled=False):
                return self.layer(x_BI.float())
        (source,), (weight, scale_O, bias_O) = self.inputs, self.integers()
        return (F.linear(source.codes(x_BI), weight.float()) + bias_O) * (source.scale * scale_O)


class QuantPReLU(IntegerLayer):
    """PReLU with quantised slopes, and the quantiser of its output.

    The codes of slopes are symmetric with one scale for all channels. In scheme ``integer`` slopes are at most 1.

    Args:
        prelu: Float layer.
        config: Section of the net.
        out: Quantiser of the output; None: the quantiser of the input.
    """

    zero_point: Tensor

    def __init__(self, prelu: nn.PReLU, config: QuantisedNet, out: nn.Module | None) -> None:
        super().__init__()
        self.slope = nn.Parameter(prelu.weight.detach().clone())
        self.most = 2 ** (config.weights - 1) - 1
        self.bounded = config.scheme == "integer"
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32), persistent=False)
        self.own = out

    @property
    def out(self) -> nn.Module:  # type: ignore[override]  # a property here, since the quantiser may be shared
        """Return the quantiser of the output."""
        return self.own or self.inputs[0]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Apply the PReLU and quantise the output, shapes [B, C, H, W]."""
        if not self.exact():
            return self.out(prelu(x_BCHW, self._slopes()))
        (source,), (slope_C, scale) = self.inputs, self.int_slope()
        codes_BCHW, out = source.codes(x_BCHW), self.output()
        scaled_BCHW = out.from_sums(codes_BCHW * slope_C[:, None, None], source.scale * scale)
        return torch.maximum(out.from_sums(codes_BCHW, source.scale), scaled_BCHW)

    def int_slope(self) -> tuple[Tensor, Tensor]:
        """Return the codes of slopes int8 [C] and their scale, a float32 scalar."""
        slope_C, scale = self._bounded()
        return (slope_C.detach() / scale).round().to(torch.int8), scale

    def _slopes(self) -> Tensor:
        """Return the slopes on their grid, with gradient."""
        slope_C, scale = self._bounded()
        return torch.fake_quantize_per_tensor_affine(slope_C, scale, self.zero_point, -self.most, self.most)

    def _bounded(self) -> tuple[Tensor, Tensor]:
        """Return the slopes and their scale; in scheme ``integer`` bounded so that none is rounded above 1."""
        slope_C = self.slope.clamp(max=1) if self.bounded else self.slope
        scale = slope_C.detach().abs().amax().clamp(min=SMALLEST) / self.most
        if self.bounded:
            largest = (1 / scale + 1e-3).floor() * scale  # greatest value of the grid up to 1
            slope_C = slope_C.clamp(max=largest)
        return slope_C, scale


class QuantAdd(IntegerLayer):
    """The sum of a residual block's branch and shortcut, and the quantiser of the sum."""

    def __init__(self, out: nn.Module) -> None:
        super().__init__()
        self.out = out

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """Add and quantise; in integers with the fused multiply-adds that QLinearAdd computes."""
        if not self.exact():
            return self.out(a_BCHW + b_BCHW)
        (a, b), out = self.inputs, self.output()
        ratio_a, ratio_b = a.scale / out.scale, b.scale / out.scale
        offset = out.zero_point - _fused(ratio_a, a.zero_point, ratio_b * b.zero_point)
        sum_BCHW = _fused(b.codes(b_BCHW) + b.zero_point, ratio_b, offset)
        return out.from_codes(_fused(a.codes(a_BCHW) + a.zero_point, ratio_a, sum_BCHW).round())


def _fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a·b + c, rounded to float32 once."""
    return (a.double() * b.double() + c.double()).float()


class ResidualPath(nn.Module):
    """A residual block: the output of ``branch`` plus the input, or plus the output of ``skip``."""

    def __init__(self, branch: nn.Sequential, skip: nn.Module | None, add: QuantAdd) -> None:
        super().__init__()
        self.branch, self.skip, self.add = branch, skip, add

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, I, H, W] to [B, O, H, W]."""
        return self.add(self.branch(x_BCHW), x_BCHW if self.skip is None else self.skip(x_BCHW))


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
        self.input_size, self.embedding, self.input_std = net.input_size, net.embedding, net.input_std
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
        pixels = _pixels(self.input_std, config)
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
            case QuantConv() | QuantPReLU():
                layer.inputs = (source,)
                source = layer.output()
            case QuantLinear():
                layer.inputs = (source,)
    return source


def _iresnet_layers(net: IResNet, config: QuantisedNet) -> Iterator[nn.Module]:
    """Yield the layers between pixels and the last linear layer."""
    yield from _conv_prelu(net.conv1, net.prelu, config)
    for block in [module for module in net.modules() if isinstance(module, IResBlock)]:
        norm, skip = convolution(block.bn1), block.downsample and convolution(block.downsample[0])
        integer = config.scheme == "integer"
        branch = [
            QuantConv(norm, config, _input_quantiser(config)) if integer else norm,
            *_conv_prelu(block.conv1, block.prelu, config),
            QuantConv(block.conv2, config, _inner_quantiser(config)),
        ]
        way = QuantConv(skip, config, _inner_quantiser(config)) if skip and integer else skip
        yield ResidualPath(nn.Sequential(*branch), way, QuantAdd(_input_quantiser(config)))


def _mobilefacenet_layers(net: MobileFaceNet, config: QuantisedNet) -> Iterator[nn.Module]:
    """Yield the layers between pixels and the last linear layer."""
    yield from _conv_prelu(net.stem.conv, net.stem.prelu, config)
    yield from _conv_prelu(net.stem_depthwise.conv, net.stem_depthwise.prelu, config)
    for block in net.bottlenecks():
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


def _pixels(input_std: float, config: QuantisedNet) -> nn.Module:
    """Return the quantiser of normalised pixels: zero is code 127, and 255 of 256 pixel values have distinct codes."""
    if config.scheme != "integer":
        return nn.Identity()
    quantiser, end = ActQuant(8), torch.tensor(127.5 / input_std)
    quantiser.set_range(-end, end * 128 / 127)
    return quantiser


def _weight_quant(config: QuantisedNet) -> dict[str, object]:
    """Return the arguments of a Brevitas layer for its weights."""
    scheme = Int8WeightPerChannelFloat if config.scheme == "integer" else ShiftedUint8WeightPerChannelFloat
    return {"weight_quant": scheme, "weight_bit_width": config.weights}
