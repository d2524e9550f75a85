"""Weights of other projects: how each names the tensors of its nets, and what pixels its nets take.

docs/weights.md shows the families. A naming is recognised by one tensor that all its nets have, wherever it lies in a
file. What stands before that tensor's name, such as ``state_dict.model.``, is the wrapping. What lies beside the net,
such as a class matrix, is left out.

Every net here takes RGB. The first convolution of a net that takes BGR is turned round once, which is exact.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fr_core.errors import UserError
from fr_core.nets.mobilefacenet import LAST_EPS, from_mxnet
from fr_core.nets.strangers import stranger

State = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """What the nets of a project take: x = (pixel − mean) / std, and the ε of their batch norms."""

    title: str
    bgr: bool
    mean: float = 127.5
    std: float = 127.5
    eps: float = 1e-5

    @property
    def input(self) -> str:
        """Return in words what pixels the nets take."""
        pixel = "pixel" if self.mean == 0 else f"(pixel - {self.mean:g})"
        return f"{'BGR' if self.bgr else 'RGB'}, {pixel} / {self.std:g}"


# The names are those that --net takes. Each line was read off the project's own code.
FAMILIES = {
    "insightface": Family("insightface", bgr=False),
    "magface": Family("MagFace", bgr=True, mean=0, std=255, eps=2e-5),
    "adaface": Family("AdaFace", bgr=True),
    "cvlface": Family("CVLface", bgr=False),
    "tface": Family("TFace", bgr=False),
    "evolve": Family("face.evoLVe", bgr=False),
    "treb1en": Family("TreB1eN's InsightFace_Pytorch", bgr=True),
    "facexzoo": Family("FaceX-Zoo", bgr=True, std=128),
    "curricularface": Family("CurricularFace", bgr=False),
    "y1": Family("MobileFaceNet y1", bgr=False, std=128, eps=1e-3),
}
# Families whose nets have the same tensors.
KIN = (
    {"insightface", "magface"},
    {"adaface", "cvlface", "tface"},
    {"evolve", "treb1en", "facexzoo", "curricularface"},
    {"treb1en", "facexzoo", "evolve", "tface"},
)
# First names of heads and class matrices, which may lie beside a net that nothing wraps.
HEADS = re.compile(
    r"(\w*head\w*|\w*classifier|weight|kernel|margin|loss\w*|criterion|metric\w*|product|\w*softmax\w*|arc\w*)\b"
)


@dataclass(frozen=True)
class Found:
    """A net that was found in a file: its tensors under bigface's names, still in its own channel order."""

    state: State
    families: tuple[str, ...]  # whose it may be; none: bigface's own


def find_net(tensors: Mapping[str, Tensor]) -> Found:
    """Find the net among the tensors of a file.

    Raises:
        UserError: There is no net, more than one, or one that bigface does not know. The message lacks the file.
    """
    for naming in NAMINGS:
        found = {name.removesuffix(naming.anchor) for name in tensors if name.endswith(naming.anchor)}
        wraps = sorted(wrap for wrap in found if not wrap or wrap.endswith("."))
        plain = [wrap for wrap in wraps if not re.search(r"(^|[._])ema([._]|$)", wrap)] or wraps
        if len(plain) > 1:
            raise UserError(f"holds several nets, {', '.join(plain)}: save the state_dict of one of them")
        if plain:
            return _named(naming, plain[0], tensors)
    what = stranger(tensors)
    example = next(iter(tensors), None)
    if what is None:
        what = f"a net that bigface does not know, with tensors such as {example}" if example else "no tensors"
    raise UserError(f"holds {what}: give weights of an IR-ResNet or a MobileFaceNet")


def to_rgb(state: State) -> State:
    """Return the weights of a net that took BGR, for RGB."""
    first = next(name for name in ("conv1.weight", "stem.conv.weight") if name in state)
    return state | {first: state[first].flip(1)}


def ask(families: Iterable[str]) -> str:
    """Return the question which family weights are of, with the option that answers it."""
    options = [f"--net {name} ({FAMILIES[name].title}: {FAMILIES[name].input})" for name in families]
    return f"give {', '.join(options[:-1])} or {options[-1]}" if len(options) > 1 else f"give {options[0]}"


