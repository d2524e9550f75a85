"""DCQ, the Dynamic Class Queue: the key encoder's feature of another image is the class centre
(METHODS §3; Li et al., "Dynamic Class Queue for Large Scale Face Recognition in the Wild", 2021).
"""

from functools import partial

from fr_core.config import Config
from fr_core.config.methods import DCQ
from fr_core.data.stream import Batch
from fr_core.heads.attfc import generative_centres
from fr_core.ranks import Ranks
from fr_core.train.queue_step import queue_step
from fr_core.train.state import TrainState


def dcq_step(config: Config, method: DCQ, state: TrainState, batch: Batch, ranks: Ranks) -> dict[str, float]:
    """Trains on one global batch, as :func:`fr_core.train.queue_step.queue_step` does: one class image, no attention,
    and centres that enter the queue after the loss.
    """
    first = partial(generative_centres, strategy="single")
    return queue_step(config, state, batch, ranks, first, "reference", method.encoder_momentum)
