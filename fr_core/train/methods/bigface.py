"""BigFace: margin softmax over a class matrix that is sharded over the ranks, with optional distillation.

BigFace and BigFace-Distill (MFR-ICCV 2021, WebFace260M track); docs/methods/bigface.md.

Legend: A micro-batches, B labelled images of a rank's micro-batch, X all its images, G = B × ranks. D embedding of the
student, E embedding of the teacher.
"""

from contextlib import nullcontext

import torch

from fr_core.config import Config
from fr_core.config.methods import BigFace
from fr_core.data.stream import Batch
from fr_core.device import from_host
from fr_core.heads.sharded_fc import ShardedFC
from fr_core.heads.streamed import TileSGD
from fr_core.losses.distill import distillation_loss
from fr_core.optim.optimizers import RowSGD
from fr_core.ranks import Ranks
from fr_core.train.distill import micro_batches
from fr_core.train.precision import autocast, product_precision
from fr_core.train.reading import Reading
from fr_core.train.state import TrainState
from fr_core.train.update import backward, begin_step, embed, update, without_sync


def make_head(config: Config, method: BigFace, classes: int, ranks: Ranks, device: torch.device) -> ShardedFC:
    """Make this rank's rows of the class matrix."""
    precision = product_precision(config, method.precision, device)
    return ShardedFC(classes, config.net.embedding, method, ranks, config.seed, precision)


def bigface_step(config: Config, method: BigFace, state: TrainState, batch: Batch, ranks: Ranks) -> Reading:
    """Train on one global batch.

    The loss is the mean over the global batch for any number of ranks and micro-batches. Only batch norm computes its
    statistics per micro-batch. Distillation adds λ × the mean distance to the teacher, over labelled and unlabelled
    images.

    Returns:
        The numbers of :func:`fr_core.train.update.update`; a distilled run also has both terms of the loss.
    """
    head, micro, distill = state.head, config.train.accumulate, method.distill
    assert isinstance(head, ShardedFC)
    images_AXHWC = micro_batches(batch, micro)
    labels_AG = [ranks.gather(labels_B) for labels_B in from_host(batch.labels_B, state.device).chunk(micro)]
    rows_S = head.sample(torch.cat(labels_AG), state.step)
    drawn_AG = head.draw(state.step, micro * len(labels_AG[0]), micro, state.device)
    labelled = len(batch.labels_B) // micro
    total, distance = torch.zeros(2, device=state.device).unbind()
    with autocast(config, state.device):
        targets_AXE = state.teacher.targets(batch, images_AXHWC) if state.teacher else []
    begin_step(config, state)
    sgd = tile_sgd(state) if method.update == "fused" else None
    for a in range(micro):
        with without_sync(state) if a < micro - 1 else nullcontext():
            x_XD = embed(config, state, images_AXHWC[a], ranks, a)
            with autocast(config, state.device):
                student_XE = state.adapter(x_XD) if state.adapter else x_XD
            faces_BD, apart = x_XD[:labelled], torch.zeros_like(total)
            if distill:  # this rank's share
                apart = distillation_loss(distill.form, student_XE, targets_AXE[a]) / (micro * ranks.size)
                faces_BD = faces_BD + 0 * apart.detach()  # tells a fused head that the distance is not finite
            loss = head(ranks.gather(faces_BD), labels_AG[a], rows_S, sgd, drawn_AG[a]) / micro
            total += loss.detach()
            if distill:
                distance += apart.detach()
                loss = loss + distill.weight * apart
            backward(config, state, loss, ranks)
    share = total / ranks.size  # every rank has the whole margin loss, but only its share of the distance
    if distill is None:
        return update(config, state, share, ranks)
    if state.adapter:
        assert state.adapter.weight.grad is not None
        ranks.sum_(state.adapter.weight.grad)
    terms = {"margin_loss": share, "distill_loss": distance}
    return update(config, state, share + distill.weight * distance, ranks, terms)


def tile_sgd(state: TrainState) -> TileSGD:
    """Return the optimiser's settings of this step, for a head that moves its rows itself."""
    optimizer = state.optimizers["head"]
    assert isinstance(optimizer, RowSGD)
    return optimizer.tile_sgd()