def _named(naming: "Naming", wrap: str, tensors: Mapping[str, Tensor]) -> Found:
    """Return the net of a naming, which lies under ``wrap``."""
    inside = {name.removeprefix(wrap): tensor for name, tensor in tensors.items() if name.startswith(wrap)}
    state, left = naming.rename(inside)
    if strange := next((name for name in left if not HEADS.match(name)), None):
        raise UserError(f"holds a net like those of {naming.title}, but with other parts, such as {strange}")
    return Found(state, naming.families(wrap, tensors, state))


@dataclass(frozen=True)
class Naming:
    """One way to name a net's tensors.

    Args:
        title: Whose it is.
        anchor: Tensor that every net of the naming has, and no other net.
        rename: Function that returns the tensors under bigface's names, and the names that it has no place for.
        families: Function that returns whose the net may be. It takes the wrapping, the file's tensors and the net's.
    """

    title: str
    anchor: str
    rename: Callable[[State], tuple[State, list[str]]]
    families: Callable[[str, Mapping[str, Tensor], State], tuple[str, ...]]


def _renamed(tensors: State, rules: Iterable[tuple[str, str]]) -> tuple[State, list[str]]:
    """Rename tensors by the first rule whose beginning theirs has."""
    state, left = State(), []
    rules = list(rules)
    for name, tensor in tensors.items():
        rule = next((rule for rule in rules if name.startswith(f"{rule[0]}.")), None)
        if rule is None:
            left.append(name)
        else:
            state[rule[1] + name.removeprefix(rule[0])] = tensor
    return state, left


def _with_whole_norm(state: State) -> State:
    """Add gain and shift of the last norm, which some nets do not have."""
    mean_D = state.get("features.running_mean")
    if mean_D is None:
        return state
    return {"features.weight": torch.ones_like(mean_D), "features.bias": torch.zeros_like(mean_D)} | state


def _ours(modules: str) -> Callable[[State], tuple[State, list[str]]]:
    """Return the renaming of nets that have bigface's names; ``modules`` are the first names of their tensors."""
    return lambda tensors: _renamed(tensors, [(module, module) for module in modules.split()])


def _ir(tensors: State) -> tuple[State, list[str]]:
    """Rename the IR nets: ``input_layer``, ``body.N`` with ``res_layer`` and ``shortcut_layer``, ``output_layer``."""
    if (first := tensors.get("body.0.res_layer.1.weight")) is not None and first.shape[-1] == 1:
        raise UserError("holds an IR net of bottleneck blocks, such as AdaFace's IR-152 and IR-200: give another")
    inner = "body.0.res_layer.2.running_mean" in tensors
    parts = ["bn1", "conv1", *(["bn2"] if inner else []), "prelu", "conv2", "bn3", "se"]
    inside = [(f"res_layer.{i}", part) for i, part in enumerate(parts)]
    inside += [("res_layer.se_block", "se"), ("shortcut_layer", "downsample")]
    blocks = sorted({int(name.split(".")[1]) for name in tensors if re.match(r"body\.\d+\.", name)})
    starts = [i for i in blocks if i == 0 or f"body.{i}.shortcut_layer.0.weight" in tensors]
    if len(starts) != 4:
        raise UserError(f"holds an IR net whose blocks form {len(starts)} stages, not four: give whole weights")
    rules = [("input_layer.0", "conv1"), ("input_layer.1", "bn1"), ("input_layer.2", "prelu")]
    rules += [("output_layer.0", "bn2"), ("output_layer.3", "fc"), ("output_layer.4", "features")]
    for block in blocks:
        stage = sum(block >= start for start in starts)
        ours = f"layer{stage}.{block - starts[stage - 1]}"
        rules += [(f"body.{block}.{theirs}", f"{ours}.{part}") for theirs, part in inside]
    state, left = _renamed(tensors, rules)
    return _with_whole_norm(state), left


