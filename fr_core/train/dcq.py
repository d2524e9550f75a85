"""One step of DCQ, the Dynamic Class Queue: the key encoder's feature of another image is the class centre
(METHODS §3; Li et al., "Dynamic Class Queue for Large Scale Face Recognition in the Wild", 2021).
"""

from functools import partial

from fr_core.config import DCQ, Config
from fr_core.data.stream import Batch
from fr_core.heads.attfc import generative_centres
from fr_core.ranks import Ranks
from fr_core.train.attfc import queue_step
from fr_core.train.state import TrainState


def dcq_step(config: Config, method: DCQ, state: TrainState, batch: Batch, ranks: Ranks) -> dict[str, float]:
    """Trains on one global batch: AttFC's step with one class image, no attention, and centres that enter the queue
    after the loss. Margin and queue are DCQ's own, in ``state.head``.

    Returns:
        lr, and those of :func:`fr_core.train.state.update`.
    """
    first = partial(generative_centres, strategy="single")
    return queue_step(config, state, batch, ranks, first, "reference", method.encoder_momentum)
