"""Executes the plan: Ray Data tasks or a thread read JPEG bytes ahead, and the consumer decodes them.

Both ways call the same ``read_block``. Ray ships the Arrow tables but does not decide their order.
"""

import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import cv2
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fr_core import rng
from fr_core.config import (
    Config,
    distillation,
    group_count,
    image_side,
    lane_count,
    spread,
    step_rows,
    unlabelled_batch,
)
from fr_core.data.class_images import Pool, pools
from fr_core.data.decode import augment_draws, begin_batch, class_image_draws, decode_all, second_view_draws
from fr_core.data.masks import class_image_mask_draws, mask_draws, mask_functions, second_view_mask_draws
from fr_core.data.plan import Block, Plan, read_block, read_task
from fr_core.data.schema import Dataset, open_dataset, points_of
from fr_core.data.virtual import displacements, variants
from fr_core.errors import UserError
from fr_core.ranks import Ranks

T = TypeVar("T")
GROUP_ROWS = 32768  # images that one rank reads in one Ray Data pipeline; at most three groups are in memory
DECODED_AHEAD = 3  # batches
DECODERS = (2, 8)  # fewest and most decoding threads; between them, as many as PyTorch has


@dataclass(frozen=True)
class Batch:
    """The images that one rank trains on in one step. Legend: B rank batch, K class images of each, H W pixels.

    With ``data.views`` = 2, images 2i and 2i + 1 are two views of the same sample.
    """

    epoch: int
    sample_ids: np.ndarray  # int64 [B]
    labels_B: Tensor  # int64
    images_BHWC: Tensor  # uint8, RGB
    class_images_BKHWC: Tensor  # uint8; K = 0 for methods that need none
    unlabelled: "Batch | None" = None  # images for distillation only, from a stream with separate epochs

    def pinned(self) -> "Batch":
        """Return the batch in pinned memory, from which a card reads beside the host's work."""
        images, others = self.images_BHWC.pin_memory(), self.class_images_BKHWC.pin_memory()
        return replace(self, labels_B=self.labels_B.pin_memory(), images_BHWC=images, class_images_BKHWC=others)


def make_plan(config: Config, dataset: Dataset) -> Plan:
    """Make the plan of a run.

    Raises:
        UserError: the shards have the other layout, no identity has as many class images, or the batch is larger than
            the dataset. Or the method's centres are fewer than a batch needs.
    """
    kind, wanted, count = config.method.kind, config.method.facts.layout, config.method.facts.class_images
    if dataset.manifest.layout != wanted:
        raise UserError(
            f"{dataset.root} holds {dataset.manifest.layout} shards; {kind} reads {wanted} ones: "
            f"ingest the photos with --layout {wanted}, then split: "
            f"bigface ingest PHOTOS --out SHARDS --layout {wanted}; bigface split SHARDS --out PARTS"
        )
    if count and (most := int(dataset.identity_counts().max())) <= count:
        raise UserError(
            f"{kind} takes {count} other images of a person, but no identity of "
            f"{dataset.root} has more than {most}: lower method.class_images"
        )
    lanes, groups = lane_count(config), group_count(config)
    together = config.data.balanced.images if config.data.balanced else 1
    apart = spread(config, dataset.manifest.identities)
    data = config.data
    return Plan(
        dataset, config.seed, step_rows(config), lanes, data.shuffle_window, groups, together, apart, data.sampling
    )


def unlabelled(config: Config) -> tuple[Config, Plan] | None:
    """Return the config and plan of the stream of unlabelled images, or None if there is no such stream.

    The stream's seed is derived from the run's. So a sample id that occurs in both streams gets other random numbers in
    each. Its images have the net's full size; a run that resizes progressively shrinks them on the device.

    Raises:
        UserError: as :func:`make_plan`.
    """
    distill = distillation(config)
    if distill is None or distill.unlabelled is None:
        return None
    dataset, batch = open_dataset(distill.unlabelled.path), unlabelled_batch(config)
    if dataset.manifest.images < batch:
        raise UserError(
            f"{dataset.root} holds {dataset.manifest.images} images, but a step takes {batch}: lower "
            "method.distill.unlabelled.batch"
        )
    plain = {"lanes": None, "progressive": None, "balanced": None, "sampling": 1.0, "views": 1, "variants": 1}
    data = config.data.model_copy(update=plain)
    train = config.train.model_copy(update={"global_batch": batch})
    seed = rng.torch_seed(config.seed, "unlabelled")
    own = config.model_copy(update={"data": data, "train": train, "seed": seed})
    return own, make_plan(own, dataset)


