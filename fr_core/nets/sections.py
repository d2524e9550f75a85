"""Reads the section of a net off its weights: kind, depth, form of the blocks, widths, embedding and input size."""

import math
import re
from collections.abc import Mapping

from pydantic import ValidationError
from torch import Tensor

from fr_core.config.nets import MOBILEFACENET, IResNetNet, MobileFaceNetNet
from fr_core.errors import UserError
from fr_core.nets.iresnet import BLOCKS, STAGE_STRIDES
from fr_core.nets.mobilefacenet import LAYERS, STRIDES
from fr_core.nets.names import article, weights_name


def section_of(state: Mapping[str, Tensor]) -> IResNetNet | MobileFaceNetNet:
    """Return the section of the net that some tensors belong to. They do not tell what pixels it takes.

    Raises:
        UserError: They belong to no net that a section can describe. The message lacks the file.
    """
    name = weights_name(state)
    try:
        if name == "mobilefacenet":
            return _mobilefacenet(state)
        found = re.fullmatch(r"iresnet(\d+)", name or "")
        if found:
            return _iresnet(int(found[1]), state)
    except (KeyError, IndexError, ValueError) as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else f"{error}"
        raise UserError(f"holds {article(name or 'net')} whose tensors do not fit together: {said}") from None
    mend = "open its run or checkpoint instead" if name else "give weights of an IR-ResNet or a MobileFaceNet"
    if name and name.startswith("IR-ResNet"):
        mend = f"give weights of depth {', '.join(map(str, BLOCKS))}"
    raise UserError(f"holds {article(name or 'net that bigface does not know')}: {mend}")


def _mobilefacenet(state: Mapping[str, Tensor]) -> MobileFaceNetNet:
    kernel = tuple(state["pool.conv.weight"].shape[2:])
    if kernel[0] != kernel[1]:
        raise ValueError(f"the input is not square: its last map has {kernel[0]} × {kernel[1]} pixels")
    sizes = {"input_size": STRIDES * kernel[0], "embedding": len(state["fc.weight"])}
    widths = tuple(len(state[f"{layer}.weight"]) for layer in LAYERS)
    return MobileFaceNetNet.model_validate(sizes | {"widths": None if widths == MOBILEFACENET else widths})


def _iresnet(depth: int, state: Mapping[str, Tensor]) -> IResNetNet:
    widths = [len(state[f"layer{stage}.0.conv1.weight"]) for stage in (1, 2, 3, 4)]
    inputs = state["fc.weight"].shape[1]
    side = math.isqrt(inputs // widths[-1])
    if side**2 * widths[-1] != inputs:
        raise ValueError(f"the input is not square: fc.weight has {inputs} inputs of {widths[-1]} channels")
    doubled = widths == [widths[0] << stage for stage in range(4)]
    sizes = {"depth": depth, "input_size": STAGE_STRIDES * side, "embedding": len(state["fc.weight"])}
    channels: dict[str, object] = {"width": widths[0]} if doubled else {"widths": widths}
    form = {
        "se": "layer1.0.se.fc1.weight" in state,
        "inner_norm": "layer1.0.bn2.weight" in state,
        "shortcut": "conv" if "layer1.0.downsample.0.weight" in state else "pool",
    }
    return IResNetNet.model_validate(sizes | channels | form)
