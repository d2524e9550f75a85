"""Weights without a checkpoint: a file of tensors of bigface or of another project, or an ONNX file.

A file gives a section and the tensors of that section's net. The section is in the file's metadata, or it is read off
the tensors (:mod:`fr_core.nets.sections`).
"""

from dataclasses import dataclass

import torch
from pydantic import TypeAdapter, ValidationError

from fr_core.config.nets import Net
from fr_core.data.store import AnyPath, local_copy
from fr_core.errors import UserError
from fr_core.nets.build import build_net
from fr_core.nets.factory import refuse_code
from fr_core.nets.families import FAMILIES, KIN, Family, State, ask, find_net, to_rgb
from fr_core.nets.names import article, config_name, parse_name, refuse_other_net
from fr_core.nets.onnx_graph import net_of_graph
from fr_core.nets.sections import section_of
from fr_core.nets.tensor_files import read_tensor_file

COUNTERS = "num_batches_tracked"  # older files have none


@dataclass(frozen=True)
class Weights:
    """A net that a file holds."""

    net: Net
    state: State
    family: Family | None = None  # whose it is; None: bigface's own


def read_weights(
    path: AnyPath, net: str | None = None, section: Net | None = None, trust_code: bool = False
) -> Weights:
    """Read the net of a file.

    Args:
        path: ``.safetensors``, ``.pth``, ``.pt``, ``.ckpt``, ``.bin`` or ``.onnx``.
        net: Name of the net or of its family, where the file does not tell.
        section: Section of the net, if the file is a checkpoint's.
        trust_code: Run the code that the file names, if its net is of people's own code.

    Raises:
        UserError: The file is unreadable or damaged, or would have to run code. Its net is another one than ``net``
            says, or one that bigface does not know. Its numbers are not finite, or it does not tell its family.
    """
    name = net and parse_name(net)
    try:
        weights = _of_graph(path, name) if path.name.endswith(".onnx") else _of_tensors(path, name, section)
        refuse_code(path, weights.net, trust_code)
        _check(weights)
    except _Misfit as error:
        raise UserError(f"{path} {error}") from None
    if weights.family is None or name not in FAMILIES:
        refuse_other_net(path, name, config_name(weights.net))
    return weights


class _Misfit(UserError):
    """What is wrong with a file, without the file's name."""


def _of_tensors(path: AnyPath, name: str | None, section: Net | None) -> Weights:
    """Return the net of a file of tensors."""
    file = read_tensor_file(path)
    if section or file.net:
        try:
            return Weights(section or TypeAdapter(Net).validate_json(file.net or ""), file.tensors)
        except ValidationError:
            raise _Misfit("has metadata that are not those of a net: give another file") from None
    try:
        found = find_net(file.tensors)
        net = section_of(found.state)
        if not found.families:
            return Weights(net, found.state)
        family = FAMILIES[_family(found.families, name)]
    except UserError as error:
        raise _Misfit(str(error)) from None
    state = to_rgb(found.state) if family.bgr else found.state
    taken = {"input_mean": family.mean, "input_std": family.std, "norm_eps": family.eps}
    return Weights(net.model_copy(update=taken), state, family)


def _of_graph(path: AnyPath, name: str | None) -> Weights:
    """Return the trainable net of an ONNX graph."""
    with local_copy(path) as local:
        section, state, family = net_of_graph(local, name if name in FAMILIES else None)
    return Weights(section, state, family)


def _family(families: tuple[str, ...], name: str | None) -> str:
    """Return the one family that weights are of, or that the user names.

    Raises:
        UserError: The weights may be of several families, or not of the named one. The message lacks the file.
    """
    if name in FAMILIES:
        if not any({name, families[0]} <= kin for kin in KIN) and (name,) != families:
            raise UserError(f"does not hold a net of {FAMILIES[name].title}: {ask(families)}, or leave --net out")
        return name
    if len(families) > 1:
        raise UserError(f"does not say what pixels its net takes, and projects with its names differ: {ask(families)}")
    return families[0]


def _check(weights: Weights) -> None:
    """Check that weights are those of their net, and finite.

    Raises:
        _Misfit: They are not.
    """
    with torch.device("meta"):
        wanted = build_net(weights.net).state_dict()
    name = article(config_name(weights.net))
    for tensor_name, tensor in wanted.items():
        found = weights.state.get(tensor_name)
        if found is None:
            if not tensor_name.endswith(COUNTERS):
                raise _Misfit(f"holds {name}, but not its tensor {tensor_name}: give a whole file")
        elif found.shape != tensor.shape:
            shapes = f"{tensor_name} of shape {list(found.shape)}, not {list(tensor.shape)}"
            raise _Misfit(f"holds {name}, but its tensor {shapes}: give another file")
        elif tensor.is_floating_point() and not found.is_floating_point():
            raise _Misfit(f"holds whole numbers in {tensor_name}: give the float net, before it was quantised")
        elif not found.isfinite().all():
            raise _Misfit(f"holds numbers that are not finite, in {tensor_name}: give another file")
    if strange := set(weights.state) - set(wanted):
        raise _Misfit(f"holds {name}, but also the tensor {min(strange)}: give another file")
