"""Fine-tuning: weights that stay as they were, and layers that learn more slowly the deeper they lie.

Legend: N blocks of a net.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import Tensor, nn

from fr_core.errors import UserError
from fr_core.nets.backbone import Backbone


def freeze(net: Backbone, patterns: Sequence[str]) -> frozenset[str]:
    """Take the gradient from a net's parameters whose names match a pattern.

    A module without a trained parameter must run in eval mode from then on (:func:`set_mode`), or its batch norms
    would follow the images.

    Args:
        patterns: as the shell's, of a whole name: ``layer1.*``. A star also stands for dots.

    Returns:
        The names of the modules that are frozen as a whole.

    Raises:
        UserError: a pattern matches no parameter, or all parameters are frozen.
    """
    params = dict(net.named_parameters())
    for pattern in patterns:
        if not (found := [name for name in params if fnmatchcase(name, pattern)]):
            raise UserError(_no_match(net, pattern))
        for name in found:
            params[name].requires_grad_(False)
    if patterns and not any(param.requires_grad for param in params.values()):
        raise UserError(
            "finetune.freeze leaves no weight of the backbone to train: to train the class matrix alone, leave it out "
            "and give finetune.head_epochs=EPOCHS, as many as train.epochs"
        )
    return frozenset(name for name, module in net.named_modules() if _is_frozen(name, module, patterns))


def set_mode(net: nn.Module, training: bool, frozen: Iterable[str]) -> None:
    """Put a net in training mode or in eval mode, and its frozen modules in eval mode."""
    net.train(training)
    for name in frozen:
        net.get_submodule(name).eval()


def layer_rates(net: Backbone, decay: float) -> dict[Tensor, float]:
    """Return the share of the learning rate of each parameter: decay^(N + 1 − l) in layer l.

    Layer 0 is what comes before the first block, layer l the block l, and layer N + 1 what follows the last block. What
    lies between two blocks belongs to the first of them. The form is that of BEiT (Bao et al., 2022), MAE and timm.

    Returns:
        Nothing for a decay of 1, which leaves all rates equal.

    Raises:
        UserError: the net names no blocks.
    """
    if decay == 1:
        return {}
    blocks, params = net.blocks(), list(net.parameters())
    if not blocks:
        raise UserError("finetune.layer_decay counts the blocks of a net, and this net names none: leave it out")
    block_of = {param: block for block, module in enumerate(blocks, 1) for param in module.parameters()}
    last = max(i for i, param in enumerate(params) if param in block_of)
    rates: dict[Tensor, float] = {}
    layer = 0
    for i, param in enumerate(params):  # in the order of the layers
        layer = block_of.get(param, layer) if i <= last else len(blocks) + 1
        rates[param] = decay ** (len(blocks) + 1 - layer)
    return rates


def _is_frozen(name: str, module: nn.Module, patterns: Sequence[str]) -> bool:
    """Return whether nothing of a module is trained because of a pattern: a gain may be fixed without one."""
    tensors = [*module.named_parameters(name), *module.named_buffers(name)]
    trained = any(tensor.requires_grad for _, tensor in tensors)
    return not trained and any(fnmatchcase(tensor, pattern) for tensor, _ in tensors for pattern in patterns)


def _no_match(net: nn.Module, pattern: str) -> str:
    """Return what to say of a pattern that matches nothing."""
    parts = [name for name, part in net.named_children() if any(True for _ in part.parameters())]
    modules = [f"{name}.*" for name, part in net.named_modules() if name and any(True for _ in part.parameters())]
    near = get_close_matches(pattern, [*modules, *(name for name, _ in net.named_parameters())], 1, cutoff=0.5)
    mend = f"did you mean {near[0]}?" if near else f"give a pattern such as {parts[0]}.*"
    return f"finetune.freeze: no weight of this net has a name like {pattern}: {mend} Its parts: {', '.join(parts)}"
