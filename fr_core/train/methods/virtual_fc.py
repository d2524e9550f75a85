"""Virtual FC: the images of an identity-balanced batch are classified against anchors that identities share.

Li et al., "Virtual Fully-Connected Layer: Training a Large-Scale Face Recognition Dataset with Limited Computational
Resources", CVPR 2021; docs/methods/baselines.md.

Legend: B images of a rank, K class images of each image, X = B·(K + 1) images, D embedding.
"""

import torch

from fr_core.config import Config
from fr_core.config.methods import VirtualFC
from fr_core.data.stream import Batch
from fr_core.heads.virtual_fc import Anchors
from fr_core.ranks import Ranks
from fr_core.train.precision import centre_softmax
from fr_core.train.reading import Reading
from fr_core.train.state import TrainState
from fr_core.train.update import backward, begin_step, embed, update


def make_head(config: Config, method: VirtualFC, classes: int, device: torch.device) -> Anchors:
    """Make the anchors of a run, with random first values."""
    anchors = method.centres(classes, config.train.global_batch)
    return Anchors(anchors, config.net.embedding, centre_softmax(config, method, device), config.seed)


def virtual_fc_step(config: Config, state: TrainState, batch: Batch, ranks: Ranks) -> Reading:
    """Train on one global batch, and on its class images.

    Departure from the Virtual FC paper: there identities are drawn uniformly, with equally many images each. Here
    images are drawn uniformly, and each comes with its class images.

    Returns:
        The numbers of :func:`fr_core.train.update.update`.
    """
    anchors = state.head
    assert isinstance(anchors, Anchors)
    count = batch.class_images_BKHWC.shape[1] + 1
    images_XHWC = torch.cat([batch.images_BHWC, batch.class_images_BKHWC.flatten(0, 1)])
    labels_X = torch.cat([batch.labels_B, batch.labels_B.repeat_interleave(count - 1)])
    begin_step(config, state)
    x_XD = embed(config, state, images_XHWC, ranks)
    loss = anchors(x_XD, labels_X, ranks.gather(x_XD.detach()), ranks.gather(labels_X)) / ranks.size
    backward(config, state, loss, ranks)
    return update(config, state, loss, ranks)
