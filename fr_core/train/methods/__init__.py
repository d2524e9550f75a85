"""The methods: one room each, with what stands for the classes (``make_head``) and the step that trains on it.

AttFC and DCQ share the queue of ``fr_core/train/queue_step.py``, its head and its step.

These two functions are the only place that asks which method runs; all else asks its section
(:class:`fr_core.config.methods.Facts`). A method does not import another's room, and none imports this file.
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
from fr_core.train.state import TrainState


def make_head(config: Config, classes: int, ranks: Ranks, device: torch.device) -> Head | None:
    """What stands for the classes: this rank's rows of the class matrix, or centres that are the same on all ranks.

    Args:
        device: that will compute; the head itself is made on the CPU.

    Raises:
        UserError: fewer centres than a batch needs.
    """
    match config.method:
        case BigFace() as method:
            return bigface.make_head(config, method, classes, ranks)
        case AttFC() | DCQ() as method:
            return make_queue(config, method, classes, device)
        case F2C() as method:
            return f2c.make_head(config, method, classes, device)
        case VirtualFC() as method:
            return virtual_fc.make_head(config, method, classes, device)
        case QuantFace() as method:
            return quantface.make_head(config, method, classes, ranks)
        case _ as unknown:
            assert_never(unknown)


def step(config: Config, state: TrainState, batch: Batch, ranks: Ranks) -> dict[str, float]:
    """One optimiser step of the run's method.

    Returns:
        What :func:`fr_core.train.update.update` returns.
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
