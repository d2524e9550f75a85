"""Class images: other faces of the same identity, beside every sample of a batch.

AttFC (docs/methods/attfc.md), DCQ, F2C and Virtual FC (docs/methods/baselines.md) use them.

In the grouped layout, an identity's chunk is always read whole. Samples and class images both come from the chunks that
a reader holds. Its images are samples one by one, blocks apart (``fr_core/data/plan.py``), so the reader holds the
compressed bytes. A bounded number of images is decoded once for all uses; the others are decoded at each use. The class
images of a sample are a function of (seed, epoch, sample id), so they do not depend on the ranks.

Legend: P images of the pool, C chunks, Q samples of the block in step order, B samples, K class images of each sample.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from fr_core import rng
from fr_core.data.decode import decode_all
from fr_core.data.plan import Block, Plan
from fr_core.data.schema import points_of

_LAST, _NEVER = 2.0, 3.0  # sort keys above all uniforms: the sample itself, padding


@dataclass(frozen=True)
class RowGroup:
    """The images of one row group."""

    images: Sequence[bytes | np.ndarray]  # P images, all encoded, or all uint8 [H, W, 3]
    sample_ids_P: np.ndarray  # int64
    labels_P: np.ndarray  # int64
    points_P: np.ndarray  # float32 [P, 5, 2], NaN where unknown
    sizes_C: np.ndarray  # int64, images of each chunk

    @property
    def decoded(self) -> bool:
        """Return whether the images are decoded."""
        return isinstance(self.images[0], np.ndarray)


def row_groups(chunks: pa.Table, decoded: int, threads: ThreadPoolExecutor) -> dict[int, RowGroup]:
    """Split the chunks that ``read_chunks`` returns into row groups, and decode the first of them.

    Args:
        decoded: images to decode at most.
        threads: threads that decode.

    Returns:
        Row group's index → its images.
    """
    numbers_C = chunks["group"].to_numpy()
    columns = {name: chunks[name].combine_chunks() for name in ("sample_ids", "images", "landmarks")}
    sizes_C = columns["sample_ids"].value_lengths().to_numpy().astype(np.int64)
    first_chunks = np.flatnonzero(np.diff(numbers_C, prepend=-1))
    ends = np.cumsum(np.add.reduceat(sizes_C, first_chunks))
    encoded, few = columns["images"].flatten().to_pylist(), int(ends[ends <= decoded].max(initial=0))
    images = [*decode_all(encoded[:few], threads), *encoded[few:]]
    parts = zip(
        numbers_C[first_chunks].tolist(),
        np.append(0, ends[:-1]).tolist(),
        ends.tolist(),
        np.split(columns["sample_ids"].flatten().to_numpy().copy(), ends[:-1]),
        np.split(np.repeat(chunks["label"].to_numpy().astype(np.int64), sizes_C), ends[:-1]),
        np.split(points_of(columns["landmarks"].flatten()), ends[:-1]),
        np.split(sizes_C, first_chunks[1:]),
        strict=True,
    )
    return {number: RowGroup(images[start:end], *arrays) for number, start, end, *arrays in parts}


@dataclass(frozen=True)
class Pool:
    """The images that a block's samples and class images come from."""

    images: Sequence[bytes | np.ndarray]  # P images, each encoded, or uint8 [H, W, 3]
    sample_ids_P: np.ndarray  # int64
    labels_P: np.ndarray  # int64
    points_P: np.ndarray  # float32 [P, 5, 2], NaN where unknown
    chunk_start_P: np.ndarray  # int64, position of the first image of each image's chunk
    chunk_size_P: np.ndarray  # int64, images in each image's chunk
    order_Q: np.ndarray  # int64, positions in the pool

    @classmethod
    def of(cls, held: Mapping[int, RowGroup], rows_Q2: np.ndarray) -> "Pool":
        """Put the row groups of a block together; ``rows_Q2`` is what :meth:`Plan.block_rows` returns."""
        numbers, inverse_Q = np.unique(rows_Q2[:, 0], return_inverse=True)
        groups = [held[number] for number in numbers.tolist()]
        lengths, sizes_C = np.array([len(group.images) for group in groups]), _joined(groups, "sizes_C")
        return cls(
            [image for group in groups for image in group.images],
            _joined(groups, "sample_ids_P"),
            _joined(groups, "labels_P"),
            _joined(groups, "points_P"),
            np.repeat(np.cumsum(sizes_C) - sizes_C, sizes_C),
            np.repeat(sizes_C, sizes_C),
            (np.cumsum(lengths) - lengths)[inverse_Q] + rows_Q2[:, 1],
        )

    def class_images(self, positions_B: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
        """Draw class images from the other images of each sample's chunk.

        They are drawn without replacement. If the chunk has fewer than K other images, the drawn images repeat in turn.
        A sample alone in its chunk is its own class image, under another augmentation.

        Args:
            positions_B: positions of the samples in the pool.
            count: K.
            seed: seed of the run.
            epoch: epoch of the samples.

        Returns:
            int64 [B, K], positions in the pool.
        """
        start_B, size_B = self.chunk_start_P[positions_B], self.chunk_size_P[positions_B]
        width = int(size_B.max())
        keys = rng.uniforms(seed, "class images", epoch, self.sample_ids_P[positions_B], width)
        keys[np.arange(width) >= size_B[:, None]] = _NEVER
        keys[np.arange(len(positions_B)), positions_B - start_B] = _LAST
        others_B = np.maximum(size_B - 1, 1)
        drawn = np.take_along_axis(keys.argsort(1), np.arange(count) % others_B[:, None], 1)
        return start_B[:, None] + drawn


def pools(
    plan: Plan, blocks: Iterable[Block], tables: Iterator[pa.Table], decoded: int, threads: ThreadPoolExecutor
) -> Iterator[tuple[int, Pool]]:
    """Yield each block's epoch and pool. Row groups stay as long as the plan's next blocks need them.

    Args:
        plan: order of the samples.
        blocks: blocks of one rank, in order.
        tables: chunks of those blocks that have fresh row groups.
        decoded: images that are held decoded at most.
        threads: threads that decode.
    """
    held: dict[int, RowGroup] = {}
    for block in blocks:
        if plan.images_to_read(block):
            room = decoded - sum(len(group.images) for group in held.values() if group.decoded)
            held |= row_groups(next(tables), room, threads)
        yield block.epoch, Pool.of(held, plan.block_rows(block))
        held = {number: held[number] for number in plan.held_groups(block).tolist() if number in held}


def _joined(groups: Sequence[RowGroup], name: str) -> np.ndarray:
    """Return one array of several row groups, one after the other."""
    return np.concatenate([getattr(group, name) for group in groups])