def step_by_step(
    batches: Generator[Batch, None, None], others: Generator[Batch, None, None]
) -> Generator[Batch, None, None]:
    """Yield the batches of one stream, each with the other stream's batch as ``unlabelled``. Closing closes both."""
    with closing(batches), closing(others):
        for batch, other in zip(batches, others, strict=True):
            yield replace(batch, unlabelled=other)


def batches(
    config: Config,
    plan: Plan,
    ranks: Ranks,
    step: int,
    stop: int,
    blocks: Callable[[Plan, Ranks, int, int], Iterator[pa.Table]],
) -> Generator[Batch, None, None]:
    """Yield a rank's decoded batches of steps [step, stop), a few of them ahead of the consumer.

    Args:
        config: config of the run.
        plan: order of the samples.
        ranks: this rank among all.
        step: first step.
        stop: step after the last.
        blocks: :func:`blocks_in_process` or :func:`blocks_by_ray`.

    Raises:
        UserError: a shard is damaged, or a label is not in the manifest (raised by ``next``).
    """
    plan.lanes_of(ranks.rank, ranks.size)  # refuses a wrong number of ranks before the first read
    each = plan.global_batch // ranks.size
    least, most = DECODERS
    cv2.setNumThreads(1)  # OpenCV's threads would wake for every small image, and take the decoders' cores
    with ThreadPoolExecutor(min(max(least, torch.get_num_threads()), most)) as threads:

        def begun() -> Iterator[Callable[[], Batch]]:
            """Begin the batches of all blocks."""
            tables = (_check_labels(plan, table) for table in blocks(plan, ranks, step, stop))
            schedule = _block_schedule(plan, ranks, step, stop)
            side = plan.dataset.manifest.image_size
            if plan.dataset.manifest.layout == "flat":
                for block, rows in zip(schedule, tables, strict=False):
                    yield from _flat_batches(config, block.epoch, rows, each, side, threads)
                return
            decoded = config.data.decoded_mib * 2**20 // (3 * side**2)
            with closing(ahead(pools(plan, schedule, tables, decoded, threads), 1)) as made:
                for epoch, pool in made:
                    yield from _grouped_batches(config, epoch, pool, each, side, threads)

        made = _finished(begun())
        if torch.cuda.is_available():
            made = (batch.pinned() for batch in made)
        with closing(ahead(made, DECODED_AHEAD)) as stream:
            yield from itertools.islice(stream, stop - step)


def _finished(begun: Iterator[Callable[[], T]]) -> Iterator[T]:
    """Wait for one item after the other. The next one is begun before, so that no thread idles at an item's end."""
    before = None
    for finish in begun:
        if before:
            yield before()
        before = finish
    if before:
        yield before()


def _flat_batches(
    config: Config, epoch: int, rows: pa.Table, batch: int, side: int, threads: ThreadPoolExecutor
) -> Iterator[Callable[[], Batch]]:
    """Begin the batches of one block of flat rows."""
    size, small, augment = config.net.input_size, image_side(config, epoch), config.data.augment
    for start in range(0, rows.num_rows, batch):
        step = rows.slice(start, batch)
        ids = step["sample_id"].to_numpy()
        labels, fields = _class_labels(config, epoch, ids, step["label"].to_numpy().astype(np.int64))
        numbers, masked = augment_draws(config.seed, epoch, ids), mask_draws(config.seed, epoch, ids)
        points, sources = points_of(step["landmarks"]), step["image"].to_pylist()
        if config.data.views == 2:
            numbers = _interleave(numbers, second_view_draws(config.seed, epoch, ids))
            masked = _interleave(masked, second_view_mask_draws(config.seed, epoch, ids))
            sources = [image for image in decode_all(sources, threads) for _ in range(2)]
            ids, labels, points = (np.repeat(own, 2, axis=0) for own in (ids, labels, points))
            fields = None if fields is None else np.repeat(fields, 2, axis=0)
        masks = mask_functions(config, points, masked, side)
        images = begin_batch(sources, numbers, size, augment, threads, fields, small, masks)
        yield partial(_batch, epoch, ids, labels, images, 0)


