"""One step of BigFace: backbone, gather, class-sharded margin softmax (METHODS §2, §5).

Legend: A micro-batches, B images of a rank's micro-batch, G = B × ranks, D embedding.
"""

from contextlib import nullcontext

import torch

from fr_core import rng
from fr_core.config import BigFace, Config
from fr_core.data.stream import Batch
from fr_core.nets.open import normalised
from fr_core.ranks import Ranks
from fr_core.train.state import TrainState, autocast, backward, begin_step, update, without_sync


def bigface_step(config: Config, method: BigFace, state: TrainState, batch: Batch, ranks: Ranks) -> dict[str, float]:
    """Trains on one global batch.

    The loss is the mean over the global batch whatever the ranks and micro-batches; only batch norm sees
    micro-batches one by one.

    Returns:
        lr, and those of :func:`fr_core.train.state.update`.
    """
    micro = config.train.accumulate
    images_ABHWC = batch.images_BHWC.to(state.device).chunk(micro)
    labels_AG = [ranks.gather(labels_B) for labels_B in batch.labels_B.to(state.device).chunk(micro)]
    rows_S = state.head.sample(torch.cat(labels_AG), state.step)
    total = torch.zeros((), device=state.device)
    state.backbone.train()
    rate = begin_step(config, state)
    sgd = state.optimizers["head"].tile_sgd() if method.update == "fused" else None
    for a in range(micro):
        torch.manual_seed(rng.torch_seed(config.seed, "dropout", state.step, ranks.rank * micro + a))
        with without_sync(state) if a < micro - 1 else nullcontext():
            with autocast(config, state.device):
                x_BD = state.parallel(normalised(images_ABHWC[a], state.backbone.input_std))
            loss = state.head(ranks.gather(x_BD), labels_AG[a], rows_S, sgd) / micro
            backward(config, state, loss, ranks)
        total += loss.detach()
    return update(config, state, total, ranks) | {"lr": rate}