def _mobile(tensors: State) -> tuple[State, list[str]]:
    """Rename TreB1eN's MobileFaceNet and its copies: ``conv1``, ``conv_23``, ``conv_3.model.N`` and so on."""
    tensors = {name.removeprefix("output_layer."): tensor for name, tensor in tensors.items()}
    blocks = {"conv_23": "stage3.0", "conv_34": "stage4.0", "conv_45": "stage5.0"}
    blocks |= {f"conv_{stage}.model.{i}": f"stage{stage}.{i + 1}" for stage in (3, 4, 5) for i in range(6)}
    parts = {"conv": "expand", "conv_dw": "depthwise", "project": "project"}
    rules = [("conv1", "stem"), ("conv2_dw", "stem_depthwise"), ("conv_6_sep", "expand"), ("conv_6_dw", "pool")]
    rules += [(f"{block}.{part}", f"{ours}.{name}") for block, ours in blocks.items() for part, name in parts.items()]
    state, left = _renamed(tensors, [*rules, ("linear", "fc"), ("bn", "features")])
    state = _with_whole_norm(state)
    if "fc.weight" in state and "fc.bias" not in state:
        state["fc.bias"] = torch.zeros_like(state["fc.weight"][:, 0])
    if "features.running_var" in state:  # the last norm's ε is another one here
        state["features.running_var"] = state["features.running_var"] + (FAMILIES["treb1en"].eps - LAST_EPS)
    return state, left


def _mxnet(tensors: State) -> tuple[State, list[str]]:
    try:
        return from_mxnet(tensors), []
    except KeyError as error:
        raise UserError(f"holds a MobileFaceNet with MXNet's names, but also {error}") from None


def _iresnet_families(wrap: str, _: Mapping[str, Tensor], state: State) -> tuple[str, ...]:
    """MagFace trains the gain of the last norm, insightface fixes it at 1."""
    if wrap.endswith(("features.module.", "module.features.")):
        return ("magface",)
    gain_D = state.get("features.weight")
    return ("insightface", "magface") if gain_D is None or (gain_D != 1).any() else ("insightface",)


def _ir_families(wrap: str, tensors: Mapping[str, Tensor], state: State) -> tuple[str, ...]:
    """Tell the IR nets apart by the norm inside a block, by the last norm, and by what their trainers wrap them in."""
    if "layer1.0.bn2.weight" in state:
        if wrap.endswith("model."):  # AdaFace's Lightning module
            return ("adaface",)
        return ("adaface", "cvlface") if wrap.endswith("net.") else ("adaface", "cvlface", "tface")
    affine = any(name.endswith("output_layer.4.weight") for name in tensors)
    return _treb1en_families(wrap, tensors, state) if affine else ("curricularface",)


def _treb1en_families(wrap: str, tensors: Mapping[str, Tensor], _: State) -> tuple[str, ...]:
    """FaceX-Zoo saves ``backbone`` and ``head`` together."""
    beside = f"{wrap.removesuffix('backbone.')}head."
    if wrap.endswith("backbone.") and any(name.startswith(beside) for name in tensors):
        return ("facexzoo",)
    return ("evolve", "treb1en", "facexzoo")


def _mobile_families(wrap: str, tensors: Mapping[str, Tensor], state: State) -> tuple[str, ...]:
    if f"{wrap}output_layer.linear.weight" in tensors:
        return ("tface",)
    return _treb1en_families(wrap, tensors, state)


IRESNET = "conv1 bn1 prelu layer1 layer2 layer3 layer4 bn2 fc features"
MOBILEFACENET = "stem stem_depthwise stage3 stage4 stage5 expand pool fc features"
NAMINGS = (
    Naming("insightface", "layer1.0.prelu.weight", _ours(IRESNET), _iresnet_families),
    Naming("AdaFace, CVLface, TFace and face.evoLVe", "input_layer.0.weight", _ir, _ir_families),
    Naming("TreB1eN and FaceX-Zoo", "conv2_dw.conv.weight", _mobile, _mobile_families),
    Naming("bigface", "stem_depthwise.conv.weight", _ours(MOBILEFACENET), lambda *_: ()),
    Naming("MobileFaceNet y1", "conv_1_conv2d_weight", _mxnet, lambda *_: ("y1",)),
)
