"""AttFC: a class encoder makes the class centre of each face, and a queue of centres replaces the class matrix.

AttFC (arXiv 2025); docs/methods/attfc.md.
"""

from functools import partial

from fr_core.config import Config
from fr_core.config.methods import AttFC
from fr_core.data.stream import Batch
from fr_core.heads.attfc import generative_centres
from fr_core.ranks import Ranks
from fr_core.train.queue_step import queue_step
from fr_core.train.reading import Reading
from fr_core.train.state import TrainState


def attfc_step(config: Config, method: AttFC, state: TrainState, batch: Batch, ranks: Ranks) -> Reading:
    """Train on one global batch by :func:`fr_core.train.queue_step.queue_step`, with attention over class images."""
    mix = partial(generative_centres, strategy=method.strategy, temperature=method.temperature)
    return queue_step(config, state, batch, ranks, mix, method.order, method.momentum_at(state.step))
