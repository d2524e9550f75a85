"""The training methods. Each has a module with its head (``make_head``) and its training step.

AttFC and DCQ share the head and the step of ``fr_core/train/queue_step.py``.

Only the two functions of this file ask which method runs. Everything else asks the section of the method
(:class:`fr_core.config.methods.Facts`). A method does not import another method, and none imports this file.
"""

from typing import assert_never

import torch

from fr_core.config import Config
from fr_core.config.methods import DCQ, F2C, AttFC, BigFace, QuantFace, VirtualFC
from fr_core.data.stream import Batch
from fr_core.heads.head import Head
from fr_core.ranks import Ranks
from fr_core.train.methods import attfc, bigface, dcq, f2c, quantface, virtual_fc
from fr_core.train.queue_step import make_queue
from fr_core.train.reading import Reading
from fr_core.train.state import TrainState


def make_head(config: Config, classes: int, ranks: Ranks, device: torch.device) -> Head | None:
    """Make the head: this rank's rows of the class matrix, or centres that are the same on all ranks.

    Args:
        device: where the run computes; the head itself is made on the CPU.

    Returns:
        The head, or None if the method has none.

    Raises:
        UserError: there are fewer centres than a batch needs.
    """
    match config.method:
        case BigFace() as method:
            return bigface.make_head(config, method, classes, ranks, device)
        case AttFC() | DCQ() as method:
            return make_queue(config, method, classes, device)
        case F2C() as method:
            return f2c.make_head(config, method, classes, device)
        case VirtualFC() as method:
            return virtual_fc.make_head(config, method, classes, device)
        case QuantFace() as method:
            return quantface.make_head(config, method, classes, ranks, device)
        case _ as unknown:
            assert_never(unknown)


def step(config: Config, state: TrainState, batch: Batch, ranks: Ranks) -> Reading:
    """Train on one global batch with the method of the run.

    Returns:
        The numbers of :func:`fr_core.train.update.update`.
    """
    match config.method:
        case BigFace() as method:
            return bigface.bigface_step(config, method, state, batch, ranks)
        case AttFC() as method:
            return attfc.attfc_step(config, method, state, batch, ranks)
        case DCQ() as method:
            return dcq.dcq_step(config, method, state, batch, ranks)
        case F2C() as method:
            return f2c.f2c_step(config, method, state, batch, ranks)
        case VirtualFC():
            return virtual_fc.virtual_fc_step(config, state, batch, ranks)
        case QuantFace() as method:
            return quantface.quantface_step(config, method, state, batch, ranks)
        case _ as unknown:
            assert_never(unknown)
