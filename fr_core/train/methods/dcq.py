"""DCQ, the Dynamic Class Queue: the class centre is the key encoder's feature of another image of the person.

Li et al., "Dynamic Class Queue for Large Scale Face Recognition in the Wild", CVPR 2021; docs/methods/baselines.md.
"""

from functools import partial

from fr_core.config import Config
from fr_core.config.methods import DCQ
from fr_core.data.stream import Batch
from fr_core.heads.attfc import generative_centres
from fr_core.ranks import Ranks
from fr_core.train.queue_step import queue_step
from fr_core.train.reading import Reading
from fr_core.train.state import TrainState


def dcq_step(config: Config, method: DCQ, state: TrainState, batch: Batch, ranks: Ranks) -> Reading:
    """Train on one global batch by :func:`fr_core.train.queue_step.queue_step`.

    There is one class image and no attention. Centres enter the queue after the loss.
    """
    first = partial(generative_centres, strategy="single")
    return queue_step(config, state, batch, ranks, first, "reference", method.momentum_at(state.step))
