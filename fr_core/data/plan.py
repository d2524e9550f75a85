"""The order of samples: a pure function of (manifest, seed, epoch), the same for every number of ranks.

An epoch puts the row groups of the dataset in a seeded order and cuts that sequence of rows into L equal *lanes*.
Each lane is shuffled window by window. Step t takes G/L rows from every lane, lane after lane; of R ranks, each owns
L/R neighbouring lanes. So the global batch of a step, and even its order, does not depend on R, and a rank reads its
own lanes only. A *block* is one window of a rank's lanes: a whole number of steps, the unit of reading.
In the grouped layout the rows of this plan are still the single images, and whole chunks of an identity are read.
Balanced batches shuffle all lanes' windows together: their labels decide which images of one identity come side by
side, so every rank reads the labels of the whole window, and the images of its own lanes.
No PyTorch here: the processes that only read start without it.

Legend: G rows of a step over all ranks, L lanes, g = G/L rows per lane and step; N rows of a window over all lanes,
T its steps.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fr_core import rng
from fr_core.data.schema import Dataset, open_dataset
from fr_core.data.store import prefetch
from fr_core.errors import UserError

COLUMNS = ["sample_id", "label", "image", "landmarks"]
CHUNK_COLUMNS = ["label", "sample_ids", "images", "landmarks"]


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of the samples of a dataset.

    Raises:
        UserError: a batch larger than the dataset.
    """

    dataset: Dataset
    seed: int
    global_batch: int  # rows that a step takes over all ranks
    lanes: int
    shuffle_window: int  # rows over all lanes
    groups: int = 0  # of images of one identity in a step; a multiple of the lanes
    group_images: int = 1

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise UserError(
                f"a step of {self.global_batch} images in {self.lanes} lanes needs more than the {self.rows} images of "
                f"{self.dataset.root}: lower train.global_batch"
            )

    @property
    def order(self) -> tuple[int, ...]:
        """What makes this plan again, of the same dataset."""
        return self.seed, self.global_batch, self.lanes, self.shuffle_window, self.groups, self.group_images

    @cached_property
    def rows(self) -> int:
        return int(self.dataset.row_groups[:, 2].sum())

    @property
    def lane_rows(self) -> int:
        """Rows of a lane in an epoch; the rows % lanes left over differ from epoch to epoch."""
        return self.rows // self.lanes

    @property
    def rows_per_step(self) -> int:
        """g: rows that a step takes from every lane."""
        return self.global_batch // self.lanes

    @property
    def steps_per_epoch(self) -> int:
        return self.lane_rows // self.rows_per_step

    @property
    def steps_per_block(self) -> int:
        return max(1, self.shuffle_window // self.global_batch)

    def lanes_of(self, rank: int, size: int) -> range:
        """The lanes that a rank of ``size`` owns.

        Raises:
            UserError: the number of ranks does not divide the lanes; names the nearest that do.
        """
        if self.lanes % size:
            divisors = [n for n in range(1, self.lanes + 1) if self.lanes % n == 0]
            below, above = max(d for d in divisors if d < size), [d for d in divisors if d > size]
            nearest = f"{below} or {above[0]}" if above else f"{below}"
            raise UserError(f"{size} workers do not divide the run's {self.lanes} lanes; use {nearest}")
        each = self.lanes // size
        return range(rank * each, (rank + 1) * each)

    def block_rows(self, epoch: int, block: int, rank: int, size: int, skip_steps: int = 0) -> np.ndarray:
        """Where the rows of a rank's block lie, in the order in which its steps take them.

        Args:
            skip_steps: leading steps of the block that are left out.

        Returns:
            int64 [rows, 2]: row group (index into ``dataset.row_groups``), row within it.
        """
        first = block * self.steps_per_block
        steps = min(self.steps_per_block, self.steps_per_epoch - first)
        start = first * self.rows_per_step
        window = min(self.steps_per_block * self.rows_per_step, self.lane_rows - start)
        own = self.lanes_of(rank, size)
        if self.groups:
            positions_N = (self.lane_rows * np.arange(self.lanes)[:, None] + start + np.arange(window)).ravel()
            labels_N = read_rows(self.dataset, self._rows_at(epoch, positions_N), ["label"])["label"].to_numpy()
            random = rng.generator(self.seed, "balanced", epoch, block)
            shape = (steps, self.lanes, self.rows_per_step)
            order_TLg = balanced_order(labels_N, shape, self.groups // self.lanes, self.group_images, random)
            return self._rows_at(epoch, positions_N[order_TLg[skip_steps:, own.start : own.stop]].ravel())
        lanes = []
        for lane in own:
            shuffled = rng.generator(self.seed, "window", epoch, block, lane).permutation(window)
            lanes.append(lane * self.lane_rows + start + shuffled[: steps * self.rows_per_step])
        positions = np.stack(lanes).reshape(len(lanes), steps, self.rows_per_step)[:, skip_steps:]
        return self._rows_at(epoch, positions.transpose(1, 0, 2).ravel())

    def _rows_at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Row group and row within it, of positions in the epoch's sequence of rows."""
        order, ends = _epoch_order(self, epoch)
        slot = np.searchsorted(ends, positions, side="right")
        return np.column_stack([order[slot], positions - (ends[slot] - self.dataset.row_groups[order[slot], 2])])


def balanced_order(
    labels_N: np.ndarray, shape: tuple[int, int, int], groups: int, images: int, random: np.random.Generator
) -> np.ndarray:
    """An order of a window's rows in which every lane of every step begins with groups of one identity each.

    Each identity's rows are cut at random into whole groups; what is left over, and groups beyond those wanted, come
    at random. Where there are fewer groups than wanted, the last steps are random throughout.

    Args:
        labels_N: of the rows of all lanes.
        shape: T, L, g; T·L·g of the N rows are taken, each once.
        groups: of ``images`` rows, in every lane of every step.

    Returns:
        int64 [T, L, g], indices of rows.
    """
    shuffled_N = random.permutation(len(labels_N))
    by_label_N = shuffled_N[np.argsort(labels_N[shuffled_N], kind="stable")]
    _, first, count = np.unique(labels_N[by_label_N], return_index=True, return_counts=True)
    place_N = np.arange(len(labels_N)) - np.repeat(first, count)  # among the rows of its identity
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


def read_block(plan: Plan, epoch: int, block: int, rank: int, size: int, skip_steps: int = 0) -> pa.Table:
    """A rank's rows of one block in step order, or in the grouped layout its chunks; no images are decoded.

    Raises:
        UserError: a damaged shard; names it.
    """
    rows = plan.block_rows(epoch, block, rank, size, skip_steps)
    if plan.dataset.manifest.layout == "grouped":
        return read_chunks(plan.dataset, rows)
    return read_rows(plan.dataset, rows, COLUMNS)


def read_task(root: str, stamp: str, order: tuple[int, ...], block: tuple[int, ...]) -> pa.Table:
    """:func:`read_block` for another process, which makes the plan again from these few values.

    Args:
        stamp: of the dataset.
        order: of the plan, as :attr:`Plan.order` tells it.
        block: epoch, block, rank, size, skip_steps.

    Raises:
        UserError: another dataset lies there now.
    """
    return read_block(_plan_of(root, stamp, order), *block)


def read_rows(dataset: Dataset, rows: np.ndarray, columns: list[str] | None = None) -> pa.Table:
    """Rows as :meth:`Plan.block_rows` names them, in that order; every row group is read once."""
    table, positions = _read_groups(dataset, rows, columns)
    return table.take(pa.array(positions))


def read_chunks(dataset: Dataset, rows: np.ndarray) -> pa.Table:
    """The whole chunks that hold the images which :meth:`Plan.block_rows` names.

    Returns:
        label, sample_ids, images, landmarks, and turns: for each image its place in the order of ``rows``, or -1.
    """
    table, positions = _read_groups(dataset, rows, CHUNK_COLUMNS)
    ends = np.cumsum(pc.list_value_length(table["sample_ids"]).to_numpy())
    turns = np.full(ends[-1], -1, np.int32)
    turns[positions] = np.arange(len(rows))
    needed = np.unique(np.searchsorted(ends, positions, side="right"))
    offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
    return table.append_column("turns", pa.ListArray.from_arrays(offsets, pa.array(turns))).take(pa.array(needed))


def _read_groups(dataset: Dataset, rows: np.ndarray, columns: list[str] | None) -> tuple[pa.Table, np.ndarray]:
    """The row groups that ``rows`` lie in, and the position of each row among all their images."""
    groups, inverse = np.unique(rows[:, 0], return_inverse=True)
    places = dataset.row_groups[groups]
    starts = np.cumsum(places[:, 2]) - places[:, 2]
    reads = (partial(dataset.read_row_group, shard, group, columns) for shard, group in places[:, :2].tolist())
    tables = [read() for read in (reads if isinstance(dataset.root, Path) else prefetch(reads))]
    return pa.concat_tables(tables), starts[inverse] + rows[:, 1]


@lru_cache(maxsize=4)
def _plan_of(root: str, stamp: str, order: tuple[int, ...]) -> Plan:
    dataset = open_dataset(root)
    if dataset.stamp != stamp:
        raise UserError(f"{root}: another dataset than at the run's start: it was replaced while it was read")
    return Plan(dataset, *order)


@lru_cache(maxsize=4)
def _epoch_order(plan: Plan, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The row groups in the epoch's order, and the running count of rows after each."""
    groups = plan.dataset.row_groups
    order = rng.generator(plan.seed, "row groups", epoch).permutation(len(groups))
    return order, np.cumsum(groups[order, 2])
