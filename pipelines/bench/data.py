"""Benches of the data path: ingest, masks, and class images against single images (docs/data.md)."""

import io
import shutil
import statistics
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fr_core.config import Config
from fr_core.config.recipes import load_config
from fr_core.config.sections import Data, Masks
from fr_core.data.crops import TEMPLATE_SIZE, encode, similarity
from fr_core.data.masks import ANCHORS, DRAWS, TARGETS, mask_functions, textures
from fr_core.data.schema import open_dataset
from fr_core.data.stream import batches, blocks_in_process, make_plan
from fr_core.data.synthetic import render_face
from fr_core.device import use_processor
from fr_core.errors import UserError
from fr_core.ranks import Ranks
from pipelines.bench.turns import ratio

IMAGES_EACH = 50  # images of each identity in bench ingest


def bench_grouped(flat: str, grouped: str, epochs: int) -> dict[str, float]:
    """Measure the data path alone: samples with two class images each against single images, 112×112 with the flip.

    Batches come in this process without Ray.

    Args:
        flat: flat shards.
        grouped: grouped shards of the same images.
        epochs: whole epochs, since a pool is decoded at once and spent over many steps.

    Returns:
        ``flat_per_second``, ``grouped_per_second`` and ``grouped_over_flat``.
    """
    figures: dict[str, float] = {"epochs": epochs}
    use_processor(torch.get_num_threads())
    configs = {
        "flat": load_config("bigface_r50", [f"data.path={flat}"]),
        "grouped": load_config("attfc_r50", [f"data.path={grouped}", "train.global_batch=128", "data.spread=8192"]),
    }
    rates: dict[str, list[float]] = {name: [] for name in configs}
    for _ in range(3):
        for name, config in configs.items():
            plan = make_plan(config, open_dataset(config.data.path))
            stop = epochs * plan.steps_per_epoch
            with closing(batches(config, plan, Ranks(), 0, stop, blocks_in_process)) as stream:
                started = time.perf_counter()
                images = sum(len(batch.labels_B) for batch in stream)
                rates[name].append(images / (time.perf_counter() - started))
    for name, found in rates.items():
        figures[f"{name}_per_second"] = statistics.median(found)
    figures["grouped_over_flat"] = ratio(rates["grouped"], rates["flat"])
    return figures


