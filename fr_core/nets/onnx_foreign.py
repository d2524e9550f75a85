"""ONNX files of other programs: what they take and give, found out before they are used.

Such a file says nothing of the pixels that it takes. Its family may be named, or the graph tells it. A graph that
begins with a subtraction and a scale takes plain pixels. insightface's files have an input of a known name, or a last
gain of 1. Other projects leave names of their modules in their files.

Legend: B batch, D embedding.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fr_core.errors import UserError
from fr_core.nets.families import FAMILIES, Family, ask
from fr_core.nets.onnx_net import Ends, Facts

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto
    from onnxruntime import InferenceSession

USUAL_SIZE = 112  # pixels, where a file leaves the size open
INSIGHTFACE_INPUTS = ("input.1", "data")  # names in insightface's model zoo and of its torch2onnx.py
# Parts of tensors' names that the projects' own modules leave in their exports, and whose these are.
MARKS = {
    "layer1.0.bn1.": ("insightface", "magface"),
    "body.0.res_layer.": ("adaface", "tface", "curricularface", "treb1en", "facexzoo"),
    "conv_23.": ("tface", "treb1en", "facexzoo"),
}


def facts_and_ends(
    path: Path, model: "ModelProto", session: "InferenceSession", name: str | None
) -> tuple[Facts, Ends]:
    """Return what a file takes and gives, after a trial.

    Args:
        name: Family that the user names, or None.

    Raises:
        UserError: The file does not map images to embeddings, or does not say what pixels it takes.
    """
    family = family_of(path, model, name)
    inputs = session.get_inputs()
    shape = inputs[0].shape if inputs else []
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(shape) != 4 or shape[1] != 3:
        taken = ", ".join(f"{end.name} {end.type} {end.shape}" for end in inputs)
        raise UserError(f"{path}: takes {taken}, not images [B, 3, H, W] in float32: give another file")
    sides = {side if isinstance(side, int) else USUAL_SIZE for side in shape[2:]}
    if len(sides) > 1:
        raise UserError(f"{path}: takes images of {shape[2]} × {shape[3]} pixels, not square ones: give another file")
    (size,) = sides
    batches = [shape[0]] if isinstance(shape[0], int) and shape[0] > 0 else [2, 1]
    for batch in batches:
        trial = np.zeros((batch, 3, size, size), np.float32)
        try:
            outputs = session.run(None, {inputs[0].name: trial})
        except Exception as error:  # ONNX Runtime's errors share no other base class
            reason = str(error).strip().partition("\n")[0]
            continue
        for end, out in zip(session.get_outputs(), outputs, strict=True):
            if out.dtype == np.float32 and out.ndim and len(out) == batch and out.size > batch:
                sizes = {"input_size": size, "input_mean": family.mean, "input_std": family.std}
                facts = Facts.model_validate(sizes | {"embedding": out.size // batch})
                free = batch == 2 and len(batches) == 2
                taken_for = f"{family.title}: {family.input}"
                return facts, Ends(inputs[0].name, end.name, None if free else batch, family.bgr, taken_for)
        reason = f"its outputs are of shapes {[list(out.shape) for out in outputs]}"
    raise UserError(f"{path}: does not map an image to an embedding: {reason}")


def family_of(path: Path, model: "ModelProto", name: str | None) -> Family:
    """Return the family of a file: the one that is named, or what the graph tells.

    Raises:
        UserError: Neither tells.
    """
    if name:
        return FAMILIES[name]
    if plain_pixels(model):
        return Family("a net that takes plain pixels", bgr=False, mean=0, std=1)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    families = next((who for mark, who in MARKS.items() if any(mark in name for name in constants)), tuple(FAMILIES))
    if "insightface" in families and _of_insightface(model, constants):
        return FAMILIES["insightface"]
    raise UserError(f"{path}: does not say what pixels it takes: {ask(different(families))}")


def different(families: Iterable[str]) -> list[str]:
    """Return the first of the families for each kind of pixels that they take."""
    first: dict[str, str] = {}
    for name in families:
        first.setdefault(FAMILIES[name].input, name)
    return list(first.values())


def _of_insightface(model: "ModelProto", constants: "Mapping[str, TensorProto]") -> bool:
    """Return whether a graph has the input of insightface's files, or the last gain of 1 that its nets have."""
    from onnx import numpy_helper

    if gain := constants.get("features.weight"):
        return bool((numpy_helper.to_array(gain) == 1).all())
    inputs = [end.name for end in model.graph.input if end.name not in constants]
    return bool(inputs) and inputs[0] in INSIGHTFACE_INPUTS


def plain_pixels(model: "ModelProto") -> bool:
    """Return whether a graph normalises pixels itself, as insightface's files from MXNet do."""
    found: list[NodeProto] = []
    taken = {end.name for end in model.graph.input}
    while len(found) < 3:
        node = next((node for node in model.graph.node if taken & set(node.input) and node not in found), None)
        if node is None or node.op_type not in ("Sub", "Mul", "Div", "Identity", "Cast"):
            break
        found.append(node)
        taken = set(node.output)
    operators = {node.op_type for node in found}
    return "Sub" in operators and bool(operators & {"Mul", "Div"})
