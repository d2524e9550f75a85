"""QuantFace: a student follows its teacher by the pairs of a batch, without a classifier (METHODS §6).

Legend: B images of a rank, G = B × ranks, D embedding, E the teacher's.
"""

import torch

from fr_core.config import Config
from fr_core.config.methods import QuantFace
from fr_core.data.stream import Batch
from fr_core.heads.sharded_fc import ShardedFC
from fr_core.ranks import Ranks
from fr_core.train.distill import micro_batches
from fr_core.train.precision import autocast
from fr_core.train.state import TrainState
from fr_core.train.update import backward, begin_step, embed, update


def make_head(config: Config, method: QuantFace, classes: int, ranks: Ranks) -> ShardedFC | None:
    matrix = method.class_matrix
    return ShardedFC(classes, config.net.embedding, matrix, ranks, config.seed) if matrix else None


def quantface_step(
    config: Config, method: QuantFace, state: TrainState, batch: Batch, ranks: Ranks
) -> dict[str, float]:
    """Trains on one global batch.

    Every rank computes the loss of the whole batch: its G² cosines are little beside a forward pass, and the hardest
    negatives are those of all ranks. Cross-entropy, where the method has it, comes from ranks' rows as BigFace's does.

    Returns:
        Those of :func:`fr_core.train.update.update`; the terms of the loss, and the thresholds if it has any.
    """
    assert state.teacher is not None
    assert state.agreement is not None
    (images_BHWC,) = micro_batches(batch, 1, state.device)
    labels_B = batch.labels_B if method.labels else torch.tensor(batch.sample_ids)
    labels_G = ranks.gather(labels_B.to(state.device))
    with autocast(config, state.device):
        (target_BE,) = state.teacher.targets(batch, [images_BHWC])
    begin_step(config, state)
    x_GD = ranks.gather(embed(config, state, images_BHWC, ranks))
    apart, terms = state.agreement(x_GD, ranks.gather(target_BE), labels_G)
    loss = share = apart / ranks.size  # a gather's gradient is the sum over ranks
    if method.cross_entropy:
        assert state.head is not None
        margin_loss = state.head(x_GD, labels_G)
        terms["margin_loss"] = margin_loss.detach()
        share = share + method.cross_entropy.weight * margin_loss / ranks.size
        loss = loss + method.cross_entropy.weight * margin_loss
    backward(config, state, loss, ranks)
    shares = {name: term / ranks.size for name, term in terms.items()}
    return update(config, state, share, ranks, shares)
