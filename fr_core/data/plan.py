"""The order of samples: a pure function of (manifest, seed, epoch), the same for every number of ranks.

An epoch puts the row groups of the dataset in a seeded order and cuts this sequence of rows into L equal *lanes*.
Each lane is shuffled window by window. Step t takes G/L rows from every lane, lane after lane. Each of R ranks owns
L/R neighbouring lanes. So the global batch of a step, even its order, does not depend on R, and a rank reads only its
lanes. A *block* is one window of a rank's lanes: a whole number of steps, and the unit of reading.

In the grouped layout, the rows of this plan are still single images, but whole chunks of an identity are read. The
images of a chunk must lie apart, or a queue of recent classes holds few people. So the rows of a lane are dealt to V
*strands* in turn, as many as a chunk has images. Each strand runs a fixed number of rows behind the one before, round
the end of the epoch. A reader keeps a row group until its last strand has passed.

Balanced batches shuffle the windows of all lanes together, because labels decide which images come side by side. So
every rank reads the labels of the whole window, but only the images of its lanes. Class-balanced
sampling does the same: it draws the rows of a window from the window, by weights that follow from labels.

This module does not import PyTorch, so that processes that only read start quickly.

Legend: G rows of a step over all ranks, L lanes, g = G/L rows per lane and step. N rows of a window over all lanes, T
steps of a window. V strands of a lane.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from fr_core import rng
from fr_core.data.schema import SCHEMAS, Dataset, open_dataset
from fr_core.data.store import prefetch
from fr_core.errors import UserError

COLUMNS = ["sample_id", "label", "image", "landmarks"]
MOST_STRANDS = 8  # of larger chunks, several images lie in one strand


class Block(NamedTuple):
    """One window of a rank's lanes."""

    epoch: int
    number: int  # of the block in the epoch
    rank: int
    size: int  # number of ranks
    skip: int = 0  # leading steps that are left out
    since: int = 0  # first block of the epoch that this reader read


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of the samples of a dataset.

    Raises:
        UserError: a batch is larger than the dataset.
    """

    dataset: Dataset
    seed: int
    global_batch: int  # rows that a step takes over all ranks
    lanes: int
    shuffle_window: int  # rows over all lanes
    groups: int = 0  # groups of images of one identity in a step; a multiple of the lanes
    group_images: int = 1  # images of a group
    spread: int = 0  # rows over all lanes between two images of a chunk; 0: chunks are not spread
    sampling: float = 1.0  # q: an identity of n images is drawn in proportion to n^q; 1: each row once an epoch

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise UserError(
                f"a step of {self.global_batch} images in {self.lanes} lanes needs more than the {self.rows} images of "
                f"{self.dataset.root}: lower train.global_batch or add images"
            )

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments that make this plan again from the same dataset."""
        balanced = (self.groups, self.group_images)
        return self.seed, self.global_batch, self.lanes, self.shuffle_window, *balanced, self.spread, self.sampling

    @cached_property
    def rows(self) -> int:
        """Return the number of images in the dataset."""
        return int(self.dataset.row_groups[:, 2].sum())

    @cached_property
    def weights(self) -> np.ndarray:
        """Return the weight n^(q − 1) with which a row of each identity is drawn: float64 [identities]."""
        return self.dataset.identity_counts().clip(1) ** (self.sampling - 1.0)

    @property
    def lane_rows(self) -> int:
        """Return the rows of a lane in an epoch. Each epoch leaves out rows % lanes other rows."""
        return self.rows // self.lanes

    @property
    def rows_per_step(self) -> int:
        """Return g, the rows that a step takes from every lane."""
        return self.global_batch // self.lanes

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of whole steps in an epoch."""
        return self.lane_rows // self.rows_per_step

    @property
    def steps_per_block(self) -> int:
        """Return the number of steps in a block. The last block of an epoch may have fewer."""
        return max(1, self.shuffle_window // self.global_batch)

    @property
    def blocks_per_epoch(self) -> int:
        """Return the number of blocks in an epoch."""
        return -(-self.steps_per_epoch // self.steps_per_block)

    @property
    def strands(self) -> int:
        """Return V, the strands of a lane."""
        return strand_count(self.dataset.manifest.chunk_images) if self.spread else 1

    @property
    def lag(self) -> int:
        """Return the rows of a strand, in one lane, by which each strand runs behind the one before."""
        return lag_rows(self.rows, self.strands, self.spread, self.shuffle_window) // (self.lanes * self.strands)

    @property
    def held_blocks(self) -> int:
        """Return the number of blocks in which a strand has come to where the one before it was."""
        return self.lag * self.strands // (self.steps_per_block * self.rows_per_step) + 1

    def lanes_of(self, rank: int, size: int) -> range:
        """Return the lanes that a rank of ``size`` owns.

        Raises:
            UserError: the number of ranks does not divide the lanes, as :func:`check_lanes`.
        """
        check_lanes(self.lanes, size, math.gcd(self.global_batch, self.groups))
        each = self.lanes // size
        return range(rank * each, (rank + 1) * each)

    def block_rows(self, block: Block) -> np.ndarray:
        """Return the positions of a block's rows in the dataset, in the order in which the rank's steps take them.

        Returns:
            int64 [rows, 2]: row group (index into ``dataset.row_groups``), row within it.
        """
        order = self._positions_by_label if self.groups or self.sampling < 1 else self._shuffled_positions
        positions_TLg = order(block.epoch, block.number, self.lanes_of(block.rank, block.size))
        return self._rows_at(block.epoch, positions_TLg[block.skip :].ravel())

    def block_groups(self, block: Block) -> np.ndarray:
        """Return the row groups that hold a block's rows, in ascending order: int64 [groups]."""
        return _groups_of_block(self, block._replace(skip=0, since=0))

    def fresh_groups(self, block: Block) -> np.ndarray:
        """Return the row groups of a block that its reader does not hold from the blocks before: int64 [groups]."""
        first = max(block.since, block.number - self.held_blocks)
        return np.setdiff1d(self.block_groups(block), self._groups_of(block, range(first, block.number)))

    def images_to_read(self, block: Block) -> int:
        """Return the number of images that a reader reads for a block."""
        if self.dataset.manifest.layout == "grouped":
            return int(self.dataset.row_groups[self.fresh_groups(block), 2].sum())
        return (self._window(block.number)[2] - block.skip) * self.global_batch // block.size

    def held_groups(self, block: Block) -> np.ndarray:
        """Return the row groups that the next blocks need, and that a reader keeps after this block: int64 [groups]."""
        last = min(block.number + self.held_blocks, self.blocks_per_epoch - 1)
        return self._groups_of(block, range(block.number + 1, last + 1))

    def _groups_of(self, block: Block, numbers: range) -> np.ndarray:
        """Return the row groups of several blocks of the same epoch and rank."""
        groups = [self.block_groups(block._replace(number=number)) for number in numbers]
        return np.unique(np.concatenate([np.zeros(0, np.int64), *groups]))

    def _window(self, block: int) -> tuple[int, int, int]:
        """Return a block's first row within a lane, its rows within a lane, and its steps."""
        first_step = block * self.steps_per_block
        steps = min(self.steps_per_block, self.steps_per_epoch - first_step)
        start = first_step * self.rows_per_step
        rows = min(self.steps_per_block * self.rows_per_step, self.lane_rows - start)
        return start, rows, steps

    def _shuffled_positions(self, epoch: int, block: int, lanes: range) -> np.ndarray:
        """Shuffle the window of each lane: int64 [T, lanes, g], positions in the epoch's sequence of rows."""
        start, window, steps = self._window(block)
        shape = (steps, self.rows_per_step)
        by_lane = []
        for lane in lanes:
            shuffled = rng.generator(self.seed, "window", epoch, block, lane).permutation(window)
            taken = shuffled[: steps * self.rows_per_step]
            by_lane.append(self._positions(lane, start + taken).reshape(shape))
        return np.stack(by_lane, axis=1)

    def _positions(self, lanes: int | np.ndarray, times: np.ndarray) -> np.ndarray:
        """Return where the rows that lanes take at some times lie in the epoch's sequence of rows.

        Args:
            lanes: number of each time's lane.
            times: rows that the lane took before in the epoch.
        """
        strand, turn = times % self.strands, times // self.strands
        length = (self.lane_rows - strand + self.strands - 1) // self.strands
        return lanes * self.lane_rows + (turn - strand * self.lag) % length * self.strands + strand

    def _positions_by_label(self, epoch: int, block: int, lanes: range) -> np.ndarray:
        """Arrange the windows of all lanes together, and return some lanes' share as :meth:`_shuffled_positions`."""
        start, window, steps = self._window(block)
        lane_starts = self.lane_rows * np.arange(self.lanes) + start
        positions_N = (lane_starts[:, None] + np.arange(window)).ravel()
        rows_N = self._rows_at(epoch, positions_N)
        labels_N = read_rows(self.dataset, rows_N, ["label"])["label"].to_numpy()
        random = rng.generator(self.seed, "balanced", epoch, block)
        shape = (steps, self.lanes, self.rows_per_step)
        if self.groups:
            order_TLg = balanced_order(labels_N, shape, self.groups // self.lanes, self.group_images, random)
        else:
            order_TLg = weighted_order(self.weights[labels_N], math.prod(shape), random).reshape(shape)
        return positions_N[order_TLg[:, lanes.start : lanes.stop]]

    def _rows_at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Convert positions in the epoch's sequence of rows to row groups and rows within: int64 [positions, 2]."""
        order, ends = _epoch_order(self, epoch)
        slots = np.searchsorted(ends, positions, side="right")
        groups = order[slots]
        starts = ends[slots] - self.dataset.row_groups[groups, 2]
        return np.column_stack([groups, positions - starts])


def balanced_order(
    labels_N: np.ndarray, shape: tuple[int, int, int], groups: int, images: int, random: np.random.Generator
) -> np.ndarray:
    """Order a window's rows so that every lane of every step begins with groups of one identity each.

    Each identity's rows are cut at random into whole groups. Left-over rows and surplus groups follow in random order.
    If there are fewer groups than wanted, the last steps are random throughout.

    Args:
        labels_N: labels of the rows of all lanes.
        shape: T, L, g; T·L·g of the N rows are taken, each once.
        groups: groups in every lane of every step.
        images: rows of a group.
        random: generator of the order.

    Returns:
        int64 [T, L, g], indices of rows.
    """
    shuffled_N = random.permutation(len(labels_N))
    by_label_N = shuffled_N[np.argsort(labels_N[shuffled_N], kind="stable")]
    _, first, count = np.unique(labels_N[by_label_N], return_index=True, return_counts=True)
    place_N = np.arange(len(labels_N)) - np.repeat(first, count)  # rank of each row among its identity's rows
    whole_N = place_N < np.repeat(count // images * images, count)
    together = random.permutation(by_label_N[whole_N].reshape(-1, images))
    slots = np.zeros(shape, bool)
    slots[:, :, : groups * images] = True
    slots = np.flatnonzero(slots)[: together.size]
    chosen, spare = np.split(together, [len(slots) // images])
    order = np.empty(np.prod(shape), np.int64)
    order[slots] = chosen.ravel()
    others = np.delete(np.arange(len(order)), slots)
    order[others] = random.permutation(np.concatenate([spare.ravel(), by_label_N[~whole_N]]))[: len(others)]
    return order.reshape(shape)


def weighted_order(weights_N: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw rows in proportion to their weights, in random order, by systematic sampling (Madow, 1949).

    Each row is drawn ⌊e⌋ or ⌈e⌉ times, where e is its expected number: ``count`` times its share of the weights.

    Args:
        weights_N: weights of the rows, greater than 0.
        count: rows to draw.
        random: generator of the order.

    Returns:
        int64 [count], indices of rows.
    """
    shuffled_N = random.permutation(len(weights_N))
    ends_N = np.cumsum(weights_N[shuffled_N])
    drawn = np.searchsorted(ends_N, (np.arange(count) + random.random()) * (ends_N[-1] / count), side="right")
    return random.permutation(shuffled_N[drawn.clip(max=len(weights_N) - 1)])  # the last sum may round below its point


def lag_rows(rows: int, strands: int, spread: int, window: int) -> int:
    """Return the rows, over all lanes, by which each strand runs behind the one before.

    Images are shuffled within a window, so the lag is a window more than the rows between two images of a chunk. A few
    per cent of them still lie nearer, by less than a window.
    A reader reads ``strands - 1`` lags twice in an epoch. Where that is half of the dataset, the lag grows to an equal
    share of the epoch for each strand: the reader then keeps all it has read, and reads nothing twice.

    Args:
        rows: images of the dataset.
        strands: V.
        spread: rows that two images of a chunk lie apart, about.
        window: rows of a window over all lanes.
    """
    wanted = spread + window
    return wanted if rows >= 2 * (strands - 1) * wanted else rows // strands


def held_rows(rows: int, chunk: int, spread: int, window: int) -> int:
    """Return how many images the readers of all ranks hold: those from the first strand to the last, and two windows.

    Of a small dataset they hold all.

    Args:
        rows: images of the dataset.
        chunk: images of a chunk, at most.
        spread: rows that two images of a chunk lie apart.
        window: rows of a window over all lanes.
    """
    strands = strand_count(chunk)
    lag = lag_rows(rows, strands, spread, window)
    return rows if lag == rows // strands else (strands - 1) * lag + 2 * window


def strand_count(chunk: int) -> int:
    """Return V for chunks of at most ``chunk`` images."""
    return min(chunk, MOST_STRANDS)


def read_block(plan: Plan, block: Block) -> pa.Table:
    """Read a rank's rows of one block in step order, or its fresh chunks in the grouped layout. No images are decoded.

    Raises:
        UserError: a shard is damaged; names it.
    """
    if plan.dataset.manifest.layout == "grouped":
        return read_chunks(plan.dataset, plan.fresh_groups(block))
    return read_rows(plan.dataset, plan.block_rows(block), COLUMNS)


def read_task(root: str, stamp: str, arguments: tuple[Any, ...], block: tuple[int, ...]) -> pa.Table:
    """Call :func:`read_block` in another process, which makes the plan again from these few values.

    Args:
        root: folder of the dataset.
        stamp: stamp of the dataset at the run's start.
        arguments: :attr:`Plan.arguments`.
        block: fields of :class:`Block`.

    Raises:
        UserError: the folder now holds another dataset.
    """
    return read_block(_plan_of(root, stamp, arguments), Block(*block))


def read_rows(dataset: Dataset, rows: np.ndarray, columns: list[str] | None = None) -> pa.Table:
    """Read rows in the order that :meth:`Plan.block_rows` gives. Every row group is read once."""
    groups, inverse = np.unique(rows[:, 0], return_inverse=True)
    sizes = dataset.row_groups[groups, 2]
    starts = np.cumsum(sizes) - sizes
    return pa.concat_tables(_read_groups(dataset, groups, columns)).take(pa.array(starts[inverse] + rows[:, 1]))


def read_chunks(dataset: Dataset, groups: np.ndarray) -> pa.Table:
    """Read all chunks of row groups.

    Returns:
        label, sample_ids, images, landmarks, and group: the row group of each chunk.
    """
    tables = _read_groups(dataset, groups, SCHEMAS["grouped"].names)
    numbers = np.repeat(groups, [table.num_rows for table in tables])
    return pa.concat_tables(tables).append_column("group", pa.array(numbers))


def _read_groups(dataset: Dataset, groups: np.ndarray, columns: list[str] | None) -> list[pa.Table]:
    """Read row groups."""
    places = dataset.row_groups[groups, :2].tolist()
    reads = (partial(dataset.read_row_group, shard, group, columns) for shard, group in places)
    return [read() for read in (reads if isinstance(dataset.root, Path) else prefetch(reads))]


@lru_cache(maxsize=4)
def _plan_of(root: str, stamp: str, arguments: tuple[Any, ...]) -> Plan:
    """Make a plan in a reading process, and keep it for later tasks."""
    dataset = open_dataset(root)
    if dataset.stamp != stamp:
        raise UserError(f"{root}: another dataset than at the run's start; keep the shards in place during a run")
    return Plan(dataset, *arguments)


@lru_cache(maxsize=4)
def _epoch_order(plan: Plan, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the row groups in the epoch's order, and the running count of rows after each."""
    groups = plan.dataset.row_groups
    order = rng.generator(plan.seed, "row groups", epoch).permutation(len(groups))
    return order, np.cumsum(groups[order, 2])


@lru_cache(maxsize=4096)  # of many small blocks, all that are held
def _groups_of_block(plan: Plan, block: Block) -> np.ndarray:
    """Return :meth:`Plan.block_groups`, which the blocks around ask for again."""
    start, window, _ = plan._window(block.number)
    lanes = np.array(plan.lanes_of(block.rank, block.size))
    positions = plan._positions(lanes[:, None], start + np.arange(window))
    return np.unique(plan._rows_at(block.epoch, positions.ravel())[:, 0])


def check_lanes(lanes: int, workers: int, multiple: int) -> None:
    """Check that a number of workers divides the lanes of a run.

    Args:
        multiple: number that the lanes divide (:func:`fr_core.config.lane_multiple`).

    Raises:
        UserError: it does not; the message names the nearest numbers that do, and lanes that would.
    """
    if lanes % workers:
        divisors = [n for n in range(1, lanes + 1) if lanes % n == 0]
        below, above = max(d for d in divisors if d < workers), [d for d in divisors if d > workers]
        mend = f"{below} or {above[0]}" if above else f"{below}"
        if fitting := [n for n in range(workers, max(lanes, workers) + 1, workers) if multiple % n == 0]:
            mend += f", or data.lanes={fitting[-1]} in a new run"
        raise UserError(f"{workers} workers do not divide the run's {lanes} lanes; use {mend}")
