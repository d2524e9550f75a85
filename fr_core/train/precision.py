"""The precision of a run's backbone, and of the class centres that replace a class matrix."""

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
    """Return the backbone's precision. ``auto`` is bfloat16 if the processor multiplies it natively, else float32.

    A CPU without such instructions emulates bfloat16: IR-10 at width 16 and 64×64 trained 17 images/s instead of 160.
    """
    if config.train.precision == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    return getattr(torch, config.train.precision)


def centre_softmax(config: Config, method: FixedCentres, device: torch.device) -> Softmax:
    """Return the softmax over fixed centres. ``auto`` stores centres in the backbone's precision, but never float16."""
    precision = autocast_precision(config, device) if method.precision == "auto" else getattr(torch, method.precision)
    precision = torch.float32 if precision == torch.float16 else precision
    return Softmax(method.margin, precision=precision, tile=method.tile)