def bench_ingest(images: int, folder: Path, say: Callable[[str], None]) -> dict[str, float]:
    """Measure ``bigface ingest`` on Ray from a tar and a RecordIO file, with crops whose bytes pass through.

    Args:
        images: images of the larger set. The smaller set has a tenth, to see how memory grows.
        folder: scratch folder for archives and shards, some 15 kB an image.
        say: function that shows a line of progress.

    Returns:
        Figures by KIND, tar or rec:

        - ``KIND_per_second``: the larger set's further images by its further seconds, so that Ray's start drops out.
        - ``KIND_memory_mib_N``: peak memory of all processes together for N images.
        - ``plain_per_second``: a loop of tarfile, OpenCV and PyArrow on the smaller set.
        - ``KIND_over_plain``: the ratio to this loop.
    """
    random = np.random.default_rng(0)
    coarse = random.integers(0, 255, (500, 8, 8, 3)).astype(np.uint8)
    jpegs = [encode(cv2.resize(face, (112, 112), interpolation=cv2.INTER_CUBIC)) for face in coarse]
    figures: dict[str, float] = {"images": images, "image_bytes": statistics.mean(map(len, jpegs))}
    folder.mkdir(parents=True, exist_ok=True)
    for kind, write in (("tar", _write_tar), ("rec", _write_rec)):
        taken: list[float] = []
        for count in (images // 10, images):
            source, out = folder / f"{count}.{kind}", folder / f"{kind}_{count}"
            write(source, jpegs, count)
            seconds, memory = _ingest_watched(source, out)
            taken.append(seconds)
            say(f"{kind}, {count:,} images: {seconds:,.1f} s, {memory / 2**20:,.0f} MiB")
            figures[f"{kind}_memory_mib_{count}"] = memory / 2**20
            shutil.rmtree(out)
            if (kind, count) == ("tar", images // 10):
                figures["plain_per_second"] = count / _ingest_plainly(source, folder / "plain.parquet")
            source.unlink()
        figures[f"{kind}_per_second"] = (images - images // 10) / (taken[1] - taken[0])
        figures[f"{kind}_over_plain"] = figures[f"{kind}_per_second"] / figures["plain_per_second"]
    return figures


def _write_tar(path: Path, jpegs: list[bytes], count: int) -> None:
    """Write a tar of identities' folders."""
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            info = tarfile.TarInfo(f"{i // IMAGES_EACH:06d}/{i:08d}.jpg")
            info.size = len(jpegs[i % len(jpegs)])
            archive.addfile(info, io.BytesIO(jpegs[i % len(jpegs)]))


def _write_rec(path: Path, jpegs: list[bytes], count: int) -> None:
    """Write MXNet's RecordIO: magic, length, then flag, label, two numbers and the image, padded to four bytes."""
    with path.open("wb") as file:
        for i in range(count):
            record = struct.pack("<IfQQ", 0, i // IMAGES_EACH, i, 0) + jpegs[i % len(jpegs)]
            file.write(struct.pack("<II", 0xCED7230A, len(record)) + record + bytes(-len(record) % 4))


def _ingest_watched(source: Path, out: Path) -> tuple[float, int]:
    """Ingest by the command, and return its seconds and the most bytes that its processes held together."""
    started, most = time.perf_counter(), 0
    command = [sys.executable, "-m", "pipelines.cli", "ingest", str(source), "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            most = max(most, _held_by(process.pid))
            time.sleep(0.5)
    if process.returncode:
        raise UserError(f"bigface ingest {source} failed: its error is above")
    return time.perf_counter() - started, most


def _held_by(root: int) -> int:
    """Return the bytes of a process and its descendants; a page that several share counts once."""
    parents, bytes_of = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, StopIteration):  # a process may end meanwhile
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            rows = (folder / "smaps_rollup").read_text().splitlines()
            bytes_of[int(folder.name)] = next(int(row.split()[1]) * 1024 for row in rows if row.startswith("Pss:"))
    family = {root}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(bytes_of.get(process, 0) for process in family)


def _ingest_plainly(source: Path, out: Path) -> float:
    """Ingest a tar by a plain loop, and return its seconds."""
    started, rows = time.perf_counter(), []
    with tarfile.open(source) as archive:
        for member in archive:
            opened = archive.extractfile(member)
            data = opened.read() if opened else b""
            if cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) is not None:
                rows.append({"image": data, "label": int(member.name.split("/")[0])})
    pq.write_table(pa.Table.from_pylist(rows), out)
    out.unlink()
    return time.perf_counter() - started


def bench_masks(images: int) -> dict[str, float]:
    """Measure masks on decoded 112×112 faces by one thread: warp, blend and match sharpness; textures are drawn before.

    Returns:
        ``img_s_2d`` and ``img_s_3d``: images a second of the two tools, in batches as they train, with the views of
        turned heads that they make.
        ``img_s_plain``: a 2D mask by ``findHomography`` and float arithmetic. ``ratio_2d``: the ratio to it.
    """
    few = [render_face(identity, shot) for identity in range(32) for shot in range(4)]
    numbers = np.random.default_rng(0).random((images, 1 + DRAWS))
    batches = [numbers[start : start + len(few)] for start in range(0, images, len(few))]
    makers: dict[str, Callable[[np.ndarray], None]] = {
        "plain": partial(_mask_plainly, few, textures(0)["surgical"]),
        "2d": partial(_mask_batch, few, Masks(ratio=1, rendered=0)),
        "3d": partial(_mask_batch, few, Masks(ratio=1, rendered=1)),
    }
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(3):
        for name, mask in makers.items():
            started = time.perf_counter()
            for draws_BU in batches:
                mask(draws_BU)
            seconds[name].append(time.perf_counter() - started)
    cv2.setNumThreads(threads)
    figures = {f"img_s_{name}": images / statistics.median(taken) for name, taken in seconds.items()}
    return figures | {"ratio_2d": ratio(seconds["plain"], seconds["2d"]), "images": images}


def _mask_batch(faces: list[tuple[np.ndarray, np.ndarray]], masks: Masks, draws_BU: np.ndarray) -> None:
    """Put masks on the first faces, one for each row of numbers, as a training's batch gets them."""
    config = Config(data=Data(masks=masks))
    points_B52 = np.stack([points for _, points in faces[: len(draws_BU)]])
    functions = mask_functions(config, points_B52, draws_BU, TEMPLATE_SIZE)
    for (face, _), function in zip(faces, functions, strict=False):
        if function:
            function(face)


def _mask_plainly(faces: list[tuple[np.ndarray, np.ndarray]], textures: list[np.ndarray], draws_BU: np.ndarray) -> None:
    """Put masks on the first faces, one for each row of numbers, by :func:`_masked_plainly`."""
    for i in range(len(draws_BU)):
        _masked_plainly(*faces[i], textures[i % len(textures)])


def _masked_plainly(face: np.ndarray, points: np.ndarray, texture: np.ndarray) -> np.ndarray:
    """Put on a mask by the usual code: a homography to the same six points, matched brightness, alpha blending."""
    to_face = cv2.invertAffineTransform(similarity(points, TEMPLATE_SIZE))
    matrix, _ = cv2.findHomography(ANCHORS, TARGETS @ to_face[:, :2].T + to_face[:, 2])
    worn = cv2.warpPerspective(texture, matrix, face.shape[1::-1]).astype(np.float32)
    layer = cv2.GaussianBlur(worn, (5, 5), 0.7)
    alpha, gain = layer[..., 3:] / 255, face.mean() / 115
    return np.clip(face * (1 - alpha) + gain * layer[..., :3], 0, 255).astype(np.uint8)
