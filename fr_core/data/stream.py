"""The plan, executed: JPEG bytes read ahead by Ray Data tasks or by a thread, decoded at the consumer.

Both ways call the same ``read_block``; Ray ships the Arrow tables, it does not decide their order.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fr_core.config import Config, lanes
from fr_core.data.decode import decode_batch
from fr_core.data.plan import Plan, read_rows
from fr_core.data.schema import Dataset, open_dataset
from fr_core.errors import UserError
from fr_core.ranks import Ranks

T = TypeVar("T")
COLUMNS = ["sample_id", "label", "image"]
READ_AHEAD_BYTES = 1 << 30  # of object store that one rank's stream may fill
DECODED_AHEAD = 3  # batches


@dataclass(frozen=True)
class Batch:
    """What one rank trains on in one step. Legend: B rank batch, H W pixels."""

    epoch: int
    sample_ids: np.ndarray  # int64 [B]
    labels_B: Tensor  # int64
    images_BHWC: Tensor  # uint8, RGB


def make_plan(config: Config, dataset: Dataset) -> Plan:
    """The plan of a run.

    Raises:
        UserError: grouped shards, or a batch larger than the dataset.
    """
    if dataset.manifest.layout != "flat":
        raise UserError(
            f"{dataset.root} holds grouped shards; {config.method.kind} reads flat ones: bigface ingest … --layout flat"
        )
    data, train = config.data, config.train
    return Plan(dataset, config.seed, train.global_batch, lanes(config), data.shuffle_window)


def batches(
    config: Config,
    plan: Plan,
    ranks: Ranks,
    step: int,
    stop: int,
    tables: Callable[[Plan, Ranks, int, int], Iterator[pa.Table]],
    threads: int = 2,
) -> Generator[Batch, None, None]:
    """A rank's decoded batches of steps [step, stop), a few of them ahead of the consumer.

    Args:
        tables: :func:`tables_in_process` or :func:`tables_by_ray`.

    Raises:
        UserError: a damaged shard, or a label that the manifest does not have (from ``next``).
    """
    size, classes = config.net.input_size, plan.dataset.manifest.identities
    plan.lanes_of(ranks)  # refuse a wrong number of ranks before the first read
    with ThreadPoolExecutor(threads) as pool:

        def decoded() -> Iterator[Batch]:
            for number, table in enumerate(tables(plan, ranks, step, stop), step):
                epoch = number // plan.steps_per_epoch
                ids = table["sample_id"].to_numpy()
                labels = table["label"].to_numpy().astype(np.int64)
                if labels.min() < 0 or labels.max() >= classes:
                    wrong = int(np.argmax((labels < 0) | (labels >= classes)))
                    raise UserError(
                        f"{plan.dataset.root}: sample {ids[wrong]} has label {labels[wrong]}, "
                        f"outside the manifest's {classes} identities; ingest again"
                    )
                jpegs = table["image"].to_pylist()
                images = decode_batch(jpegs, ids, size, config.data.augment, config.seed, epoch, pool)
                yield Batch(epoch, ids, torch.from_numpy(labels), torch.from_numpy(images))

        yield from ahead(decoded(), DECODED_AHEAD)


def tables_in_process(plan: Plan, ranks: Ranks, step: int, stop: int) -> Iterator[pa.Table]:
    """A rank's rows of each step, read by PyArrow in a thread of this process."""
    rows = plan.global_batch // ranks.size

    def blocks() -> Iterator[pa.Table]:
        for epoch, block, skip in _blocks(plan, step, stop):
            yield read_block(plan, ranks, epoch, block, skip)

    remaining = stop - step
    for table in ahead(blocks(), 1):
        for start in range(0, min(table.num_rows, remaining * rows), rows):
            remaining -= 1
            yield table.slice(start, rows)


def tables_by_ray(plan: Plan, ranks: Ranks, step: int, stop: int) -> Iterator[pa.Table]:
    """A rank's rows of each step, read by Ray Data tasks anywhere in the cluster. Needs a running Ray."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=READ_AHEAD_BYTES)
    arguments = (str(plan.dataset.root), plan.seed, plan.global_batch, plan.lanes, plan.shuffle_window)
    tasks = [{"epoch": e, "block": b, "skip": s} for e, b, s in _blocks(plan, step, stop)]

    def read(task: dict[str, np.ndarray]) -> pa.Table:
        epoch, block, skip = (int(task[key][0]) for key in ("epoch", "block", "skip"))
        return read_block(_plan_of(*arguments), ranks, epoch, block, skip)

    stream = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        read, batch_size=1, num_cpus=0.5, zero_copy_batch=True
    )
    rows = plan.global_batch // ranks.size
    steps = stream.iter_batches(batch_size=rows, batch_format="pyarrow", prefetch_batches=2)
    for _, table in zip(range(stop - step), steps, strict=False):
        yield table


def read_block(plan: Plan, ranks: Ranks, epoch: int, block: int, skip_steps: int = 0) -> pa.Table:
    """The rows of one block of a rank, in step order; no images are decoded."""
    return read_rows(plan.dataset, plan.block_rows(epoch, block, ranks, skip_steps), COLUMNS)


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """Runs an iterator in a thread, ``depth`` items ahead. Its errors surface here; closing this stops it."""
    slots: queue.Queue[Any] = queue.Queue(depth)
    stopped = threading.Event()
    end = object()

    def put(item: Any) -> bool:
        while not stopped.is_set():
            try:
                slots.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((end, None))
        except BaseException as error:  # handed to the consumer, who raises it
            put((end, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            item, error = slots.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stopped.set()
        thread.join()


def _blocks(plan: Plan, step: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(epoch, block, leading steps to skip) of the blocks that steps [step, stop) lie in."""
    while step < stop:
        epoch, within = divmod(step, plan.steps_per_epoch)
        block, skip = divmod(within, plan.steps_per_block)
        yield epoch, block, skip
        step += min(plan.steps_per_block, plan.steps_per_epoch - block * plan.steps_per_block) - skip


@lru_cache(maxsize=4)
def _plan_of(root: str, seed: int, global_batch: int, lanes: int, shuffle_window: int) -> Plan:
    return Plan(open_dataset(root), seed, global_batch, lanes, shuffle_window)
