"""F2C, Faster Face Classification: a probe net classifies faces against a pool that a gallery net writes.

Wang et al., "An Efficient Training Approach for Very Large Scale Face Recognition", CVPR 2022;
docs/methods/baselines.md.

Legend: B images of a rank, X = 3·B/4 images of each side, D embedding.
"""

import torch
from torch import Tensor

from fr_core.config import Config
from fr_core.config.methods import F2C
from fr_core.data.stream import Batch
from fr_core.heads.attfc import generative_centres, update_encoder
from fr_core.heads.f2c import ClassPool
from fr_core.ranks import Ranks
from fr_core.train.precision import centre_softmax
from fr_core.train.reading import Reading
from fr_core.train.state import TrainState
from fr_core.train.update import backward, begin_step, embed, encode_class_images, update


def make_head(config: Config, method: F2C, classes: int, device: torch.device) -> ClassPool:
    """Make the pool of a run, with its random first centres."""
    slots = method.centres(classes, config.train.global_batch)
    return ClassPool(slots, config.net.embedding, centre_softmax(config, method, device), config.seed)


def f2c_step(config: Config, method: F2C, state: TrainState, batch: Batch, ranks: Ranks) -> Reading:
    """Train on one global batch.

    Half of the images form pairs (a, b) with their class images. The other half are instances, split between the sides
    x = [a, instances 1] and y = [b, instances 2]. The pool takes the centres of y for the loss of x, then rolls back.
    Then it takes the centres of x for the loss of y. The loss is the mean over the faces of both sides.

    Departures from the F2C paper: there the identity loader draws identities uniformly, here images are drawn
    uniformly. And each net sees x and y as one batch.

    Returns:
        The numbers of :func:`fr_core.train.update.update`.
    """
    pool = state.head
    assert isinstance(pool, ClassPool)
    assert state.encoder is not None
    x_BHWC, x_labels, y_BHWC, y_labels = sides(batch)
    images_BHWC = torch.cat([x_BHWC, y_BHWC])
    begin_step(config, state)
    update_encoder(state.encoder, state.backbone, method.momentum_at(state.step))
    faces_BD = embed(config, state, images_BHWC, ranks)
    centres_BD = generative_centres(faces_BD, encode_class_images(config, state, images_BHWC[:, None]), "single")
    (probe_x, probe_y), (gallery_x, gallery_y) = faces_BD.chunk(2), centres_BD.chunk(2)
    all_x, all_y = ranks.gather(x_labels), ranks.gather(y_labels)
    pool.write(ranks.gather(gallery_y), all_y)
    loss = pool(probe_x, x_labels)
    pool.roll_back()
    pool.write(ranks.gather(gallery_x), all_x)
    loss = (loss + pool(probe_y, y_labels)) / (2 * ranks.size)
    backward(config, state, loss, ranks)
    return update(config, state, loss, ranks)


def sides(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split a batch into x, its labels, y and its labels: images uint8 [X, H, W, C], labels int64 [X].

    Of four neighbours in the batch, two form pairs, the third is an instance of x, and the fourth an instance of y. The
    split is thus the same for every number of ranks.
    """
    own, others = batch.images_BHWC.unflatten(0, (-1, 4)), batch.class_images_BKHWC[:, 0].unflatten(0, (-1, 4))
    labels = batch.labels_B.unflatten(0, (-1, 4))
    y_BHWC, y_labels = torch.cat([others[:, :2], own[:, 3:]], 1), torch.cat([labels[:, :2], labels[:, 3:]], 1)
    return own[:, :3].flatten(0, 1), labels[:, :3].flatten(), y_BHWC.flatten(0, 1), y_labels.flatten()
