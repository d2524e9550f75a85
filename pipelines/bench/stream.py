"""``bigface bench data``: images a second that a training step gets, against bare decoding and a torch DataLoader.

Legend: B batch, I images of the folder, K images of a sample: its own and its class images, A all B·K.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.data import Dataset as Items

from fr_core.config import Config
from fr_core.config.recipes import load_config
from fr_core.data.decode import DRAWS, augment_images, decode
from fr_core.data.masks import DRAWS as MASK_DRAWS
from fr_core.data.masks import mask_functions
from fr_core.data.schema import Dataset, open_dataset
from fr_core.data.stream import batches, blocks_in_process, make_plan
from fr_core.data.synthetic import write_faces
from fr_core.data.virtual import displacements
from fr_core.device import use_processor
from fr_core.ranks import Ranks
from pipelines.bench.turns import ratio
from pipelines.datasets.ingest import ingest

PEOPLE, SHOTS = 400, 20  # of the drawn faces
INPUTS = {  # what a step gets → the recipe, and what differs from it
    "flip": ("bigface_r50", []),
    "small": ("bigface_small", []),
    "masks": ("bigface_r50", ["data.masks.ratio=0.35"]),
    # Every use of an image decodes it, as in large sets. A queue for a few hundred people holds a batch.
    "class_images": ("attfc_r50", ["data.decoded_mib=0", "method.size_ratio=0.5"]),
}


def draw_shards(folder: Path, say: Callable[[str], None]) -> tuple[str, str]:
    """Draw faces and ingest them with their landmarks: return flat and grouped shards below a scratch folder."""
    faces, flat, grouped = (folder / name for name in ("faces", "flat", "grouped"))
    write_faces(faces, PEOPLE, SHOTS)
    say(f"drew {PEOPLE * SHOTS:,} faces of {PEOPLE} people")
    ingest(faces / "images", flat, landmarks=faces / "landmarks.csv", on_ray=False)
    ingest(faces / "images", grouped, "grouped", landmarks=faces / "landmarks.csv", on_ray=False)
    return str(flat), str(grouped)


def bench_data(
    flat: str, grouped: str, folder: Path, batch: int, images: int, turns: int, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Measure the stream of batches without a net, in this process, by turns with its references.

    The cores are PyTorch's threads. The references are:

    - *decode*: one thread that decodes the same bytes and drops the images, times the cores.
    - *loader*: a DataLoader over a folder of the same JPEG files, with a worker for each core and the same work.

    Args:
        flat: flat shards.
        grouped: grouped shards.
        folder: scratch folder for the JPEG files.
        batch: samples of a step.
        images: images of each turn, and of the folder.
        turns: turns of each measurement, after one that warms up.
        say: function that shows a line of progress.

    Returns:
        A row for each of :data:`INPUTS`, and the same as figures. All are medians of the turns:

        - ``INPUT_per_second``, ``INPUT_over_decode`` and ``INPUT_over_loader``.
        - ``INPUT_processor_us``: the stream's processor time for an image. Other programs disturb it less.
        - ``INPUT_decode_share``: the share of it that decoding alone takes.
        - ``INPUT_cores_busy``: the stream's processor time by the time passed.
    """
    cores = torch.get_num_threads()
    use_processor(cores)
    rows: list[dict[str, Any]] = []
    for name, (recipe, changes) in INPUTS.items():
        path = grouped if name == "class_images" else flat
        config = load_config(recipe, [f"data.path={path}", f"train.global_batch={batch}", *changes])
        rows.append({"input": name, **_in_turns(config, folder / name, images, turns, cores)})
        say(f"{name}: {rows[-1]['per_second']:,.0f} images/s")
    figures: dict[str, float] = {"images": images, "batch": batch, "cores": cores}
    for row in rows:
        figures |= {f"{row['input']}_{key}": value for key, value in row.items() if key != "input"}
    return rows, figures


