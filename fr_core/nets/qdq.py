"""A quantised net as an ONNX model that runtimes execute with integer kernels (docs/quantisation.md).

The model has standard operators only, of opset 19. Every layer stands between DequantizeLinear and QuantizeLinear
(QDQ). ONNX Runtime fuses these into QLinearConv, QGemm and QLinearAdd.

No runtime has an integer PReLU, and a float PReLU between integer convolutions takes longer than the convolutions. For
slopes up to 1 a PReLU is max(x, slope·x). The product becomes a depthwise 1×1 convolution, and the maximum is taken
of codes, which have the order of their values. Codes always have type uint8; with fewer bits a Min caps them.

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
from fr_core.nets.quantised import Quantised
from fr_core.nets.quantised_layers import GATE, ActQuant, QuantConv, QuantLinear, QuantPReLU, QuantSE, ResidualPath

OPSET, IR_VERSION = 19, 9


@dataclass(frozen=True)
class Codes:
    """A uint8 tensor of codes in the graph: value = (code − zero_point) · scale."""

    name: str
    scale: np.float32
    zero_point: np.uint8


@dataclass
class Graph:
    """Nodes and constants of a model. Equal constants are stored once. Names are short to keep files small."""

    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[tuple[object, ...], TensorProto] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)  # name of codes -> name of their dequantised values

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node; return the name of its output."""
        output = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def constant(self, array: ArrayLike) -> str:
        """Add a constant, or find an equal one; return its name.

        int8 constants are never shared: ONNX Runtime's x64quantprecision rewrites each in place, and expects one use.
        """
        value = np.asarray(array)
        unshared = len(self.constants) if value.dtype == np.int8 else None
        key = (value.dtype, value.shape, value.tobytes(), unshared)
        name = f"c{len(self.constants)}"
        return self.constants.setdefault(key, numpy_helper.from_array(value, name)).name

    def quantised(self, x: str, quantiser: ActQuant, capped: bool = True) -> Codes:
        """Quantise float values; ``capped`` limits codes of fewer than 8 bits to their greatest one."""
        scale, zero_point = np.float32(quantiser.scale), np.uint8(quantiser.zero_point)
        name = self.node("QuantizeLinear", x, self.constant(scale), self.constant(zero_point))
        return Codes(self.capped(name, quantiser.bits) if capped else name, scale, zero_point)

    def capped(self, codes: str, bits: int) -> str:
        """Limit codes to 2^bits − 1."""
        return codes if bits == 8 else self.node("Min", codes, self.constant(np.uint8(2**bits - 1)))

    def dequantised(self, x: Codes) -> str:
        """Return the name of the float values of codes."""
        if x.name not in self.floats:
            inputs = (x.name, self.constant(x.scale), self.constant(x.zero_point))
            self.floats[x.name] = self.node("DequantizeLinear", *inputs)
        return self.floats[x.name]

    def integers(self, codes: Tensor, scale: Tensor) -> str:
        """Add constant codes, dequantised by one scale or by a scale for each row."""
        zero_points = torch.zeros(scale.shape, dtype=codes.dtype)  # x64quantprecision needs them, though all are 0
        inputs = [self.constant(part.numpy()) for part in (codes, scale, zero_points)]
        return self.node("DequantizeLinear", *inputs, **({"axis": 0} if scale.ndim else {}))

    def weighted(
        self, operator: str, x: Codes, layer: QuantConv | QuantLinear, **attributes: int | Sequence[int]
    ) -> str:
        """Add a convolution or a linear layer; return the name of its float output."""
        codes, scale_O, bias_codes = layer.integers()
        weight = self.integers(codes, scale_O)
        bias_O = self.integers(bias_codes, torch.tensor(x.scale) * scale_O)
        return self.node(operator, self.dequantised(x), weight, bias_O, **attributes)


def qdq_model(net: Quantised, input_name: str, output_name: str) -> ModelProto:
    """Build the model of a quantised net: float pixels [B, 3, H, W] to float embeddings [B, D], for any B.

    Args:
        net: Net on the CPU.
        input_name: Name of the pixels in the model.
        output_name: Name of the embeddings in the model.

    Raises:
        UserError: Integer kernels do not run the net's scheme.
    """
    if net.scheme != "integer":
        raise UserError(
            f"a net of scheme {net.scheme} cannot be an int8 file: integer kernels refuse weights with a zero point "
            'for each channel; train the net with net.scheme = "integer"'
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
    """Add layers one after the other; return the codes of the last output."""
    for layer in layers:
        x = _layer(graph, layer, x)
    return x


def _layer(graph: Graph, layer: nn.Module, x: Codes) -> Codes:
    """Add a layer; return the codes of its output."""
    match layer:
        case QuantConv():
            return graph.quantised(graph.weighted("Conv", x, layer, **_geometry(layer)), layer.output())
        case QuantPReLU():
            return _prelu(graph, layer, x)
        case QuantSE():
            return _gated(graph, layer, x)
        case ResidualPath():
            branch = _chain(graph, layer.branch, x)
            skip = _layer(graph, layer.skip, x) if layer.skip else x
            total = graph.node("Add", graph.dequantised(branch), graph.dequantised(skip))
            return graph.quantised(total, layer.add.output())
        case nn.Flatten():
            return Codes(graph.node("Flatten", x.name), x.scale, x.zero_point)
        case _:
            raise TypeError(type(layer).__name__)


def _prelu(graph: Graph, layer: QuantPReLU, x: Codes) -> Codes:
    """Add a PReLU as the maximum of x and slope·x, both in codes of the PReLU's output."""
    (slope_C, scale), out = layer.int_slope(), layer.output()
    product = _scaled(graph, x, slope_C, scale, out)
    same = x if layer.own is None else _scaled(graph, x, torch.ones_like(slope_C), torch.ones(()), out)
    greater = graph.node("Max", same.name, product.name)
    return Codes(graph.capped(greater, out.bits), product.scale, product.zero_point)


def _gated(graph: Graph, layer: QuantSE, x: Codes) -> Codes:
    """Add squeeze and excitation: the gates are computed in float, then channels and gates are multiplied as codes."""
    gate = graph.node("GlobalAveragePool", graph.dequantised(x))
    for conv, activation in ((layer.se.fc1, "Relu"), (layer.se.fc2, "Sigmoid")):
        weight = graph.constant(conv.weight.detach().numpy())
        gate = graph.node(activation, graph.node("Conv", gate, weight, kernel_shape=[1, 1]))
    scale, zero_point = np.float32(GATE), np.uint8(0)
    codes = graph.node("QuantizeLinear", gate, graph.constant(scale), graph.constant(zero_point))
    gates = graph.dequantised(Codes(codes, scale, zero_point))
    return graph.quantised(graph.node("Mul", graph.dequantised(x), gates), layer.output())


def _scaled(graph: Graph, x: Codes, factor_C: Tensor, scale: Tensor, quantiser: ActQuant) -> Codes:
    """Multiply each channel by a factor; the codes are not capped."""
    weight_C111 = graph.integers(factor_C.view(-1, 1, 1, 1), scale)
    product = graph.node("Conv", graph.dequantised(x), weight_C111, kernel_shape=[1, 1], group=len(factor_C))
    return graph.quantised(product, quantiser, capped=False)


def _geometry(layer: QuantConv) -> dict[str, int | Sequence[int]]:
    """Return the attributes of a Conv node."""
    conv = layer.layer
    return {"kernel_shape": conv.kernel_size, "strides": conv.stride, "pads": conv.padding * 2, "group": conv.groups}
