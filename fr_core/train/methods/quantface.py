"""QuantFace: a student learns from its teacher on the pairs of a batch, without a classifier.

Ef-QuantFace (2024), with the loss of EKD (CVPR 2022); docs/methods/quantface.md.

Legend: B images of a rank, G = B × ranks, D embedding of the student, E embedding of the teacher.
"""

import torch

from fr_core.config import Config
from fr_core.config.methods import QuantFace
from fr_core.data.stream import Batch
from fr_core.device import from_host
from fr_core.heads.sharded_fc import ShardedFC
from fr_core.ranks import Ranks
from fr_core.train.distill import micro_batches
from fr_core.train.precision import autocast, product_precision
from fr_core.train.reading import Reading
from fr_core.train.state import TrainState
from fr_core.train.update import backward, begin_step, embed, update


def make_head(config: Config, method: QuantFace, classes: int, ranks: Ranks, device: torch.device) -> ShardedFC | None:
    """Make the class matrix of the cross-entropy; return None if the run has no cross-entropy."""
    matrix = method.class_matrix
    if matrix is None:
        return None
    precision = product_precision(config, matrix.precision, device)
    return ShardedFC(classes, config.net.embedding, matrix, ranks, config.seed, precision)


def quantface_step(config: Config, method: QuantFace, state: TrainState, batch: Batch, ranks: Ranks) -> Reading:
    """Train on one global batch.

    Every rank computes the loss of the whole batch, because the hardest negatives may lie on any rank. The G² cosines
    cost little beside a forward pass. The optional cross-entropy uses a class matrix, as BigFace does.

    Returns:
        The numbers of :func:`fr_core.train.update.update`, with the terms of the loss and its thresholds.
    """
    assert state.teacher is not None
    assert state.agreement is not None
    (images_BHWC,) = micro_batches(batch, 1)
    labels_G = ranks.gather(batch.labels_B if method.labels else torch.tensor(batch.sample_ids))
    with autocast(config, state.device):
        (target_BE,) = state.teacher.targets(batch, [images_BHWC])
    begin_step(config, state)
    x_GD = ranks.gather(embed(config, state, images_BHWC, ranks))
    apart, terms = state.agreement(x_GD, ranks.gather(target_BE), labels_G)
    loss = share = apart / ranks.size  # the backward pass of gather sums over ranks
    if method.cross_entropy:
        assert state.head is not None
        margin_loss = state.head(x_GD, from_host(labels_G, state.device))
        terms["margin_loss"] = margin_loss.detach()
        share = share + method.cross_entropy.weight * margin_loss / ranks.size
        loss = loss + method.cross_entropy.weight * margin_loss
    backward(config, state, loss, ranks)
    shares = {name: term / ranks.size for name, term in terms.items()}
    return update(config, state, share, ranks, shares)
