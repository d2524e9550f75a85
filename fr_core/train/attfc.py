"""One step of AttFC: a class encoder makes each face's class centre, a queue of centres replaces the class matrix
(METHODS §3).

Legend: A micro-batches, B images of a rank's micro-batch, G = B × ranks, K class images, D embedding.
"""

from contextlib import nullcontext

import torch

from fr_core import rng
from fr_core.config import AttFC, Config
from fr_core.data.stream import Batch
from fr_core.heads.attfc import follow, generative_centres
from fr_core.nets.open import normalised
from fr_core.ranks import Ranks
from fr_core.train.state import TrainState, autocast, backward, begin_step, encoded, update, without_sync


def attfc_step(config: Config, method: AttFC, state: TrainState, batch: Batch, ranks: Ranks) -> dict[str, float]:
    """Trains on one global batch.

    The encoder follows the weights from before this step's update. In the paper's order all ranks' centres enter the
    queue before the loss, so that a face's negatives include those of its own batch; in the reference order after it.
    The queue is the same on all ranks, and each computes the loss of its own faces.

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
            class_BKD = encoded(config, state, class_images_ABKHWC[a])
            centres_BD = generative_centres(x_BD, class_BKD, method.strategy, method.temperature)
            made.append((ranks.gather(centres_BD), ranks.gather(labels_AB[a])))
            if method.order == "paper":
                state.head.put(*made[a], state.step)
            loss = state.head(x_BD, centres_BD, labels_AB[a]) / (micro * ranks.size)
            backward(config, state, loss, ranks)
        total += loss.detach()
    if method.order == "reference":
        centres_AGD, labels_AG = zip(*made, strict=True)
        state.head.put(torch.cat(centres_AGD), torch.cat(labels_AG), state.step)
    return update(config, state, ranks.sum_(total), ranks) | {"lr": rate}
