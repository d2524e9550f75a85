"""One step of AttFC: a class encoder makes each face's class centre, a queue of centres replaces the class matrix
(METHODS §3).

Legend: A micro-batches, B images of a rank's micro-batch, G = B × ranks, K class images, D embedding.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fr_core import rng
from fr_core.config import AttFC, Config
from fr_core.data.stream import Batch
from fr_core.heads.attfc import follow, generative_centres
from fr_core.nets.open import normalised
from fr_core.ranks import Ranks
from fr_core.train.state import TrainState, autocast, backward, begin_step, encoded, update, without_sync


def attfc_step(config: Config, method: AttFC, state: TrainState, batch: Batch, ranks: Ranks) -> dict[str, float]:
    """Trains on one global batch, as :func:`queue_step` does.

    Returns:
        lr, and those of :func:`fr_core.train.state.update`.
    """
    mix = partial(generative_centres, strategy=method.strategy, temperature=method.temperature)
    return queue_step(config, state, batch, ranks, mix, method.order, method.encoder_momentum)


def queue_step(
    config: Config,
    state: TrainState,
    batch: Batch,
    ranks: Ranks,
    mix: Callable[[Tensor, Tensor], Tensor],
    order: Literal["paper", "reference"],
    encoder_momentum: float,
) -> dict[str, float]:
    """One step of a queue of class centres, AttFC's or DCQ's.

    The encoder follows the weights from before this step's update. In the paper's order all ranks' centres enter the
    queue before the loss, so that a face's negatives include those of its own batch; in the reference order after it.
    The queue is the same on all ranks, and each computes the loss of its own faces.

    Args:
        mix: makes of faces [B, D] and the encoder's features of their class images [B, K, D] the centres [B, D].

    Returns:
        lr, and those of :func:`fr_core.train.state.update`.
    """
    micro = config.train.accumulate
    images_ABHWC = batch.images_BHWC.to(state.device).chunk(micro)
    class_images_ABKHWC = batch.class_images_BKHWC.to(state.device).chunk(micro)
    labels_AB = batch.labels_B.to(state.device).chunk(micro)
    total = torch.zeros((), device=state.device)
    state.backbone.train()
    rate = begin_step(config, state)
    follow(state.encoder, state.backbone, encoder_momentum)
    made = []
    for a in range(micro):
        torch.manual_seed(rng.torch_seed(config.seed, "dropout", state.step, ranks.rank * micro + a))
        with without_sync(state) if a < micro - 1 else nullcontext():
            with autocast(config, state.device):
                x_BD = state.parallel(normalised(images_ABHWC[a], state.backbone.input_std))
            class_BKD = encoded(config, state, class_images_ABKHWC[a])
            centres_BD = mix(x_BD, class_BKD)
            made.append((ranks.gather(centres_BD), ranks.gather(labels_AB[a])))
            if order == "paper":
                before = state.head.put(*made[a], state.step)
            loss = state.head(x_BD, centres_BD, labels_AB[a]) / (micro * ranks.size)
            backward(config, state, loss, ranks)
        total += loss.detach()
    step, metrics = state.step, update(config, state, total, ranks)
    if order == "reference" and not state.bad_steps:
        centres_AGD, labels_AG = zip(*made, strict=True)
        state.head.put(torch.cat(centres_AGD), torch.cat(labels_AG), step)
    if order == "paper" and state.bad_steps:
        state.head.take_back(before)
    return metrics | {"lr": rate}
