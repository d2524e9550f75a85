"""The precision of a run's backbone, and of the products with class matrices and class centres."""

import torch

from fr_core.config import Config
from fr_core.config.methods import FixedCentres
from fr_core.device import multiplies_bfloat16
from fr_core.heads.streamed import Softmax


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """Return the autocast context in which the backbone computes."""
    precision = autocast_precision(config, device)
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def autocast_precision(config: Config, device: torch.device) -> torch.dtype:
    """Return the backbone's precision. ``auto`` is bfloat16 if the processor multiplies it natively.

    Otherwise ``auto`` is float16 on a card, and float32 on a CPU. A CPU without such instructions emulates bfloat16:
    IR-10 at width 16 and 64×64 trained 17 images/s instead of 160.
    """
    if config.train.precision != "auto":
        return getattr(torch, config.train.precision)
    if multiplies_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def scales_loss(config: Config, device: torch.device) -> bool:
    """Tell whether the loss is multiplied by a scale, so that float16 does not round small gradients to 0."""
    return autocast_precision(config, device) == torch.float16


def product_precision(config: Config, given: str, device: torch.device) -> torch.dtype:
    """Return the type of the operands of products with classes; ``given`` is a method's ``precision``."""
    precision = autocast_precision(config, device) if given == "auto" else getattr(torch, given)
    return torch.float32 if precision == torch.float16 and device.type == "cpu" else precision


def centre_softmax(config: Config, method: FixedCentres, device: torch.device) -> Softmax:
    """Return the softmax over fixed centres."""
    precision = product_precision(config, method.precision, device)
    return Softmax(method.margin, precision=precision, tile=method.tile)