def _interleave(first_BU: np.ndarray, second_BU: np.ndarray) -> np.ndarray:
    """Interleave two arrays, [2B, U]: row 2i of the first, row 2i + 1 of the second."""
    return np.stack([first_BU, second_BU], 1).reshape(-1, first_BU.shape[1])


def _grouped_batches(
    config: Config, epoch: int, pool: Pool, batch: int, side: int, threads: ThreadPoolExecutor
) -> Iterator[Callable[[], Batch]]:
    """Begin the batches of one block of the grouped layout, with their class images."""
    size, small, augment = config.net.input_size, image_side(config, epoch), config.data.augment
    count = config.method.facts.class_images
    for start in range(0, len(pool.order_Q), batch):
        own_B = pool.order_Q[start : start + batch]
        other_BK = pool.class_images(own_B, count, config.seed, epoch)
        ids = pool.sample_ids_P[own_B]
        labels, fields = _class_labels(config, epoch, ids, pool.labels_P[own_B])
        others = class_image_draws(config.seed, epoch, ids, count)
        numbers = np.concatenate([augment_draws(config.seed, epoch, ids), *others.swapaxes(0, 1)])
        all_A = np.concatenate([own_B, *other_BK.T])
        fields = None if fields is None else np.concatenate([fields] * (count + 1))
        masked = class_image_mask_draws(config.seed, epoch, ids, count)
        masked = np.concatenate([mask_draws(config.seed, epoch, ids), *masked.swapaxes(0, 1)])
        masks = mask_functions(config, pool.points_P[all_A], masked, side)
        sources = [pool.images[i] for i in all_A]
        images = begin_batch(sources, numbers, size, augment, threads, fields, small, masks)
        yield partial(_batch, epoch, ids, labels, images, count)


def _batch(epoch: int, ids_B: np.ndarray, labels_B: np.ndarray, images: Callable[[], np.ndarray], count: int) -> Batch:
    """Wait for the images of a batch, of which ``count`` times as many as its samples are class images."""
    images_AHWC = torch.from_numpy(images())
    own_BHWC, others_HWC = images_AHWC.split([len(ids_B), count * len(ids_B)])
    class_images_BKHWC = others_HWC.unflatten(0, (count, len(ids_B))).transpose(0, 1)
    return Batch(epoch, ids_B, torch.from_numpy(labels_B), own_BHWC, class_images_BKHWC)


