"""A quantised net as an ONNX model that runtimes execute with integer kernels (METHODS §6).

Standard operators alone, opset 19: every layer stands between DequantizeLinear and QuantizeLinear (QDQ), which ONNX
Runtime turns into QLinearConv, QGemm and QLinearAdd. No runtime has an integer PReLU, and a float one between integer
convolutions takes longer than they do. So it becomes max(x, slope·x), which it is for slopes up to 1: the product is a
depthwise 1×1 convolution, and the greater code is that of the greater value. Codes lie in uint8 always; those of fewer
bits end at a minimum.

Legend: B batch, C channels, I O input and output channels, H W pixels, D embedding.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from fr_core.errors import UserError
from fr_core.nets.quantised import ActQuant, QuantConv, Quantised, QuantLinear, QuantPReLU, ResidualPath

OPSET, IR_VERSION = 19, 9


@dataclass(frozen=True)
class Codes:
    """uint8 values in the graph: value = (code − zero_point) · scale."""

    name: str
    scale: np.float32
    zero_point: np.uint8


@dataclass
class Graph:
    """Nodes, and constants of which equal ones are one; names are short, since they are much of a small net's file."""

    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[tuple[object, ...], TensorProto] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)  # codes -> their values

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        output = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def constant(self, given: ArrayLike) -> str:
        """The name of a constant. int8 ones stay apart: x64quantprecision changes each where it stands, but once."""
        value = np.asarray(given)
        alone = len(self.constants) if value.dtype == np.int8 else None
        key = (value.dtype, value.shape, value.tobytes(), alone)
        name = f"c{len(self.constants)}"
        return self.constants.setdefault(key, numpy_helper.from_array(value, name)).name

    def quantised(self, x: str, quantiser: ActQuant, capped: bool = True) -> Codes:
        scale, zero_point = np.float32(quantiser.scale), np.uint8(quantiser.zero_point)
        name = self.node("QuantizeLinear", x, self.constant(scale), self.constant(zero_point))
        return Codes(self.capped(name, quantiser.bits) if capped else name, scale, zero_point)

    def capped(self, codes: str, bits: int) -> str:
        return codes if bits == 8 else self.node("Min", codes, self.constant(np.uint8(2**bits - 1)))

    def dequantised(self, x: Codes) -> str:
        if x.name not in self.floats:
            inputs = (x.name, self.constant(x.scale), self.constant(x.zero_point))
            self.floats[x.name] = self.node("DequantizeLinear", *inputs)
        return self.floats[x.name]

    def integers(self, codes: Tensor, scale: Tensor) -> str:
        """Constant codes, dequantised by a scale for all or for each row."""
        zero_points = torch.zeros(scale.shape, dtype=codes.dtype)  # x64quantprecision needs them to be there
        inputs = [self.constant(part.numpy()) for part in (codes, scale, zero_points)]
        return self.node("DequantizeLinear", *inputs, **({"axis": 0} if scale.ndim else {}))

    def weighted(
        self, operator: str, x: Codes, layer: QuantConv | QuantLinear, **attributes: int | Sequence[int]
    ) -> str:
        """A convolution or a linear layer: its float values."""
        codes, scale_O, bias_codes = layer.integers()
        weight = self.integers(codes, scale_O)
        bias_O = self.integers(bias_codes, torch.tensor(x.scale) * scale_O)
        return self.node(operator, self.dequantised(x), weight, bias_O, **attributes)


def qdq_model(net: Quantised, input_name: str, output_name: str) -> ModelProto:
    """The model of a quantised net on the CPU: float pixels [B, 3, H, W] to float embeddings [B, D], for any B.

    Raises:
        UserError: its scheme is not that of integer kernels.
    """
    if net.scheme != "integer":
        raise UserError(
            f"a net of scheme {net.scheme} cannot be an int8 file: its weights have a zero point for each channel, "
            'which integer kernels refuse; train it with net.scheme = "integer"'
        )
    graph = Graph()
    pixels, *layers, linear = net.layers
    assert isinstance(pixels, ActQuant)
    assert isinstance(linear, QuantLinear)
    codes = _chain(graph, layers, graph.quantised(input_name, pixels))
    graph.weighted("Gemm", codes, linear, transB=1)
    graph.nodes[-1].output[0] = output_name
    inputs = helper.make_tensor_value_info(input_name, TensorProto.FLOAT, ["B", 3, net.input_size, net.input_size])
    outputs = helper.make_tensor_value_info(output_name, TensorProto.FLOAT, ["B", net.embedding])
    constants = list(graph.constants.values())
    return helper.make_model(
        helper.make_graph(graph.nodes, "quantised", [inputs], [outputs], constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )


def _chain(graph: Graph, layers: Iterable[nn.Module], x: Codes) -> Codes:
    for layer in layers:
        x = _layer(graph, layer, x)
    return x


def _layer(graph: Graph, layer: nn.Module, x: Codes) -> Codes:
    match layer:
        case QuantConv():
            return graph.quantised(graph.weighted("Conv", x, layer, **_geometry(layer)), layer.leaves())
        case QuantPReLU():
            return _prelu(graph, layer, x)
        case ResidualPath():
            branch = _chain(graph, layer.branch, x)
            skip = _layer(graph, layer.skip, x) if layer.skip else x
            return graph.quantised(
                graph.node("Add", graph.dequantised(branch), graph.dequantised(skip)), layer.add.leaves()
            )
        case nn.Flatten():
            return Codes(graph.node("Flatten", x.name), x.scale, x.zero_point)
        case _:
            raise TypeError(type(layer).__name__)


def _prelu(graph: Graph, layer: QuantPReLU, x: Codes) -> Codes:
    (slope_C, scale), out = layer.int_slope(), layer.leaves()
    scaled = _scaled(graph, x, slope_C, scale, out)
    same = x if layer.own is None else _scaled(graph, x, torch.ones_like(slope_C), torch.ones(()), out)
    greater = graph.node("Max", same.name, scaled.name)
    return Codes(graph.capped(greater, out.bits), scaled.scale, scaled.zero_point)


def _scaled(graph: Graph, x: Codes, factor_C: Tensor, scale: Tensor, quantiser: ActQuant) -> Codes:
    """Every channel times a factor of its own, not capped."""
    weight_C111 = graph.integers(factor_C.view(-1, 1, 1, 1), scale)
    product = graph.node("Conv", graph.dequantised(x), weight_C111, kernel_shape=[1, 1], group=len(factor_C))
    return graph.quantised(product, quantiser, capped=False)


def _geometry(layer: QuantConv) -> dict[str, int | Sequence[int]]:
    conv = layer.layer
    return {"kernel_shape": conv.kernel_size, "strides": conv.stride, "pads": conv.padding * 2, "group": conv.groups}
