"""Quantised nets: integer arithmetic, simulated in floating point so that it can be trained (METHODS §6).

A net's batch norm is folded first. Then every layer's weights lie on a grid of ``weights`` bits, and what layers read
on one of ``activations`` bits; rounding passes gradients straight through, clipping stops them. What a convolution
leaves before a PReLU or an addition has 8 bits whatever the rest has: integer kernels hold it so. The pixels have 8
bits too, the embedding is float.

Scheme ``integer`` is what integer kernels run, and in eval mode the net computes what they do: sums of products of
codes, a float32 factor, rounding. It must: where one code falls on the other side of a half, the layers after it make
of that, in the end, an error as large as quantisation's own. Weights are symmetric per output channel (their range is
that of the moment), activations asymmetric per tensor (their range is measured once, ``fr_core/nets/calibration.py``).
Scheme ``quantface`` is the paper's simulation: asymmetric weights; batch norm, shortcuts and what is left before a
PReLU or an addition in float.

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

LARGEST_BIAS = 2**30  # as a code
SMALLEST = 1e-8  # scale of nothing but 0


class _OnGrid(torch.autograd.Function):
    """Clips to low … high, multiples of ``scale``, and rounds to such; the gradient ends where it clips."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.range = low, high
        return F.hardtanh(x, low, high).div_(scale).round_().mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return torch.ops.aten.hardtanh_backward(gradient, *ctx.saved_tensors, *ctx.range), None, None, None