def _in_turns(config: Config, folder: Path, images: int, turns: int, cores: int) -> dict[str, float]:
    """Measure one input."""
    dataset, batch = open_dataset(config.data.path), config.train.global_batch
    jpegs, faces = write_folder(dataset, folder, images, config)
    steps = -(-images // (batch * faces.images_each))
    loader = loader_of(faces, batch, steps, cores)
    rates: list[tuple[float, ...]] = []
    for _ in range(1 + turns):
        rates.append((*stream_rate(config, dataset, steps), *decode_rate(jpegs), loader_rate(loader)))
    streamed, stream_us, decoded, decode_us, loaded = (list(measured) for measured in zip(*rates[1:], strict=True))
    return {
        "per_second": statistics.median(streamed),
        "over_decode": ratio(streamed, decoded) / cores,
        "over_loader": ratio(streamed, loaded),
        "processor_us": statistics.median(stream_us),
        "decode_share": ratio(decode_us, stream_us),
        "cores_busy": statistics.median(rate * us / 1e6 for rate, us in zip(streamed, stream_us, strict=True)),
    }


def table(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the rows as a table, header first."""
    headings = ("÷ (cores × decoding)", "÷ DataLoader", "processor µs an image", "of them decoding", "cores busy")
    cells: list[tuple[str, ...]] = [("input", "images/s", *headings)]
    for row in rows:
        ratios = f"{row['over_decode']:.2f}", f"{row['over_loader']:.2f}"
        processor = f"{row['processor_us']:.0f}", f"{row['decode_share']:.2f}", f"{row['cores_busy']:.2f}"
        cells.append((row["input"], f"{row['per_second']:,.0f}", *ratios, *processor))
    return cells


def stream_rate(config: Config, dataset: Dataset, steps: int) -> tuple[float, float]:
    """Return images a second after the first batch, and microseconds of processor time an image."""
    plan = make_plan(config, dataset)
    with closing(batches(config, plan, Ranks(), 0, 1 + steps, blocks_in_process)) as stream:
        next(stream)
        started, processor = time.perf_counter(), time.process_time()
        images = sum(len(step.labels_B) * (1 + step.class_images_BKHWC.shape[1]) for step in stream)
        seconds, processor = time.perf_counter() - started, time.process_time() - processor
    return images / seconds, 1e6 * processor / images


def decode_rate(jpegs: list[bytes]) -> tuple[float, float]:
    """Return the same two figures of one thread that decodes and drops images."""
    started, processor = time.perf_counter(), time.process_time()
    for jpeg in jpegs:
        decode(jpeg)
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    return len(jpegs) / seconds, 1e6 * processor / len(jpegs)


def loader_rate(loader: DataLoader) -> float:
    """Return images a second after the first batch."""
    ready = iter(loader)
    next(ready)
    started = time.perf_counter()
    images = sum(images_BKHWC.shape[0] * images_BKHWC.shape[1] for images_BKHWC, _ in ready)
    return images / (time.perf_counter() - started)


@dataclass
class Faces(Items):
    """An image folder as a data set of PyTorch, of which a worker makes whole batches: NumPy is slow on one image."""

    files: list[Path]
    labels_I: np.ndarray  # int64
    points_I52: np.ndarray  # float32, NaN where unknown
    side: int  # of the images, pixels
    config: Config

    @property
    def images_each(self) -> int:
        """Return K."""
        return 1 + self.config.method.facts.class_images

    @cached_property
    def by_label(self) -> dict[int, np.ndarray]:
        """Return the positions of each person's images."""
        return {label: np.flatnonzero(self.labels_I == label) for label in np.unique(self.labels_I).tolist()}

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, items: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Make the images of a batch, [B, K, H, W, 3], and their classes [B], with NumPy's own random numbers."""
        data, size, count = self.config.data, self.config.net.input_size, self.images_each
        labels_B = self.labels_I[items]
        others_BK = [np.random.choice(self.by_label[label], count - 1) for label in labels_B.tolist()]
        chosen_A = np.concatenate([np.array(items)[:, None], others_BK], 1).ravel()
        jpegs = [self.files[i].read_bytes() for i in chosen_A.tolist()]
        masks_AU = np.random.random((len(chosen_A), 1 + MASK_DRAWS))
        masks = mask_functions(self.config, self.points_I52[chosen_A], masks_AU, self.side)
        variant_B, fields_AFF2 = np.random.randint(data.variants, size=len(items)), None
        if data.variants > 1:
            fields_BFF2 = displacements(self.config.seed, labels_B, variant_B, data.variant_strength)
            fields_AFF2 = np.repeat(fields_BFF2, count, 0)
        images_AHWC = np.empty((len(chosen_A), size, size, 3), np.uint8)
        draws_AU = np.random.random((len(chosen_A), DRAWS))
        augment_images(images_AHWC, jpegs, draws_AU, data.augment, fields_AFF2, masks)
        return images_AHWC.reshape(-1, count, size, size, 3), labels_B * data.variants + variant_B


def write_folder(dataset: Dataset, folder: Path, images: int, config: Config) -> tuple[list[bytes], Faces]:
    """Write the first images of a dataset as JPEG files; return their bytes too."""
    groups = (dataset.read_images(shard, group) for shard, group, _ in dataset.row_groups.tolist())
    rows = list(itertools.islice(itertools.chain.from_iterable(groups), images))
    ids, labels, jpegs, points = zip(*rows, strict=True)
    folder.mkdir(parents=True)
    files = [folder / f"{sample_id}.jpg" for sample_id in ids]
    for file, jpeg in zip(files, jpegs, strict=True):
        file.write_bytes(jpeg)
    unknown = np.full((5, 2), np.nan, np.float32)
    points_I52 = np.stack([unknown if own is None else own for own in points])
    return list(jpegs), Faces(files, np.array(labels), points_I52, dataset.manifest.image_size, config)


def loader_of(faces: Faces, batch: int, steps: int, workers: int) -> DataLoader:
    """Make the DataLoader of one batch more than ``steps``. Its workers stay from one turn to the next."""
    return DataLoader(
        faces,
        batch,
        sampler=RandomSampler(faces, replacement=True, num_samples=batch * (1 + steps)),
        num_workers=workers,
        collate_fn=_to_tensors,
        persistent_workers=True,
        worker_init_fn=_begin_worker,
        multiprocessing_context="spawn",
    )


def _to_tensors(made: Any) -> tuple[Tensor, Tensor]:
    """Make tensors of what :meth:`Faces.__getitems__` returns."""
    images_BKHWC, labels_B = made
    return torch.from_numpy(images_BKHWC), torch.from_numpy(labels_B)


def _begin_worker(_: int) -> None:
    """Keep OpenCV on one thread; PyTorch does so with its own."""
    cv2.setNumThreads(1)
