"""One step of Virtual FC: all images of an identity-balanced batch against anchors that many identities share
(METHODS §3).

Legend: B images of a rank, K class images of each, X = B·(K + 1) images, D embedding.
"""

import torch

from fr_core import rng
from fr_core.config import Config
from fr_core.data.stream import Batch
from fr_core.nets.open import normalised
from fr_core.ranks import Ranks
from fr_core.train.state import TrainState, autocast, backward, begin_step, update


def virtual_fc_step(config: Config, state: TrainState, batch: Batch, ranks: Ranks) -> dict[str, float]:
    """Trains on one global batch, and on its class images.

    Departure from the paper: its batches hold equally many images of identities drawn uniformly; here images are
    drawn uniformly, and each brings its class images.

    Returns:
        lr, and those of :func:`fr_core.train.state.update`.
    """
    count = batch.class_images_BKHWC.shape[1] + 1
    images_XHWC = torch.cat([batch.images_BHWC, batch.class_images_BKHWC.flatten(0, 1)]).to(state.device)
    labels_X = torch.cat([batch.labels_B, batch.labels_B.repeat_interleave(count - 1)]).to(state.device)
    torch.manual_seed(rng.torch_seed(config.seed, "dropout", state.step, ranks.rank))
    state.backbone.train()
    rate = begin_step(config, state)
    with autocast(config, state.device):
        x_XD = state.parallel(normalised(images_XHWC, state.backbone.input_std))
    loss, taken = state.head(x_XD, labels_X, ranks.gather(x_XD.detach()), ranks.gather(labels_X))
    loss = loss / ranks.size
    backward(config, state, loss, ranks)
    metrics = update(config, state, loss, ranks)
    state.head.give_back(taken, dropped=state.bad_steps > 0)
    return metrics | {"lr": rate}
