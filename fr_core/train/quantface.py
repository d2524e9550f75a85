"""One step of QuantFace: a student follows its teacher by the pairs of a batch, without a classifier (METHODS §6).

Legend: B images of a rank, G = B × ranks, D embedding, E the teacher's.
"""

import torch

from fr_core import rng
from fr_core.config import Config, QuantFace
from fr_core.data.stream import Batch
from fr_core.nets.open import normalised
from fr_core.ranks import Ranks
from fr_core.train.distill import micro_batches
from fr_core.train.state import TrainState, autocast, backward, begin_step, update


def quantface_step(
    config: Config, method: QuantFace, state: TrainState, batch: Batch, ranks: Ranks
) -> dict[str, float]:
    """Trains on one global batch.

    Every rank computes the loss of the whole batch: its G² cosines are little beside a forward pass, and the hardest
    negatives are those of all ranks. Cross-entropy, where the method has it, comes from ranks' rows as BigFace's does.

    Returns:
        lr, and those of :func:`fr_core.train.state.update`; the terms of the loss, and the thresholds if it has any.
    """
    assert state.teacher is not None
    (images_BHWC,) = micro_batches(batch, 1, state.device)
    labels_B = batch.labels_B if method.labels else torch.tensor(batch.sample_ids)
    labels_G = ranks.gather(labels_B.to(state.device))
    with autocast(config, state.device):
        (target_BE,) = state.teacher.targets(batch, [images_BHWC])
    torch.manual_seed(rng.torch_seed(config.seed, "dropout", state.step, ranks.rank))
    state.backbone.train()
    rate = begin_step(config, state)
    with autocast(config, state.device):
        x_BD = state.parallel(normalised(images_BHWC, state.backbone.input_std))
    x_GD = ranks.gather(x_BD)
    apart, terms = state.agreement(x_GD, ranks.gather(target_BE), labels_G)
    loss = share = apart / ranks.size  # a gather's gradient is the sum over ranks
    if method.cross_entropy:
        margin_loss = state.head(x_GD, labels_G)
        terms["margin_loss"] = margin_loss.detach()
        share = share + method.cross_entropy.weight * margin_loss / ranks.size
        loss = loss + method.cross_entropy.weight * margin_loss
    backward(config, state, loss, ranks)
    shares = {name: term / ranks.size for name, term in terms.items()}
    return update(config, state, share, ranks, shares) | {"lr": rate}
