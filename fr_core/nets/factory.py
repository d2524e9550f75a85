"""People's own nets: a function of their code makes the net (docs/extending.md, "A net of your own code").

Naming the function in a config is the leave to run it. A checkpoint, a run or a file names one too, and is refused
before anything is imported, unless the caller trusts it.

Legend: B batch, H W pixels, D embedding.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode, unset_fake_temporarily

from fr_core.config.nets import FactoryNet, Net
from fr_core.errors import UserError
from fr_core.nets.backbone import Backbone


class UntrustedCode(UserError):
    """A net whose code the caller does not trust."""


def refuse_code(source: object, config: Net, trust_code: bool) -> None:
    """Refuse a net of people's own code that a checkpoint or a file names, before anything of it is imported.

    Args:
        source: Run, checkpoint or file, for the message.
        config: Section of the net that it holds.
        trust_code: The caller trusts that code.

    Raises:
        UntrustedCode: The net is made by code that the caller does not trust.
    """
    if isinstance(config, FactoryNet) and not trust_code:
        raise UntrustedCode(
            f"{source} holds a net that the code {config.call} makes: if you trust it, give --trust-code "
            f"(trust_code=True in Python, train.trust_code=true in a recipe)"
        )


class OwnNet(Backbone):
    """A net of people's own code.

    Its attribute ``blocks``, if there is one, is a container of its blocks, or a method that returns them. Its
    attribute ``last_norm`` is the batch norm that the embeddings come out of.

    Args:
        net: Module from normalised pixels float32 [B, 3, H, W] to embeddings [B, D].
        config: Section of the net.
    """

    def __init__(self, net: nn.Module, config: FactoryNet) -> None:
        super().__init__()
        self.input_size, self.embedding, self.call = config.input_size, config.embedding, config.call
        self.net = net

    def blocks(self) -> Sequence[nn.Module]:
        """Return the blocks that the net says that it repeats."""
        blocks = getattr(self.net, "blocks", [])
        return list(blocks if isinstance(blocks, nn.Sequential | nn.ModuleList | list) else blocks())

    @property
    def last_norm(self) -> nn.Module | None:
        """Return the batch norm that the net names as its last one."""
        return getattr(self.net, "last_norm", None)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map normalised pixels [B, 3, H, W] to embeddings float32 [B, D], not L2-normalised.

        Raises:
            UserError: The net returns something else than [B, D].
        """
        out = self.net(x_BCHW)
        if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[1] != self.embedding:
            found = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            given = f"images {list(x_BCHW.shape)}"
            raise UserError(f"{self.call} maps {given} to {found}: return [B, D] with D = net.embedding")
        return out.float()


def own_net(config: FactoryNet) -> OwnNet:
    """Call the function of a section. The net is made on the CPU, also where others are made without memory.

    Raises:
        UserError: There is no such function, the arguments do not fit it, or it returns no module.
    """
    function = _function(config.call)
    try:
        inspect.signature(function).bind(**config.arguments)
    except TypeError as error:
        raise UserError(f"net.arguments do not fit {config.call}: {error}") from None
    except ValueError:  # a function of C, which does not tell its arguments
        pass
    with unset_fake_temporarily() as fake, torch.device("cpu"):
        net = function(**config.arguments)
        if not isinstance(net, nn.Module):
            raise UserError(f"net.call: {config.call} returns {type(net).__name__}: return a torch.nn.Module")
        if isinstance(fake, FakeTensorMode):
            with FakeCopyMode(fake):
                net = copy.deepcopy(net)
    return OwnNet(net, config)


def _function(call: str) -> Callable[..., object]:
    """Import the function that ``package.module:function`` names.

    Raises:
        UserError: The module cannot be imported, or has no such function.
    """
    module, _, name = call.partition(":")
    try:
        found = getattr(import_module(module), name, None)
    except ImportError as error:
        raise UserError(f"net.call = {call}: {error}: install it, or put its folder into PYTHONPATH") from None
    if not callable(found):
        raise UserError(f"net.call = {call}: {module} has no function {name}: give package.module:function")
    return found
