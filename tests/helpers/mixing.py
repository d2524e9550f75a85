"""How well a plan mixes people, on simulated manifests: no images, but labels, chunks and row groups as ingest cuts.

``PYTHONPATH=. python -m tests.helpers.mixing`` prints the figures of docs/experiments.md.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from fr_core.data.plan import Block, Plan
from fr_core.data.schema import CHUNK_IMAGES, SCHEMA_VERSION, Dataset, Manifest, Shard, group_starts
from pipelines.datasets.ingest import plan_job

BATCH, LANES, WINDOW, RATIO = 384, 16, 16384, 0.3


class People(NamedTuple):
    """A training set. The images of a person are gamma distributed, with a long tail."""

    identities: int
    images: int
    shape: float


MS1MV3 = People(93_431, 5_179_510, 2.9)
WF21M = People(1_029_950, 21_170_000, 1.5)


class Mixing(NamedTuple):
    """Figures of a queue and of the batches that meet it."""

    distinct: int  # identities in the queue
    masked: float  # slots of the queue with the label of a face
    repeats: float  # share of a batch whose identity the batch holds already


def labels_of(people: People, seed: int = 0) -> np.ndarray:
    """Label of every image, one person after the other. Each person has one image at least."""
    random = np.random.default_rng(seed)
    weights = random.gamma(people.shape, size=people.identities)
    counts = 1 + random.multinomial(people.images - people.identities, weights / weights.sum())
    return np.repeat(np.arange(people.identities), counts)


def simulated(labels: np.ndarray, chunk: int) -> tuple[Dataset, np.ndarray, np.ndarray]:
    """Dataset without files as ingest makes it, and label and chunk of each image in the order of its row groups."""
    listing = SimpleNamespace(labels=labels, images=SimpleNamespace(num_rows=len(labels)))
    job = plan_job(listing, None, False, Path(), "grouped", 112, 0, chunk)
    sizes, shards = np.bincount(job.chunks_I), []
    first_chunks = job.chunks_I[job.starts[:-1]]
    for number, own in enumerate(np.split(sizes, first_chunks[1:])):
        groups = np.add.reduceat(own, group_starts(own))
        facts = {"file": str(number), "bytes": 0, "sha256": str(number)}
        shards.append(Shard(row_groups=tuple(groups.tolist()), images=int(own.sum()), **facts))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        layout="grouped",
        image_size=112,
        identities=int(labels[-1]) + 1,
        images=len(labels),
        shards=tuple(shards),
        source="simulated",
        rejects={},
        warnings={},
        chunk_images=chunk,
    )
    return Dataset(Path(), manifest), labels[job.sample_ids_I], job.chunks_I


def slots_of(labels: np.ndarray) -> int:
    """Slots of AttFC's queue."""
    return int(RATIO * (labels[-1] + 1)) // BATCH * BATCH


def plan_of(dataset: Dataset, spread: int) -> Plan:
    """Plan of AttFC's recipe with a given spread."""
    return Plan(dataset, 0, BATCH, LANES, WINDOW, spread=spread)


def mixing(stream: np.ndarray, slots: int, people: int) -> Mixing:
    """Figures of a stream of labels: the queue before the last batches, and what each of them meets."""
    masked, repeats, count = [], [], (len(stream) - slots) // BATCH
    for start in range(0, count * BATCH, BATCH):
        queue, batch = stream[start : start + slots], stream[start + slots : start + slots + BATCH]
        masked.append(np.bincount(queue, minlength=people)[batch].mean())
        repeats.append(1 - len(np.unique(batch)) / BATCH)
    return Mixing(len(np.unique(stream[:slots])), float(np.mean(masked)), float(np.mean(repeats)))


def stream_of(plan: Plan, of_image: np.ndarray, first: int, count: int) -> np.ndarray:
    """What ``of_image`` says of the samples of ``count`` steps of epoch 0, beginning with the block of step ``first``.

    Args:
        of_image: a value of every image, in the order of the row groups.
    """
    starts = np.cumsum(plan.dataset.row_groups[:, 2]) - plan.dataset.row_groups[:, 2]
    number, parts, taken = first // plan.steps_per_block, [], 0
    while taken < count:
        rows = plan.block_rows(Block(0, number, 0, 1))
        parts.append(of_image[starts[rows[:, 0]] + rows[:, 1]])
        number, taken = number + 1, taken + len(rows) // plan.global_batch
    return np.concatenate(parts)[: count * plan.global_batch]


def measured(plan: Plan, labels: np.ndarray, slots: int, batches: int = 84, first: int = 0) -> Mixing:
    """Figures of a plan, whose first sample in the queue is about that of step ``first``."""
    return mixing(stream_of(plan, labels, first, slots // BATCH + batches), slots, plan.dataset.manifest.identities)


def independent(labels: np.ndarray, slots: int, batches: int = 84) -> Mixing:
    """Figures of images that are drawn independently of each other."""
    stream = labels[np.random.default_rng(1).permutation(len(labels))[: slots + batches * BATCH]]
    return mixing(stream, slots, int(labels.max()) + 1)


def reading(plan: Plan, ranks: int = 1, since: int = 0) -> tuple[float, int]:
    """Read images over used images from block ``since`` to the epoch's end, and the most images that all ranks hold."""
    read, most = 0, np.zeros(plan.blocks_per_epoch, np.int64)
    images = plan.dataset.row_groups[:, 2]
    for rank in range(ranks):
        held = np.zeros(0, np.int64)
        for number in range(since, plan.blocks_per_epoch):
            block = Block(0, number, rank, ranks, 0, since)
            fresh = plan.fresh_groups(block)
            held = np.concatenate([held, fresh])
            assert np.isin(plan.block_groups(block), held).all()
            assert len(np.unique(held)) == len(held)
            read, most[number] = read + images[fresh].sum(), most[number] + images[held].sum()
            held = np.intersect1d(held, plan.held_groups(block))
    used = (plan.steps_per_epoch - since * plan.steps_per_block) * plan.global_batch
    return float(read / used), int(most.max())


def main() -> None:
    """Print the figures of both sets."""
    for name, people in (("MS1MV3", MS1MV3), ("WF21M", WF21M)):
        labels = labels_of(people)
        slots = slots_of(labels)
        print(f"{name}: {slots:,} slots; independent draws: {independent(labels, slots)}")
        for chunk, spread in ((32, 0), (32, slots), (3, slots), (4, slots), (CHUNK_IMAGES, slots), (8, slots)):
            dataset, of_image, _ = simulated(labels, chunk)
            plan = plan_of(dataset, spread)
            found = measured(plan, of_image, slots, first=plan.steps_per_epoch // 2)
            read, held = reading(plan)
            print(f"  chunks of {chunk}, spread {spread:,}: {found}, read {read:.3f}, held {held:,}", flush=True)


if __name__ == "__main__":
    main()