class ActQuant(nn.Module):
    """Puts activations on a grid of 2^bits values, zero among them.

    code = clamp(round(x / scale) + zero_point, 0, 2^bits − 1), halves to even.
    """

    scale: Tensor  # float32 scalar
    zero_point: Tensor  # int32 scalar

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self.observer: Callable[[Tensor], None] | None = None  # sees values, which then pass unchanged

    def forward(self, x: Tensor) -> Tensor:
        if self.observer:
            self.observer(x)
            return x
        most = 2**self.bits - 1
        if x.device.type == "cpu":  # where PyTorch's operator takes seven times as long
            scale, zero = self.scale.item(), self.zero_point.item()
            return _OnGrid.apply(x.float(), scale, -zero * scale, (most - zero) * scale)
        return torch.fake_quantize_per_tensor_affine(x.float(), self.scale, self.zero_point, 0, most)

    def codes(self, x: Tensor) -> Tensor:
        """Of values on the grid: integers in float32, 0 for the value 0."""
        return (x / self.scale).round()

    def of_sums(self, sums: Tensor, unit: Tensor) -> Tensor:
        """Puts integer ``sums`` of that ``unit`` on the grid, in the arithmetic of integer kernels."""
        return self.of_codes((sums * (unit / self.scale)).round() + self.zero_point)

    def of_codes(self, codes: Tensor) -> Tensor:
        return (codes.clamp(0, 2**self.bits - 1) - self.zero_point) * self.scale

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Lets the codes span ``low`` … ``high``, widened to hold 0."""
        low, high = low.clamp(max=0), high.clamp(min=0)
        self.scale.copy_(((high - low) / (2**self.bits - 1)).clamp(min=SMALLEST))
        self.zero_point.copy_((-low / self.scale).round())


class IntegerLayer(nn.Module):
    """A layer that knows the quantisers of what it reads, once it stands in a net of scheme ``integer``."""

    reads: tuple[ActQuant, ...] = ()
    out: nn.Module  # the quantiser of what it leaves, or in scheme ``quantface`` an identity; the last layer has none

    def exact(self) -> bool:
        """Whether to compute with integers: not in training, which needs gradients."""
        return not self.training and bool(self.reads)

    def leaves(self) -> ActQuant:
        """The quantiser of what it leaves, in scheme ``integer``."""
        assert isinstance(self.out, ActQuant)
        return self.out


class Weighted(IntegerLayer):
    """A layer with quantised weights: Brevitas's ``layer`` for the float one, with its weights and bias."""

    def __init__(self, layer: qnn.QuantConv2d | qnn.QuantLinear, plain: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.layer.load_state_dict(plain.state_dict())

    def integers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights int8 [O, …], their scale float32 [O], and the bias int32 [O] in units of it times the input's scale.

        A scale is raised where the bias would not fit: that row is all but 0.
        """
        (read,), layer, weight = self.reads, self.layer, self.layer.quant_weight()
        own_O, bias_O = weight.scale.detach().flatten(), layer.bias.detach()
        scale_O = torch.maximum(own_O, bias_O.abs() / (read.scale * LARGEST_BIAS))
        ratio_O = (own_O / scale_O).view(-1, *[1] * (layer.weight.ndim - 1))
        codes = (weight.int().detach() * ratio_O).round().to(torch.int8)
        return codes, scale_O, (bias_O.double() / (read.scale * scale_O).double()).round().int()


class QuantConv(Weighted):
    """A convolution with quantised weights, and the quantiser of what it leaves."""

    def __init__(self, conv: nn.Conv2d, config: QuantisedNet, out: nn.Module) -> None:
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        super().__init__(qnn.QuantConv2d(*shape, groups=conv.groups, **_weight_quant(config)), conv)
        self.out = out

    def forward(self, x_BIHW: Tensor) -> Tensor:
        if not self.exact():
            return self.out(self.layer(x_BIHW))
        (read,), conv, (weight, scale_O, bias_O) = self.reads, self.layer, self.integers()
        sums_BOHW = F.conv2d(read.codes(x_BIHW), weight.float(), None, conv.stride, conv.padding, 1, conv.groups)
        return self.leaves().of_sums(sums_BOHW + bias_O[:, None, None], (read.scale * scale_O)[:, None, None])


class QuantLinear(Weighted):
    """The last layer: quantised weights, float embeddings."""

    def __init__(self, linear: nn.Linear, config: QuantisedNet) -> None:
        super().__init__(qnn.QuantLinear(linear.in_features, linear.out_features, **_weight_quant(config)), linear)

    def forward(self, x_BI: Tensor) -> Tensor:
        if not self.exact():
            with torch.autocast(x_BI.device.type, enabled=False):
                return self.layer(x_BI.float())
        (read,), (weight, scale_O, bias_O) = self.reads, self.integers()
        return (F.linear(read.codes(x_BI), weight.float()) + bias_O) * (read.scale * scale_O)


class QuantPReLU(IntegerLayer):
    """PReLU with quantised slopes, symmetric, of one scale, at most 1; and the quantiser of what it leaves.

    Args:
        out: None for that of what it reads.
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
    def out(self) -> nn.Module:  # type: ignore[override]  # may be that of the layer before
        return self.own or self.reads[0]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.exact():
            return self.out(prelu(x_BCHW, self._slopes()))
        (read,), (slope_C, scale) = self.reads, self.int_slope()
        codes_BCHW, out = read.codes(x_BCHW), self.leaves()
        scaled_BCHW = out.of_sums(codes_BCHW * slope_C[:, None, None], read.scale * scale)
        return torch.maximum(out.of_sums(codes_BCHW, read.scale), scaled_BCHW)

    def int_slope(self) -> tuple[Tensor, Tensor]:
        """int8 [C] and its scale, float32 scalar."""
        slope_C, scale = self._bounded()
        return (slope_C.detach() / scale).round().to(torch.int8), scale

    def _slopes(self) -> Tensor:
        slope_C, scale = self._bounded()
        return torch.fake_quantize_per_tensor_affine(slope_C, scale, self.zero_point, -self.most, self.most)

    def _bounded(self) -> tuple[Tensor, Tensor]:
        """Slopes that no rounding brings above 1 in scheme ``integer``, and their scale."""
        slope_C = self.slope.clamp(max=1) if self.bounded else self.slope
        scale = slope_C.detach().abs().amax().clamp(min=SMALLEST) / self.most
        return (slope_C.clamp(max=(1 / scale + 1e-3).floor() * scale) if self.bounded else slope_C), scale


class QuantAdd(IntegerLayer):
    """The sum of a residual block's two ways, and its quantiser."""

    def __init__(self, out: nn.Module) -> None:
        super().__init__()
        self.out = out

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        if not self.exact():
            return self.out(a_BCHW + b_BCHW)
        (a, b), out = self.reads, self.leaves()
        ratio_a, ratio_b = a.scale / out.scale, b.scale / out.scale
        offset = out.zero_point - _fused(ratio_a, a.zero_point, ratio_b * b.zero_point)
        sum_BCHW = _fused(b.codes(b_BCHW) + b.zero_point, ratio_b, offset)
        return out.of_codes(_fused(a.codes(a_BCHW) + a.zero_point, ratio_a, sum_BCHW).round())


def _fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a·b + c, rounded to float32 once."""
    return (a.double() * b.double() + c.double()).float()


class ResidualPath(nn.Module):
    """A residual block: what ``branch`` makes of the input, plus the input itself or what ``skip`` makes of it."""

    def __init__(self, branch: nn.Sequential, skip: nn.Module | None, add: QuantAdd) -> None:
        super().__init__()
        self.branch, self.skip, self.add = branch, skip, add

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.add(self.branch(x_BCHW), x_BCHW if self.skip is None else self.skip(x_BCHW))


class Quantised(Backbone):
    """A net in integers, from normalised pixels to float embeddings.

    Args:
        net: the float net that it copies. The ranges of activations are to be set, by
            :func:`fr_core.nets.calibration.calibrate` or from a checkpoint.
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
        """Normalised pixels [B, 3, H, W] to embeddings float32 [B, D] (not L2-normalised)."""
        with nullcontext() if self.training else torch.autocast(x_BCHW.device.type, enabled=False):
            return self.layers(x_BCHW)

    def ranges(self) -> dict[str, ActQuant]:
        """The quantisers of activations whose ranges are measured, by name."""
        return {name: module for name, module in self.layers[1:].named_modules() if isinstance(module, ActQuant)}


def _connect(layers: Iterable[nn.Module], read: ActQuant) -> ActQuant:
    """Tells the layers of a chain the quantisers of what they read; the quantiser of what the last one leaves."""
    for layer in layers:
        match layer:
            case ResidualPath():
                layer.add.reads = (_connect(layer.branch, read), _connect([layer.skip], read) if layer.skip else read)
                read = layer.add.leaves()
            case QuantConv() | QuantPReLU():
                layer.reads = (read,)
                read = layer.leaves()
            case QuantLinear():
                layer.reads = (read,)
    return read


def _iresnet_layers(net: IResNet, config: QuantisedNet) -> Iterator[nn.Module]:
    yield from _conv_prelu(net.conv1, net.prelu, config)
    for block in [module for module in net.modules() if isinstance(module, IResBlock)]:
        norm, skip = convolution(block.bn1), block.downsample and convolution(block.downsample[0])
        integer = config.scheme == "integer"
        branch = [
            QuantConv(norm, config, _read(config)) if integer else norm,
            *_conv_prelu(block.conv1, block.prelu, config),
            QuantConv(block.conv2, config, _left(config)),
        ]
        way = QuantConv(skip, config, _left(config)) if skip and integer else skip
        yield ResidualPath(nn.Sequential(*branch), way, QuantAdd(_read(config)))


def _mobilefacenet_layers(net: MobileFaceNet, config: QuantisedNet) -> Iterator[nn.Module]:
    yield from _conv_prelu(net.stem.conv, net.stem.prelu, config)
    yield from _conv_prelu(net.stem_depthwise.conv, net.stem_depthwise.prelu, config)
    for block in net.bottlenecks():
        inside = (block.expand, block.depthwise)
        branch = [layer for part in inside for layer in _conv_prelu(part.conv, part.prelu, config)]
        out = _left(config) if block.residual else _read(config)
        branch.append(QuantConv(block.project.conv, config, out))
        yield from [ResidualPath(nn.Sequential(*branch), None, QuantAdd(_read(config)))] if block.residual else branch
    yield from _conv_prelu(net.expand.conv, net.expand.prelu, config)
    yield QuantConv(net.pool.conv, config, _read(config))


def _conv_prelu(conv: nn.Conv2d, prelu: nn.PReLU | None, config: QuantisedNet) -> list[nn.Module]:
    """With one quantiser for both where it may have 8 bits: slopes are at most 1, so what goes in spans more."""
    assert prelu is not None
    alike = config.scheme == "integer" and config.activations == 8
    return [QuantConv(conv, config, _left(config)), QuantPReLU(prelu, config, None if alike else _read(config))]


def _read(config: QuantisedNet) -> nn.Module:
    """The quantiser of what a layer with weights reads."""
    return ActQuant(config.activations)


def _left(config: QuantisedNet) -> nn.Module:
    """The quantiser of what is left before a PReLU or an addition."""
    return ActQuant(8) if config.scheme == "integer" else nn.Identity()


def _pixels(input_std: float, config: QuantisedNet) -> nn.Module:
    """The quantiser of normalised pixels: zero is code 127, and 255 pixel values of 256 keep a code of their own."""
    if config.scheme != "integer":
        return nn.Identity()
    quantiser, end = ActQuant(8), torch.tensor(127.5 / input_std)
    quantiser.set_range(-end, end * 128 / 127)
    return quantiser


def _weight_quant(config: QuantisedNet) -> dict[str, object]:
    scheme = Int8WeightPerChannelFloat if config.scheme == "integer" else ShiftedUint8WeightPerChannelFloat
    return {"weight_quant": scheme, "weight_bit_width": config.weights}
