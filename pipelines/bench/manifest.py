"""``bigface bench manifest``: how a dataset of millions of images opens, plans an epoch and resumes, without pixels."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from fr_core.config.recipes import load_config
from fr_core.data.plan import Block
from fr_core.data.schema import (
    CHUNK_IMAGES,
    GROUP_IMAGES,
    SCHEMA_VERSION,
    Layout,
    Manifest,
    Shard,
    open_dataset,
    write_manifest,
)
from fr_core.data.stream import make_plan
from fr_core.device import peak_memory
from pipelines.bench.turns import CPU

CROP_BYTES = 6144  # of a crop of 112×112 as JPEG
LATE_EPOCH = 5
RECIPES: dict[Layout, list[str]] = {
    "flat": ["bigface_r240_wf42m"],
    "grouped": ["attfc_r50_wf21m", "train.global_batch=1536"],
}
Measured = dict[str, tuple[float, float]]  # stage -> seconds, MiB


def bench_manifest(
    images: int, identities: int, shards: int, workers: int, say: Callable[[str], None]
) -> tuple[list[tuple[str, ...]], dict[str, float]]:
    """Measure what a rank does before it reads images, on simulated shards: files of the right size without content.

    Flat shards are planned as ``bigface_r240_wf42m`` does, grouped ones as AttFC does with a batch of 1,536. The last
    of all workers looks at a block in the middle of a late epoch, and at the first two blocks of the run.

    Args:
        workers: number of workers, the last of which is measured.
        say: function that shows a line of progress.

    Returns:
        A table with the header first, and figures. STAGE is open, plan, first_block, next_block, late_block, counts or
        names; LAYOUT is flat or grouped:

        - ``seconds_STAGE_LAYOUT``, and ``mib_STAGE_LAYOUT``: growth of the process's peak memory.
        - ``seconds_start_LAYOUT`` and ``mib_start_LAYOUT``: a start in the middle of the run: open, plan, late block.
        - ``row_groups_LAYOUT``, and ``manifest_mib``.
    """
    figures: dict[str, float] = {"images": images, "identities": identities, "shards": shards, "workers": workers}
    found: dict[str, Measured] = {}
    for layout in RECIPES:
        with TemporaryDirectory(prefix="bigface-") as scratch:
            manifest = write_simulated(Path(scratch), layout, images, identities, shards)
            figures["manifest_mib"] = (Path(scratch) / "manifest.json").stat().st_size / 2**20
            figures[f"row_groups_{layout}"] = sum(len(shard.row_groups) for shard in manifest.shards)
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:  # whose peak is that of this layout alone
                found[layout] = fresh.submit(stages, scratch, layout, workers).result()
        for stage, (seconds, mib) in found[layout].items():
            say(f"{layout}, {stage.replace('_', ' ')}: {seconds:.3f} s, {mib:.1f} MiB")
            figures |= {f"seconds_{stage}_{layout}": seconds, f"mib_{stage}_{layout}": mib}
    table: list[tuple[str, ...]] = [("stage", *(f"{layout}, {unit}" for layout in found for unit in ("s", "MiB")))]
    for stage in found["flat"]:
        cells = (
            f"{value:.{digits}f}" for own in found.values() for value, digits in zip(own[stage], (3, 1), strict=True)
        )
        table.append((stage.replace("_", " "), *cells))
    return table, figures


def write_simulated(root: Path, layout: Layout, images: int, identities: int, shards: int) -> Manifest:
    """Write a dataset without pixels: manifest, table of identities, and shards that take no room on the disk."""
    random, written = np.random.default_rng(0), []
    more = CHUNK_IMAGES if layout == "grouped" else 1  # a row group ends with a whole chunk
    for number, own in enumerate(np.diff(np.linspace(0, images, shards + 1).astype(np.int64)).tolist()):
        ends = np.cumsum(GROUP_IMAGES + random.integers(0, more, own // GROUP_IMAGES + 1)).clip(max=own)
        groups = np.diff(ends, prepend=0)
        file, size = root / f"shard-{number:05d}.parquet", own * CROP_BYTES
        file.touch()
        os.truncate(file, size)
        facts = {"file": file.name, "images": own, "bytes": size, "sha256": f"{number:064x}"}
        written.append(Shard(row_groups=tuple(groups[groups > 0].tolist()), **facts))
    counts = 1 + np.bincount(random.integers(0, identities, images - identities), minlength=identities)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        layout=layout,
        image_size=112,
        identities=identities,
        images=images,
        shards=tuple(written),
        source="simulated",
        rejects={},
        warnings={},
        chunk_images=CHUNK_IMAGES,
    )
    write_manifest(root, manifest, [f"id{number:07d}" for number in range(identities)], counts)
    return manifest


def stages(root: str, layout: Layout, workers: int) -> Measured:
    """Return seconds of each stage, and the MiB by which it raised this process's peak memory."""
    found: Measured = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        peak, began = peak_memory(CPU), time.perf_counter()
        yield
        found[name] = time.perf_counter() - began, (peak_memory(CPU) - peak) / 2**20

    recipe, *overrides = RECIPES[layout]
    config = load_config(recipe, [f"data.path={root}", *overrides])
    with stage("start"):
        with stage("open"):
            dataset = open_dataset(root)
        with stage("plan"):
            plan = make_plan(config, dataset)
        last = Block(LATE_EPOCH, plan.blocks_per_epoch // 2, workers - 1, workers)
        with stage("late_block"):
            look = plan.block_rows if layout == "flat" else plan.fresh_groups
            look(last._replace(since=last.number))
    for name, number in (("first_block", 0), ("next_block", 1)):
        with stage(name):
            look(last._replace(epoch=0, number=number))
    with stage("counts"):
        dataset.identity_counts()
    with stage("names"):
        dataset.identity_names()
    return found
