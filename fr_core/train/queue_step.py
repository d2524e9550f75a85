"""The queue of class centres and its training step, which AttFC and DCQ share (docs/methods/attfc.md, baselines.md).

Legend: A micro-batches, B images of a rank's micro-batch, G = B × ranks, K class images, D embedding.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from fr_core.config import Config
from fr_core.config.methods import FixedCentres
from fr_core.data.stream import Batch
from fr_core.device import from_host
from fr_core.heads.attfc import update_encoder
from fr_core.heads.class_queue import ClassQueue
from fr_core.ranks import Ranks
from fr_core.train.precision import centre_softmax
from fr_core.train.reading import Reading
from fr_core.train.state import TrainState
from fr_core.train.update import backward, begin_step, embed, encode_class_images, update, without_sync


def make_queue(config: Config, method: FixedCentres, classes: int, device: torch.device) -> ClassQueue:
    """Make the queue of a run, with its random first centres."""
    slots = method.centres(classes, config.train.global_batch)
    return ClassQueue(slots, config.net.embedding, centre_softmax(config, method, device), config.seed)


def queue_step(
    config: Config,
    state: TrainState,
    batch: Batch,
    ranks: Ranks,
    mix: Callable[[Tensor, Tensor], Tensor],
    order: Literal["paper", "reference"],
    encoder_momentum: float,
) -> Reading:
    """Train on one global batch.

    The encoder moves first, towards the weights before this step's update. Each rank computes the loss of its own
    faces against the queue, which is the same on all ranks.

    Args:
        mix: makes centres [B, D] of faces [B, D] and the features of their class images [B, K, D].
        encoder_momentum: γ_t, the share of its old weights that the encoder keeps in this step.
        order: when the centres of all ranks enter the queue. ``paper``: before the loss, so that a face's negatives
            include centres of its own batch. ``reference``: after the loss, as in the published code.

    Returns:
        The numbers of :func:`fr_core.train.update.update`.
    """
    queue, micro = state.head, config.train.accumulate
    assert isinstance(queue, ClassQueue)
    assert state.encoder is not None
    images_ABHWC, class_images_ABKHWC = batch.images_BHWC.chunk(micro), batch.class_images_BKHWC.chunk(micro)
    labels_AB = from_host(batch.labels_B, state.device).chunk(micro)
    total = torch.zeros((), device=state.device)
    begin_step(config, state)
    update_encoder(state.encoder, state.backbone, encoder_momentum)
    entries = []  # centres [G, D] and labels [G] of each micro-batch
    for a in range(micro):
        with without_sync(state) if a < micro - 1 else nullcontext():
            x_BD = embed(config, state, images_ABHWC[a], ranks, a)
            centres_BD = mix(x_BD, encode_class_images(config, state, class_images_ABKHWC[a]))
            entries.append((ranks.gather(centres_BD), ranks.gather(labels_AB[a])))
            if order == "paper":
                queue.put(*entries[a], state.step)
            loss = queue(x_BD, centres_BD, labels_AB[a]) / (micro * ranks.size)
            backward(config, state, loss, ranks)
        total += loss.detach()
    if order == "reference":
        centres_AGD, labels_AG = zip(*entries, strict=True)
        queue.put(torch.cat(centres_AGD), torch.cat(labels_AG), state.step)
    return update(config, state, total, ranks)
