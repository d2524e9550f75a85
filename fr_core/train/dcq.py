"""One step of DCQ, the Dynamic Class Queue: the key encoder's feature of another image is the class centre
(METHODS §3; Li et al., "Dynamic Class Queue for Large Scale Face Recognition in the Wild", 2021).

Legend: A micro-batches, B images of a rank's micro-batch, G = B × ranks, D embedding.
"""

from contextlib import nullcontext

import torch

from fr_core import rng
from fr_core.config import DCQ, Config
from fr_core.data.stream import Batch
from fr_core.heads.attfc import follow, generative_centres
from fr_core.nets.open import normalised
from fr_core.ranks import Ranks
from fr_core.train.state import TrainState, autocast, begin_step, encoded, update, without_sync


def dcq_step(config: Config, method: DCQ, state: TrainState, batch: Batch, ranks: Ranks) -> dict[str, float]:
    """Trains on one global batch; its centres enter the queue after the loss.

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
    follow(state.encoder, state.backbone, method.encoder_momentum)
    made = []
    for a in range(micro):
        torch.manual_seed(rng.torch_seed(config.seed, "dropout", state.step, ranks.rank * micro + a))
        with without_sync(state) if a < micro - 1 else nullcontext():
            with autocast(config, state.device):
                x_BD = state.parallel(normalised(images_ABHWC[a], state.backbone.input_std))
            centres_BD = generative_centres(x_BD, encoded(config, state, class_images_ABKHWC[a]), "single")
            made.append((ranks.gather(centres_BD), ranks.gather(labels_AB[a])))
            loss = state.head(x_BD, centres_BD, labels_AB[a]) / (micro * ranks.size)
            (loss * state.loss_scale).backward()
        total += loss.detach()
    centres_AGD, labels_AG = zip(*made, strict=True)
    state.head.put(torch.cat(centres_AGD), torch.cat(labels_AG), state.step)
    return update(config, state, ranks.sum_(total), ranks) | {"lr": rate}
