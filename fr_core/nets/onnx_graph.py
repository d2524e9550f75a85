"""Turns the ONNX graph of another program back into a net that can be trained, if it is an IR-ResNet or MobileFaceNet.

Exporters fold a batch norm into the convolution before it. Such a norm is unfolded here: its shift is the
convolution's bias, and it changes nothing else. In eval mode the net computes what the graph does, which is compared.
Such a norm never saw a batch. ``fr_core/train/statistics.py`` measures it before the net is trained.

Legend: B batch, C channels, O outputs, H W pixels.
"""

from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fr_core.config.nets import IResNetNet, MobileFaceNetNet
from fr_core.errors import UserError
from fr_core.nets.backbone import Backbone, normalised
from fr_core.nets.build import build_net
from fr_core.nets.families import Family, State, to_rgb
from fr_core.nets.mobilefacenet import LAST_EPS
from fr_core.nets.onnx_foreign import family_of, plain_pixels
from fr_core.nets.onnx_net import OnnxNet, open_onnx, read_model, written_here
from fr_core.nets.sections import section_of

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

PASSING = ("Identity", "Dropout", "Cast")  # operators that leave values as they are, at inference
RESHAPING = ("Identity", "Reshape", "Unsqueeze", "Squeeze")  # what exporters do to a slope before its PRelu
IMAGES = 4  # on which the net is compared with its graph
LEAST_COSINE = 0.99999
USUAL_EPS = 1e-5  # of the norms, where all were folded


class Unlike(Exception):
    """The graph goes on in a way that no net here does; the text says how."""


class Graph:
    """The operators of a model, each found by the value that it takes."""

    def __init__(self, model: "ModelProto") -> None:
        from onnx import numpy_helper

        self.constants: dict[str, Tensor] = {}
        for tensor in model.graph.initializer:
            self.constants[tensor.name] = torch.from_numpy(numpy_helper.to_array(tensor).copy())
        (self.input,) = (end.name for end in model.graph.input if end.name not in self.constants)
        self.takers: dict[str, list[NodeProto]] = {}
        self.same: dict[str, str] = {}  # output of an operator that passes a value -> that value
        for node in model.graph.node:
            first = self.source(node.input[0]) if node.input else ""
            if node.op_type == "Constant":
                (value,) = (attribute.t for attribute in node.attribute if attribute.name == "value")
                self.constants[node.output[0]] = torch.from_numpy(numpy_helper.to_array(value).copy())
            elif node.op_type in RESHAPING and first in self.constants:
                self.constants[node.output[0]] = self.constants[first]
            elif node.op_type in PASSING or _is_pool_of_one_pixel(node):
                self.same[node.output[0]] = first
            else:
                for name in {self.source(name) for name in node.input} - self.constants.keys():
                    self.takers.setdefault(name, []).append(node)

    def source(self, value: str) -> str:
        """Return the value that operators passed on as this one."""
        return self.same.get(value, value)

    def only(self, value: str, *operators: str) -> "NodeProto":
        """Return the one operator that takes a value.

        Raises:
            Unlike: Several do, or it is another operator.
        """
        takers = self.takers.get(value, [])
        if len(takers) != 1 or takers[0].op_type not in operators:
            found = " and ".join(node.op_type for node in takers) or "the end"
            raise Unlike(f"after {value} comes {found}, not {' or '.join(operators)}")
        return takers[0]

    def next_is(self, value: str, operator: str) -> bool:
        """Return whether one operator of this kind, and no other, takes a value."""
        return [node.op_type for node in self.takers.get(value, [])] == [operator]

    def constant(self, node: "NodeProto", index: int) -> Tensor:
        """Return a constant input of an operator.

        Raises:
            Unlike: It is computed.
        """
        if len(node.input) <= index or node.input[index] not in self.constants:
            raise Unlike(f"{node.op_type} {node.name} has no constant as its input {index}")
        return self.constants[node.input[index]]