def _class_labels(
    config: Config, epoch: int, ids_B: np.ndarray, labels_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the classes of samples, and the displacement fields of their variants or None."""
    count = config.data.variants
    if count == 1:
        return labels_B, None
    variant_B = variants(config.seed, epoch, ids_B, count)
    fields = displacements(config.seed, labels_B, variant_B, config.data.variant_strength)
    return labels_B * count + variant_B, fields


def _check_labels(plan: Plan, table: pa.Table) -> pa.Table:
    """Return a table whose labels are all in the manifest.

    Raises:
        UserError: names the first sample with another label.
    """
    labels, classes = table["label"].to_numpy(), plan.dataset.manifest.identities
    if labels.min() < 0 or labels.max() >= classes:
        wrong = int(np.argmax((labels < 0) | (labels >= classes)))
        sample = table["sample_id"][wrong] if "sample_id" in table.column_names else table["sample_ids"][wrong][0]
        raise UserError(
            f"{plan.dataset.root}: sample {sample} has label {labels[wrong]}, "
            f"outside the manifest's {classes} identities; ingest the photos again"
        )
    return table


def blocks_in_process(plan: Plan, ranks: Ranks, step: int, stop: int) -> Iterator[pa.Table]:
    """Yield a rank's blocks of steps [step, stop), read by PyArrow in a thread of this process.

    In the grouped layout, blocks without fresh row groups are left out.
    """
    yield from ahead((read_block(plan, block) for block in _read_schedule(plan, ranks, step, stop)), 1)


def blocks_by_ray(plan: Plan, ranks: Ranks, step: int, stop: int) -> Iterator[pa.Table]:
    """Yield what :func:`blocks_in_process` yields, read by Ray Data tasks anywhere in the cluster. Needs a running Ray.

    Blocks are read group by group, one group ahead of the consumer. One pipeline over all blocks would stay at its
    memory limit for most of the run. Ray Data's executor spins at this limit and took half a core from every worker.
    """
    import ray
    from ray.exceptions import RayTaskError

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.raise_original_map_exception = True
    context.target_max_block_size = None  # never split a block
    read = partial(read_task, str(plan.dataset.root), plan.dataset.stamp, plan.arguments)

    def references() -> Iterator[list["ray.ObjectRef[pa.Table]"]]:
        """Yield references to the tables of each group of blocks."""
        for blocks in _grouped_schedule(plan, ranks, step, stop):
            group = ray.data.from_items([tuple(block) for block in blocks], override_num_blocks=len(blocks))
            tables = group.map_batches(lambda b: read(tuple(map(int, b["item"][0]))), batch_size=1, num_cpus=0.5)
            yield tables.to_arrow_refs()

    try:
        for group in ahead(references(), 1):
            for reference in group:
                yield ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise type(error.cause)(str(error.cause).splitlines()[0]) from None  # drop the lines that Ray adds
        raise


def ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Run an iterator in a thread, ``depth`` items ahead. Its errors surface here; closing this generator stops it."""
    slots: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(depth)  # None marks the end
    stopped = threading.Event()

    def put(slot: tuple[T] | BaseException | None) -> bool:
        """Put a slot into the queue; return whether the consumer still wants it."""
        while not stopped.is_set():
            try:
                slots.put(slot, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        """Put every item, and then the end or the error, into the queue."""
        try:
            for item in items:
                if not put((item,)):
                    return
            put(None)
        except BaseException as error:  # the consumer raises it
            put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            slot = slots.get()
            if slot is None:
                return
            if isinstance(slot, BaseException):
                raise slot
            yield slot[0]
    finally:
        stopped.set()
        thread.join()


def _block_schedule(plan: Plan, ranks: Ranks, step: int, stop: int) -> Iterator[Block]:
    """Yield a rank's blocks that hold some of the steps [step, stop)."""
    since = step
    while step < stop:
        epoch, within = divmod(step, plan.steps_per_epoch)
        number, skip = divmod(within, plan.steps_per_block)
        first = max(0, since - epoch * plan.steps_per_epoch) // plan.steps_per_block
        yield Block(epoch, number, ranks.rank, ranks.size, skip, first)
        step += min(plan.steps_per_block, plan.steps_per_epoch - number * plan.steps_per_block) - skip


def _read_schedule(plan: Plan, ranks: Ranks, step: int, stop: int) -> Iterator[Block]:
    """Yield the blocks for which a rank reads something."""
    return (block for block in _block_schedule(plan, ranks, step, stop) if plan.images_to_read(block))


def _grouped_schedule(plan: Plan, ranks: Ranks, step: int, stop: int) -> Iterator[list[Block]]:
    """Yield the blocks for which a rank reads something, the first alone, the others by about ``GROUP_ROWS`` images."""
    group, images = [], GROUP_ROWS
    for block in _read_schedule(plan, ranks, step, stop):
        group.append(block)
        images += plan.images_to_read(block)
        if images >= GROUP_ROWS:
            yield group
            group, images = [], 0
    if group:
        yield group
