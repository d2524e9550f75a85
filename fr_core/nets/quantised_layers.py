"""Layers of quantised nets, whose arithmetic :mod:`fr_core.nets.quantised` explains.

Legend: B batch, C channels, I input and O output channels, H W pixels, D embedding.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fr_core.config.nets import QuantisedNet
from fr_core.errors import UserError
from fr_core.nets.iresnet import SqueezeExcitation
from fr_core.nets.prelu import prelu

try:
    import brevitas.nn as qnn
    from brevitas.quant import Int8WeightPerChannelFloat, ShiftedUint8WeightPerChannelFloat
except ImportError:
    raise UserError("quantised nets need: pip install 'bigface[compress]'") from None

LARGEST_BIAS = 2**30  # largest code of a bias
SMALLEST = 1e-8  # least scale; values that are all 0 have it
GATE = 2.0**-8  # scale of the gates of squeeze and excitation; 1/2, the gate of a channel of zeros, is a code


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


class QuantSE(IntegerLayer):
    """Squeeze and excitation with float weights, and the quantiser of its output.

    In scheme ``integer`` the gates have 8 bits.
    """

    def __init__(self, se: SqueezeExcitation, config: QuantisedNet, out: nn.Module) -> None:
        super().__init__()
        self.se, self.out, self.rounded = se, out, config.scheme == "integer"

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Multiply the channels by their gates and quantise the output, shapes [B, C, H, W]."""
        gate_BC11 = self.se.gate(x_BCHW.mean((2, 3), keepdim=True))
        if not self.exact():
            if self.rounded:
                gate_BC11 = torch.fake_quantize_per_tensor_affine(gate_BC11.float(), GATE, 0, 0, 255)
            return self.out(x_BCHW * gate_BC11)
        (source,) = self.inputs
        gate_codes_BC11 = (gate_BC11 / GATE).round().clamp(max=255)
        return self.output().from_sums(source.codes(x_BCHW) * gate_codes_BC11, source.scale * GATE)


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


def _weight_quant(config: QuantisedNet) -> dict[str, object]:
    """Return the arguments of a Brevitas layer for its weights."""
    scheme = Int8WeightPerChannelFloat if config.scheme == "integer" else ShiftedUint8WeightPerChannelFloat
    return {"weight_quant": scheme, "weight_bit_width": config.weights}
