"""The data path: ingest, masks, and class images beside single ones."""

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
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fr_core.config.recipes import load_config
from fr_core.config.sections import Masks
from fr_core.data.crops import TEMPLATE_SIZE, encode, similarity
from fr_core.data.masks import ANCHORS, DRAWS, TARGETS, masked, textures
from fr_core.data.schema import open_dataset
from fr_core.data.stream import batches, blocks_in_process, make_plan
from fr_core.data.synthetic import render_face
from fr_core.device import use_processor
from fr_core.errors import UserError
from fr_core.ranks import Ranks
from pipelines.bench.turns import ratio

IMAGES_EACH = 50  # of an identity in bench ingest


def bench_grouped(flat: str, grouped: str, epochs: int) -> dict[str, float]:
    """The data path alone, in process, 112×112 with the flip: samples with two class images each against images.

    Args:
        flat, grouped: the same images in both layouts.
        epochs: whole ones, since a pool is decoded at once and spent over many steps.

    Returns:
        flat_per_second, grouped_per_second, grouped_over_flat.
    """
    figures: dict[str, float] = {"epochs": epochs}
    use_processor(torch.get_num_threads())
    configs = {
        "flat": load_config("bigface_r50", [f"data.path={flat}"]),
        "grouped": load_config("attfc_r50", [f"data.path={grouped}", "train.global_batch=128"]),
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
    """Ingest of crops whose bytes pass through, from a tar and a RecordIO file, on Ray as the command runs it.

    Args:
        images: of the larger set; the smaller one, for the growth of memory, is a tenth.
        folder: for archives and shards, some 15 kB an image.

    Returns:
        For each kind images per second (of what the larger set has more, by how much longer it takes: without Ray's
        start), and memory_mib of all processes together at both sizes; plain_per_second of a loop of tarfile, OpenCV
        and PyArrow on the smaller set, and the ratios to it.
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
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            info = tarfile.TarInfo(f"{i // IMAGES_EACH:06d}/{i:08d}.jpg")
            info.size = len(jpegs[i % len(jpegs)])
            archive.addfile(info, io.BytesIO(jpegs[i % len(jpegs)]))


def _write_rec(path: Path, jpegs: list[bytes], count: int) -> None:
    """MXNet's RecordIO: magic, length, then flag, label, two numbers and the image, filled up to four bytes."""
    with path.open("wb") as file:
        for i in range(count):
            record = struct.pack("<IfQQ", 0, i // IMAGES_EACH, i, 0) + jpegs[i % len(jpegs)]
            file.write(struct.pack("<II", 0xCED7230A, len(record)) + record + bytes(-len(record) % 4))


def _ingest_watched(source: Path, out: Path) -> tuple[float, int]:
    """Seconds of the command, and the most bytes that all its processes held together."""
    started, most = time.perf_counter(), 0
    command = [sys.executable, "-m", "pipelines.cli", "ingest", str(source), "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            most = max(most, _held_by(process.pid))
            time.sleep(0.5)
    if process.returncode:
        raise UserError(f"bigface ingest {source} failed")
    return time.perf_counter() - started, most


def _held_by(root: int) -> int:
    """Bytes of a process and all that it started; a page that several share counts once."""
    parents, bytes_of = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, StopIteration):  # it may end while it is looked at
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            rows = (folder / "smaps_rollup").read_text().splitlines()
            bytes_of[int(folder.name)] = next(int(row.split()[1]) * 1024 for row in rows if row.startswith("Pss:"))
    own = {root}
    while more := {child for child, parent in parents.items() if parent in own} - own:
        own |= more
    return sum(bytes_of.get(process, 0) for process in own)


def _ingest_plainly(source: Path, out: Path) -> float:
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
    """Masks put on decoded 112×112 faces by one thread: mask, blend and sharpness match; textures are drawn before.

    Returns:
        img_s_2d and img_s_3d of the two tools, views of turned heads made on the way included; img_s_plain of a 2D
        mask by ``findHomography`` and float arithmetic, and the ratio to it.
    """
    few = [render_face(identity, shot) for identity in range(32) for shot in range(4)]
    numbers = np.random.default_rng(0).random((images, DRAWS))
    drawn = textures(0)
    tools = {"2d": Masks(rendered=0), "3d": Masks(rendered=1)}
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    seconds: dict[str, list[float]] = {"plain": [], "2d": [], "3d": []}
    for _ in range(3):
        for name, taken in seconds.items():
            started = time.perf_counter()
            for i in range(images):
                face, points = few[i % len(few)]
                if name == "plain":
                    _masked_plainly(face, points, drawn["surgical"][i % 16])
                else:
                    masked(face, points, numbers[i], tools[name])
            taken.append(time.perf_counter() - started)
    cv2.setNumThreads(threads)
    figures = {f"img_s_{name}": images / statistics.median(taken) for name, taken in seconds.items()}
    return figures | {"ratio_2d": ratio(seconds["plain"], seconds["2d"]), "images": images}


def _masked_plainly(face: np.ndarray, points: np.ndarray, texture: np.ndarray) -> np.ndarray:
    """What one writes: a homography to the same six points, brightness matched, alpha blended in float."""
    to_face = cv2.invertAffineTransform(similarity(points, TEMPLATE_SIZE))
    matrix, _ = cv2.findHomography(ANCHORS, TARGETS @ to_face[:, :2].T + to_face[:, 2])
    worn = cv2.warpPerspective(texture, matrix, face.shape[1::-1]).astype(np.float32)
    layer = cv2.GaussianBlur(worn, (5, 5), 0.7)
    alpha, gain = layer[..., 3:] / 255, face.mean() / 115
    return np.clip(face * (1 - alpha) + gain * layer[..., :3], 0, 255).astype(np.uint8)