def net_of_graph(path: Path, name: str | None) -> tuple[IResNetNet | MobileFaceNetNet, State, Family]:
    """Return section and weights of the net that a graph computes, and its family.

    Args:
        name: Family that the user names, or None.

    Raises:
        UserError: The file is unreadable, its graph is no such net, or it does not say what pixels it takes.
    """
    model = read_model(path, with_data=True)
    if written_here(model):
        raise UserError(f"{path}: bigface export wrote it: give the run or the weights that it was exported from")
    opened, family = open_onnx(path, name), family_of(path, model, name)
    try:
        reader = _Reader(Graph(model))
        if plain_pixels(model):
            family = reader.normalisation()
        state = reader.read()
        section = section_of(state)
        state = to_rgb(state) if family.bgr else state
        pixels = {"input_size": opened.input_size, "input_mean": family.mean, "input_std": family.std}
        taken = section.model_dump() | pixels | {"norm_eps": reader.eps}
        taken |= {"stem_stride": reader.stem_stride} if isinstance(section, IResNetNet) else {}
        section = type(section).model_validate(taken)
        net = build_net(section).eval()
        net.load_state_dict(state)
        _compare(net, opened)
    except (Unlike, UserError, ValueError, RuntimeError) as error:
        reason = shorten(" ".join(str(error).split()), 200, placeholder=" …")
        raise UserError(
            f"{path}: its graph is no IR-ResNet or MobileFaceNet: use it as it is, or give other weights: {reason}"
        ) from None
    return section, state, family


@torch.inference_mode()
def _compare(net: Backbone, graph: OnnxNet) -> None:
    """Check that a net computes what its graph does.

    Raises:
        Unlike: Embeddings of noise differ.
    """
    noise = torch.Generator().manual_seed(0)
    images_BHWC = torch.randint(256, (IMAGES, net.input_size, net.input_size, 3), generator=noise, dtype=torch.uint8)
    ours_BD, theirs_BD = (one(normalised(images_BHWC, one)) for one in (net, graph))
    cosine = float(torch.cosine_similarity(ours_BD, theirs_BD).min())
    if not cosine >= LEAST_COSINE:
        raise Unlike(f"a net with its weights computes something else (cosine {cosine:.4f})")


