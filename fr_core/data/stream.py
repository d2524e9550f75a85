"""The plan, executed: JPEG bytes read ahead by Ray Data tasks or by a thread, decoded at the consumer.

Both ways call the same ``read_block``; Ray ships the Arrow tables, it does not decide their order.
"""

import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fr_core.config import Config, lanes
from fr_core.data.decode import decode_batch
from fr_core.data.plan import Plan, read_block, read_task
from fr_core.data.schema import Dataset
from fr_core.errors import UserError
from fr_core.ranks import Ranks

T = TypeVar("T")
GROUP_ROWS = 32768  # that one rank reads in a turn of Ray Data; three groups are in memory at most
DECODED_AHEAD = 3  # batches
DECODERS = 2  # threads that decode


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
) -> Generator[Batch, None, None]:
    """A rank's decoded batches of steps [step, stop), a few of them ahead of the consumer.

    Args:
        tables: :func:`tables_in_process` or :func:`tables_by_ray`.

    Raises:
        UserError: a damaged shard, or a label that the manifest does not have (from ``next``).
    """
    size, classes = config.net.input_size, plan.dataset.manifest.identities
    plan.lanes_of(ranks.rank, ranks.size)  # refuse a wrong number of ranks before the first read
    with ThreadPoolExecutor(DECODERS) as pool:

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
    blocks = _blocks(plan, step, stop)
    tables = (read_block(plan, epoch, block, ranks.rank, ranks.size, skip) for epoch, block, skip in blocks)
    yield from _steps(ahead(tables, 1), plan.global_batch // ranks.size, stop - step)


def tables_by_ray(plan: Plan, ranks: Ranks, step: int, stop: int) -> Iterator[pa.Table]:
    """A rank's rows of each step, read by Ray Data tasks anywhere in the cluster. Needs a running Ray.

    Blocks are read group by group, a group ahead of the consumer. One pipeline over all blocks would stand against
    its memory limit for most of the run, where Ray Data's executor spins: it took half a core from every worker.
    """
    import ray
    from ray.exceptions import RayTaskError

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.raise_original_map_exception = True
    root = str(plan.dataset.root)
    stamp = plan.dataset.stamp
    read = partial(read_task, root, stamp, plan.seed, plan.global_batch, plan.lanes, plan.shuffle_window)
    rows = plan.global_batch // ranks.size
    blocks = [(epoch, block, ranks.rank, ranks.size, skip) for epoch, block, skip in _blocks(plan, step, stop)]
    each = max(1, GROUP_ROWS // (rows * plan.steps_per_block))

    def references() -> Iterator[list[Any]]:
        for start, end in itertools.pairwise([0, *range(1, len(blocks), each), len(blocks)]):  # the first one alone
            group = ray.data.from_items(blocks[start:end], override_num_blocks=end - start)
            tables = group.map_batches(lambda b: read(tuple(map(int, b["item"][0]))), batch_size=1, num_cpus=0.5)
            yield tables.to_arrow_refs()

    tables = (ray.get(reference) for group in ahead(references(), 1) for reference in group)
    try:
        yield from _steps(tables, rows, stop - step)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause).splitlines()[0]) from None  # Ray adds lines of its own
        raise


def _steps(tables: Iterator[pa.Table], rows: int, count: int) -> Iterator[pa.Table]:
    """``count`` tables of ``rows`` rows each, cut from a stream of tables of any sizes."""
    rest: list[pa.Table] = []
    for table in tables:
        joined = pa.concat_tables([*rest, table])
        whole = min(joined.num_rows // rows, count)
        for start in range(0, whole * rows, rows):
            yield joined.slice(start, rows)
        count -= whole
        rest = [joined.slice(whole * rows)]
        if count == 0:
            return


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
