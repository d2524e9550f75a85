"""The bytes that a step sends between ranks, and that a checkpoint writes, counted without a card (docs/cards.md).

Legend: B images of a rank's micro-batch, G = B × ranks, D embedding, E teacher's embedding.
"""

from math import ceil
from typing import Literal, NamedTuple

from fr_core.config import Config, class_count, class_rows, distillation
from fr_core.config.methods import EmbeddingMSE, FixedCentres
from fr_core.config.optim import AdamW
from fr_core.losses.ekd import RATES
from fr_core.ranks import Ranks
from fr_core.train.work import FLOAT, backbone_size, bytes_of

LABEL = 8  # bytes
UPDATE_NUMBERS = 3  # that the ranks sum at the end of each step: the head's squared norm, the loss, and requests
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes of gradients that DDP sums at once


class Exchange(NamedTuple):
    """A collective of a step: what it carries, and the bytes that each rank hands to it, each time."""

    carries: str
    collective: Literal["all_gather", "reduce_scatter", "all_reduce"]
    bytes: int
    times: int = 1


def exchanges(config: Config, ranks: Ranks, teacher_width: int = 0) -> list[Exchange]:
    """Return the collectives of a step in which nothing is logged, verified or saved.

    Args:
        teacher_width: E, where a teacher is named.
    """
    if ranks.size == 1:
        return []
    method, micro, embedding = config.method, config.train.accumulate, config.net.embedding
    own = config.train.global_batch // ranks.size // micro
    faces = FLOAT * embedding * own
    found = []
    if isinstance(method, FixedCentres):  # the centres of all faces, without a gradient
        seen = method.facts.trained
        found.append(Exchange("embeddings", "all_gather", int(seen * faces), micro))
        found.append(Exchange("labels", "all_gather", int(seen * LABEL * own), micro))
    else:
        found.append(Exchange("embeddings", "all_gather", faces, micro))
        found.append(Exchange("their gradients", "reduce_scatter", faces * ranks.size, micro))
        found.append(Exchange("labels", "all_gather", LABEL * own, micro))
    if method.agreement:
        found.append(Exchange("teacher's embeddings", "all_gather", FLOAT * teacher_width * own))
    if matrix := method.class_matrix:
        if matrix.margin.sees_cosines:
            found.append(Exchange("positive cosines", "all_reduce", FLOAT * own * ranks.size, micro))
        found.append(Exchange("softmax", "all_gather", matrix.margin.sums * FLOAT * own * ranks.size, micro))
    if (distill := distillation(config)) and distill.adapter:
        found.append(Exchange("adapter", "all_reduce", FLOAT * embedding * teacher_width))
    found.append(Exchange("loss and norms", "all_reduce", FLOAT * (UPDATE_NUMBERS + loss_terms(config))))
    if config.optim.shard_state:
        moved = FLOAT * ceil(backbone_size(config.net, config.finetune.freeze).numbers / ranks.size)
        found.append(Exchange("moved weights", "all_gather", moved))
    return found


def loss_terms(config: Config) -> int:
    """Return the number of the loss's terms that the ranks sum besides the loss."""
    match config.method.agreement:
        case None:
            return 2 if distillation(config) else 0
        case EmbeddingMSE():
            terms = 1
        case _:
            terms = 2 + 2 * RATES  # positive and negative pairs, and two rows of thresholds
    return terms + (config.method.class_matrix is not None)


def gradient_bytes(config: Config) -> int:
    """Return the bytes of the backbone's gradient, as DDP hands it to the all-reduce."""
    compressed = config.train.compress_gradients
    numbers = backbone_size(config.net, config.finetune.freeze).numbers
    return numbers * (bytes_of(compressed) if compressed else FLOAT)


def buckets(gradient: int) -> int:
    """Return the number of buckets, about, in which DDP sums a gradient of so many bytes."""
    return 1 + ceil(max(0, gradient - FIRST_BUCKET) / BUCKET)


def checkpoint_bytes(config: Config, identities: int, ranks: Ranks, precision: str) -> int:
    """Return the bytes of the tensors that rank 0 writes to a checkpoint, without labels of class centres.

    They are the backbone, its optimiser's moments, other copies of the net, and rank 0's part of the head.

    Args:
        identities: identities of the training set.
        precision: of class centres that replace a class matrix.
    """
    size = backbone_size(config.net, config.finetune.freeze)
    method, embedding = config.method, config.net.embedding
    nets = 1 + (config.train.ema > 0) + (method.facts.encoder != "none")
    moments = 2 if isinstance(config.optim, AdamW) else 1
    shares = ranks.size if config.optim.shard_state else 1
    found = nets * (FLOAT * size.numbers + size.fixed_bytes) + moments * FLOAT * size.numbers // shares
    if method.class_matrix:
        lo, hi = ranks.split(class_count(config, identities))
        found += 2 * FLOAT * class_rows(config) * (hi - lo) * embedding  # rows and their momentum
    if isinstance(method, FixedCentres):
        centres = method.layers * method.centres(class_count(config, identities), config.train.global_batch)
        found += centres * embedding * bytes_of(precision)
    return found