class _Reader:
    """Follows a graph from its pixels to the embedding, and names its weights as bigface does."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.value, self.state = graph, graph.input, State()
        self.eps, self.stem_stride = 0.0, 1
        self.unfolded: list[str] = []  # norms that were folded

    def normalisation(self) -> Family:
        """Read what a graph does to plain pixels: a subtraction and a scale."""
        mean, std = torch.tensor(0.0), torch.tensor(1.0)
        while any(self.graph.next_is(self.value, operator) for operator in ("Sub", "Mul", "Div")):
            node = self.graph.only(self.value, "Sub", "Mul", "Div")
            constant = self.graph.constant(node, 1).float()
            if constant.unique().numel() != 1:
                raise Unlike("each colour has its own mean or scale")
            number = constant.flatten()[0]
            if node.op_type == "Sub":
                mean = mean + number * std
            else:
                std = std / number if node.op_type == "Mul" else std * number
            self.value = node.output[0]
        return Family("a net that takes plain pixels", False, float(mean), float(std))

    def read(self) -> State:
        """Read the whole net, and return its weights."""
        stem = self.graph.only(self.value, "Conv")
        self.stem_stride = _attribute(stem, "strides", [1, 1])[0]
        if len(self._after_stem(stem)) == 2:
            self._iresnet()
        else:
            self._mobilefacenet()
        self.eps = self.eps or USUAL_EPS
        for name in self.unfolded:
            self.state[f"{name}.running_var"] -= self._eps_of(name)
        return {name: tensor.float() for name, tensor in self.state.items()}

    def _eps_of(self, norm: str) -> float:
        """Return the ε that a norm has in the net."""
        return LAST_EPS if norm == "features" and "stem.conv.weight" in self.state else self.eps

    def _after_stem(self, stem: "NodeProto") -> list["NodeProto"]:
        """Return what takes the output of the stem's PReLU."""
        value = stem.output[0]
        while self.graph.next_is(value, "BatchNormalization") or self.graph.next_is(value, "PRelu"):
            value = self.graph.only(value, "BatchNormalization", "PRelu").output[0]
        return self.graph.takers.get(value, [])

    def _iresnet(self) -> None:
        self._conv("conv1", "bn1")
        self._prelu("prelu")
        stage, block = 0, 0
        while len(self.graph.takers.get(self.value, [])) == 2:
            halves = self._halves()
            stage, block = (stage + 1, 0) if halves else (stage, block + 1)
            self._block(f"layer{stage}.{block}")
        self._norm("bn2")
        self._linear()

    def _halves(self) -> bool:
        """Return whether the block that comes next begins a stage: its shortcut is no plain sum."""
        return all(node.op_type != "Add" for node in self.graph.takers[self.value])

    def _block(self, name: str) -> None:
        """Read a residual block, from its input to its sum."""
        start, takers = self.value, self.graph.takers[self.value]
        if sum(node.op_type == "BatchNormalization" for node in takers) != 1:
            raise Unlike(f"a block begins with {' and '.join(node.op_type for node in takers)}")
        first, skip = sorted(takers, key=lambda node: node.op_type != "BatchNormalization")
        ends = {start}
        if skip.op_type == "Conv":
            ends = {self._conv_of(skip, f"{name}.downsample.0", f"{name}.downsample.1")}
        elif skip.op_type in ("MaxPool", "AveragePool"):
            ends = {skip.output[0]}
        self._norm(f"{name}.bn1", first)
        inner = self._conv(f"{name}.conv1", f"{name}.bn2", optional=True)
        if not inner and name != "layer1.0" and "layer1.0.bn2.weight" in self.state:
            raise Unlike(f"block {name} has no norm between its convolutions")
        self._prelu(f"{name}.prelu")
        self._conv(f"{name}.conv2", f"{name}.bn3")
        if len(self.graph.takers.get(self.value, [])) == 2:
            self._gate(f"{name}.se")
        total = self.graph.only(self.value, "Add")
        if not ends & {self.graph.source(value) for value in total.input}:
            raise Unlike(f"block {name} does not add its shortcut")
        self.value = total.output[0]

    def _gate(self, name: str) -> None:
        """Read squeeze and excitation."""
        takers = self.graph.takers[self.value]
        mean = next((node for node in takers if node.op_type in ("GlobalAveragePool", "ReduceMean")), None)
        if mean is None:
            raise Unlike(f"after {self.value} come {' and '.join(node.op_type for node in takers)}")
        value = mean.output[0]
        for layer, activation in (("fc1", "Relu"), ("fc2", "Sigmoid")):
            conv = self.graph.only(value, "Conv")
            if len(conv.input) > 2:
                raise Unlike(f"{conv.name} has a bias")
            self.state[f"{name}.{layer}.weight"] = self.graph.constant(conv, 1)
            value = self.graph.only(conv.output[0], activation).output[0]
        self.value = self.graph.only(value, "Mul").output[0]

    def _mobilefacenet(self) -> None:
        self._part("stem")
        self._part("stem_depthwise")
        for name in _bottlenecks():
            start = self.value
            residual = any(node.op_type == "Add" for node in self.graph.takers.get(start, []))
            self._part(f"{name}.expand")
            self._part(f"{name}.depthwise")
            self._part(f"{name}.project", act=False)
            if residual:
                self.value = self.graph.only(self.value, "Add").output[0]
        self._part("expand")
        self._part("pool", act=False)
        self._linear()

    def _part(self, name: str, act: bool = True) -> None:
        """Read a convolution of a MobileFaceNet with its norm and PReLU."""
        self._conv(f"{name}.conv", f"{name}.bn")
        if act:
            self._prelu(f"{name}.prelu")

    def _conv(self, name: str, norm: str, optional: bool = False) -> bool:
        """Read the convolution that takes the current value, and the norm behind it, unfolded if it was folded."""
        takers = [node for node in self.graph.takers.get(self.value, []) if node.op_type != "Add"]
        if len(takers) != 1 or takers[0].op_type != "Conv":
            raise Unlike(f"after {self.value} comes {' and '.join(node.op_type for node in takers)}, not Conv")
        self.value = self._conv_of(takers[0], name, norm, optional)
        return f"{norm}.weight" in self.state

    def _conv_of(self, node: "NodeProto", name: str, norm: str, optional: bool = False) -> str:
        """Read a convolution and the norm behind it; return the value behind both.

        Args:
            optional: A convolution without bias may stand without a norm.
        """
        self.state[f"{name}.weight"] = weight = self.graph.constant(node, 1)
        value, bias = node.output[0], self.graph.constant(node, 2) if len(node.input) > 2 else None
        if self.graph.next_is(value, "BatchNormalization"):
            after = self.graph.only(value, "BatchNormalization")
            self._norm(norm, after)
            if bias is not None:  # the norm subtracts it again from its mean
                self.state[f"{norm}.running_mean"] = self.state[f"{norm}.running_mean"] - bias
            return after.output[0]
        if bias is not None or not optional:
            self._unfolded(norm, torch.zeros(len(weight)) if bias is None else bias)
        return value

    def _norm(self, name: str, node: "NodeProto | None" = None) -> None:
        """Read a batch norm."""
        node = node or self.graph.only(self.value, "BatchNormalization")
        fields = ("weight", "bias", "running_mean", "running_var")
        self.state |= {f"{name}.{field}": self.graph.constant(node, i) for i, field in enumerate(fields, 1)}
        eps = _attribute(node, "epsilon", 1e-5)
        self.eps = self.eps or float(f"{eps:.6g}")  # the file has it in float32
        if abs(eps - self._eps_of(name)) > 1e-9:
            self.state[f"{name}.running_var"] = self.state[f"{name}.running_var"] + (eps - self._eps_of(name))
        self.value = node.output[0]

    def _unfolded(self, name: str, shift_O: Tensor) -> None:
        """Add a norm that adds ``shift_O`` and does nothing else; its variance lacks the ε, which is known later."""
        one_O = torch.ones_like(shift_O)
        fields = {"weight": one_O, "bias": shift_O, "running_mean": 0 * one_O, "running_var": one_O.clone()}
        self.state |= {f"{name}.{field}": value for field, value in fields.items()}
        self.unfolded.append(name)

    def _prelu(self, name: str) -> None:
        node = self.graph.only(self.value, "PRelu")
        self.state[f"{name}.weight"] = self.graph.constant(node, 1).flatten()
        self.value = node.output[0]

    def _linear(self) -> None:
        """Read the last linear layer and its norm. What follows may scale the embedding, but not turn it."""
        if self.graph.next_is(self.value, "Flatten") or self.graph.next_is(self.value, "Reshape"):
            self.value = self.graph.only(self.value, "Flatten", "Reshape").output[0]
        node = self.graph.only(self.value, "Gemm", "MatMul")
        weight = self.graph.constant(node, 1)
        turned = node.op_type == "Gemm" and _attribute(node, "transB", 0)
        self.state["fc.weight"] = weight_OI = weight if turned else weight.T.contiguous()
        bias_O = torch.zeros(len(weight_OI))
        self.value = node.output[0]
        if len(node.input) > 2:
            bias_O = self.graph.constant(node, 2)
        elif node.op_type == "MatMul" and self.graph.next_is(self.value, "Add"):
            add = self.graph.only(self.value, "Add")
            bias_O = self.graph.constant(add, 1 if add.input[0] not in self.graph.constants else 0)
            self.value = add.output[0]
        self.state["fc.bias"] = bias_O
        if self.graph.next_is(self.value, "BatchNormalization"):
            self._norm("features")
        else:
            self._unfolded("features", torch.zeros(len(weight_OI)))


def _bottlenecks() -> Iterator[str]:
    """Yield the names of a MobileFaceNet's bottlenecks in order."""
    for stage, blocks in ((3, 5), (4, 7), (5, 3)):
        yield from (f"stage{stage}.{i}" for i in range(blocks))


def _is_pool_of_one_pixel(node: "NodeProto") -> bool:
    """Return whether a node is the pool 1×1 of stride 1 that AdaFace and its like have on plain shortcuts."""
    sizes = [*_attribute(node, "kernel_shape", [0]), *_attribute(node, "strides", [1])]
    return node.op_type in ("MaxPool", "AveragePool") and set(sizes) == {1}


def _attribute(node: "NodeProto", name: str, default: Any) -> Any:
    from onnx.helper import get_attribute_value

    return next((get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)
