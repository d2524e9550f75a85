"""One step of BigFace: backbone, gather, class-sharded margin softmax, and distillation beside it (METHODS §2, §5).

Legend: A micro-batches, B images of a rank's micro-batch, G = B × ranks, X = B and the unlabelled ones behind them,
D embedding, E the teacher's.
"""

from contextlib import nullcontext

import torch

from fr_core import rng
from fr_core.config import BigFace, Config
from fr_core.data.stream import Batch
from fr_core.losses.distill import distillation_loss
from fr_core.nets.open import normalised
from fr_core.ranks import Ranks
from fr_core.train.distill import micro_batches
from fr_core.train.state import TrainState, autocast, backward, begin_step, update, without_sync


def bigface_step(config: Config, method: BigFace, state: TrainState, batch: Batch, ranks: Ranks) -> dict[str, float]:
    """Trains on one global batch.

    The loss is the mean over the global batch whatever the ranks and micro-batches; only batch norm sees
    micro-batches one by one. Distillation adds its weight × the mean over labelled and unlabelled images.

    Returns:
        lr, and those of :func:`fr_core.train.state.update`; of a distilled run also both terms.
    """
    micro, distill = config.train.accumulate, method.distill
    images_AXHWC = micro_batches(batch, micro, state.device)
    labels_AG = [ranks.gather(labels_B) for labels_B in batch.labels_B.to(state.device).chunk(micro)]
    rows_S = state.head.sample(torch.cat(labels_AG), state.step)
    labelled = len(batch.labels_B) // micro
    total, distance = torch.zeros(2, device=state.device).unbind()
    with autocast(config, state.device):
        targets_AXE = state.teacher.targets(batch, images_AXHWC) if state.teacher else []
    state.backbone.train()
    rate = begin_step(config, state)
    sgd = state.optimizers["head"].tile_sgd() if method.update == "fused" else None
    for a in range(micro):
        torch.manual_seed(rng.torch_seed(config.seed, "dropout", state.step, ranks.rank * micro + a))
        with without_sync(state) if a < micro - 1 else nullcontext():
            with autocast(config, state.device):
                x_XD = state.parallel(normalised(images_AXHWC[a], state.backbone.input_std))
                student_XE = state.adapter(x_XD) if state.adapter else x_XD
            faces_BD, apart = x_XD[:labelled], torch.zeros_like(total)
            if distill:  # each rank its own faces' share
                apart = distillation_loss(distill.form, student_XE, targets_AXE[a]) / (micro * ranks.size)
                faces_BD = faces_BD + 0 * apart.detach()  # a fused head sees by it that the step is not finite
            loss = state.head(ranks.gather(faces_BD), labels_AG[a], rows_S, sgd) / micro
            total += loss.detach()
            if distill:
                distance += apart.detach()
                loss = loss + distill.weight * apart
            backward(config, state, loss, ranks)
    share = total / ranks.size  # every rank has the whole margin loss, and its own faces' part of the distance
    if distill is None:
        return update(config, state, share, ranks) | {"lr": rate}
    if state.adapter:
        ranks.sum_(state.adapter.weight.grad)
    terms = {"margin_loss": share, "distill_loss": distance}
    return update(config, state, share + distill.weight * distance, ranks, terms) | {"lr": rate}
