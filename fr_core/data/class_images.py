"""Class images: other faces of the same identity, beside every sample of a batch.

AttFC (docs/methods/attfc.md), DCQ, F2C and Virtual FC (docs/methods/baselines.md) use them.

In the grouped layout, an identity's chunk is always read whole. The chunks of a block are decoded once into a pool.
Samples and class images both come from this pool. The class images of a sample are a function of (seed, epoch,
sample id), so they do not depend on the ranks.

Legend: P images of the pool, Q samples of the block in step order, B samples, K class images of each sample.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from fr_core import rng
from fr_core.data.decode import decode_all
from fr_core.data.schema import points_of

_LAST, _NEVER = 2.0, 3.0  # sort keys above all uniforms: the sample itself, padding


@dataclass(frozen=True)
class Pool:
    """The decoded images of a block."""

    images: Sequence[np.ndarray]  # P images, each uint8 [H, W, 3]
    sample_ids_P: np.ndarray  # int64
    labels_P: np.ndarray  # int64
    points_P: np.ndarray  # float32 [P, 5, 2], NaN where unknown
    chunk_start_P: np.ndarray  # int64, position of the first image of each image's chunk
    chunk_size_P: np.ndarray  # int64, images in each image's chunk
    order_Q: np.ndarray  # int64, positions in the pool

    @classmethod
    def of(cls, chunks: pa.Table, threads: ThreadPoolExecutor) -> "Pool":
        """Decode the chunks of a block, as ``read_chunks`` returns them."""
        columns = {name: chunks[name].combine_chunks() for name in ("sample_ids", "images", "landmarks", "turns")}
        sizes = columns["sample_ids"].value_lengths().to_numpy().astype(np.int64)
        turns_P = columns["turns"].flatten().to_numpy()
        order_P = np.argsort(turns_P, kind="stable")
        return cls(
            decode_all(columns["images"].flatten().to_pylist(), threads),
            columns["sample_ids"].flatten().to_numpy(),
            np.repeat(chunks["label"].to_numpy().astype(np.int64), sizes),
            points_of(columns["landmarks"].flatten()),
            np.repeat(np.cumsum(sizes) - sizes, sizes),
            np.repeat(sizes, sizes),
            order_P[np.count_nonzero(turns_P < 0) :],
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
