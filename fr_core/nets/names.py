"""Names of nets: the ones that ``--net`` takes, and the one that a config, weights or a file stand for.

``--net`` also takes the name of a family of weights (:data:`fr_core.nets.families.FAMILIES`).
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from fr_core.config.nets import FactoryNet, IResNetNet, MoENet, Net, QuantisedNet
from fr_core.errors import UserError
from fr_core.nets.families import FAMILIES
from fr_core.nets.iresnet import BLOCKS

NAMES = ("mobilefacenet", "vit", *(f"iresnet{depth}" for depth in BLOCKS))
OTHER_WORDS = {"arcface": "insightface", "cosface": "insightface", "buffalo": "insightface", "evolve": "evolve"}
DEPTHS = {blocks: depth for depth, blocks in BLOCKS.items()}
IRESNET = {"conv1.weight", "prelu.weight", "fc.weight"}  # a plain ResNet has no PReLU
MOBILEFACENET = {"stem_depthwise.conv.weight", "pool.conv.weight", "fc.weight"}
VIT = {"positions", "patches.weight", "reduce.weight"}
QUANTISED = "layers.1.layer.weight"


def parse_name(net: str) -> str:
    """Return the name of a net or of a family that ``--net`` gives, in lower case.

    Raises:
        UserError: No net and no family has this name; the message suggests the nearest one.
    """
    name = net.lower()
    if name in NAMES or name in FAMILIES:
        return name
    near = _nearest(name)
    depths = ", ".join(str(depth) for depth in BLOCKS)
    families = ", ".join(FAMILIES)
    hint = f"did you mean {near}?" if near else f"give {families}, mobilefacenet, or iresnetDEPTH with {depths}"
    raise UserError(f"--net {net}: no net has this name; {hint}")


@contextmanager
def option_named(option: str) -> Iterator[None]:
    """Let errors in the block name another option, such as ``init.net=``, where they name ``--net``."""
    try:
        yield
    except UserError as error:
        raise type(error)(str(error).replace("--net ", option)) from None


def config_name(config: Net) -> str:
    """Return the name of the net that a section describes. A quantised net is named after its float net."""
    match config:
        case IResNetNet():
            return f"iresnet{config.depth}"
        case MoENet():
            return f"mixture of experts on iresnet{config.depth}"
        case FactoryNet():
            return config.call
        case QuantisedNet():
            return config_name(config.net)
        case _:
            return config.kind


def weights_name(tensors: Iterable[str]) -> str | None:
    """Return the name of the net that some tensors belong to, or None if they belong to no net here.

    Args:
        tensors: Names of a state dict. They tell the kind of a net and its number of blocks.
    """
    names = set(tensors)
    if QUANTISED in names:
        return "quantised net"
    if names >= MOBILEFACENET:
        return "mobilefacenet"
    if names >= VIT:
        return "vit"
    if not names >= IRESNET:
        return None
    mixture = any(name.startswith("layer4.experts.") for name in names)
    stages = ("layer1", "layer2", "layer3", "layer4.experts.0" if mixture else "layer4")
    blocks = tuple(_count_blocks(names, stage) for stage in stages)
    if blocks not in DEPTHS:
        return f"IR-ResNet of {' + '.join(map(str, blocks))} blocks"
    return f"mixture of experts on iresnet{DEPTHS[blocks]}" if mixture else f"iresnet{DEPTHS[blocks]}"


def refuse_other_net(source: object, net: str | None, actual: str | None) -> None:
    """Refuse a ``--net`` that contradicts a source that names its net itself.

    Args:
        source: Run, checkpoint or file, for the message.
        net: Value of ``--net``, if the user gave one.
        actual: Name of the net that the source holds; None if the source does not say.

    Raises:
        UserError: No net has the name ``net``, or the source holds another one.
    """
    if net is None:
        return
    name = parse_name(net)
    if name in FAMILIES:
        raise UserError(f"{source} says itself what pixels its net takes: leave --net out")
    if actual is not None and name != actual:
        raise UserError(f"{source} holds {article(actual)}, not {article(name)}: leave --net out")


def article(name: str) -> str:
    """Return a name with its indefinite article."""
    return f"an {name}" if name[0] in "aeioAEIO" else f"a {name}"


def _count_blocks(names: set[str], stage: str) -> int:
    """Count the residual blocks that a stage has weights of."""
    block = re.compile(rf"{re.escape(stage)}\.(\d+)\.")
    return len({found[1] for name in names if (found := block.match(name))})


def _nearest(name: str) -> str | None:
    """Return the net that a wrong name most likely means: ``r50`` and ``resnet50`` mean iresnet50."""
    if family := next((meant for word, meant in OTHER_WORDS.items() if word in name), None):
        return family
    if "mobile" in name:
        return "mobilefacenet"
    numbers = [int(digits) for digits in re.findall(r"\d+", name)]
    if not numbers or "r" not in name:
        return None
    depths = [number for number in numbers if number in BLOCKS]
    depth = depths[-1] if depths else min(BLOCKS, key=lambda depth: abs(depth - numbers[-1]))
    return f"iresnet{depth}"
