"""``bigface bench``: speed and memory, as ratios to a plain reference in the same run (machines are noisy).

Every formulation lives in a child process of its own, since peak memory is a high-water mark. The children take
turns, step by step; a figure is the median of its turns.

Legend: B batch, D embedding, N identities, S slots of a queue, T classes of one tile.
"""

import io
import multiprocessing as mp
import shutil
import statistics
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn import functional as F

from fr_core.config import BigFace, Config, FastFace, FastFaceHaar, Margin, Masks, load_config
from fr_core.data.crops import TEMPLATE_SIZE, encode, similarity
from fr_core.data.masks import ANCHORS, DRAWS, TARGETS, masked, textures
from fr_core.data.schema import open_dataset
from fr_core.data.stream import batches, blocks_in_process, make_plan
from fr_core.data.synthetic import render_face
from fr_core.device import multiplies_bfloat16, peak_memory, use_processor
from fr_core.errors import UserError
from fr_core.heads.class_queue import ClassQueue
from fr_core.heads.sharded_fc import ShardedFC, initial_rows
from fr_core.heads.streamed import Softmax, tile_size
from fr_core.optim.fastface import HaarWindow, Recurrence
from fr_core.optim.optimizers import RowSGD, head_optimizer
from fr_core.ranks import Ranks

CPU = torch.device("cpu")
ARCFACE = Margin(scale=64, m2=0.5, m3=0)
MILLION = 1_029_950  # identities of WebFace21M in AttFC's table 2
MILLION_BATCH = 64
IMAGES_EACH = 50  # of an identity in bench ingest
WARM_ROWS = 64  # a step on these loads libraries and starts threads before memory is counted


@dataclass(frozen=True)
class Head:
    """One formulation of the classifier's step and its problem."""

    formulation: str  # plain, fused or products
    precision: str
    identities: int
    batch: int
    embedding: int
    threads: int

    @property
    def state_bytes(self) -> int:
        """Weights and momentum."""
        return 2 * 4 * self.identities * self.embedding


def bench_head(
    identities: int,
    batch: int,
    embedding: int,
    repeats: int,
    threads: int,
    million: bool,
    emulated: bool,
    say: Callable[[str], None],
) -> dict[str, float]:
    """An ArcFace and SGD step over N identities: streamed and fused, plain, and its matrix products alone.

    Returns:
        time_ratio_P (fused over plain), time_over_products_P for the precisions P that this processor has (bf16 also
        where it is ``emulated``); peak_over_state and
        reference_peak_over_state (growth of peak memory over weights + momentum); seconds of everything; seconds and
        mebibytes above weights + momentum for four N; million_rss_gib.

    Raises:
        RuntimeError: the formulations' losses differ.
    """
    figures: dict[str, float] = {"identities": identities, "batch": batch, "embedding": embedding, "threads": threads}
    shape = (identities, batch, embedding, threads)
    precisions = ["float32"]
    if emulated or multiplies_bfloat16(CPU):
        precisions.append("bfloat16")
    else:
        say("bfloat16 is not native to this processor, plain PyTorch takes minutes a step: left out, see --emulated")
    for precision in precisions:
        heads = [Head(name, precision, *shape) for name in ("plain", "fused", "products")]
        seconds, losses, peaks = _measured(heads, repeats, say)
        allowed = 1e-3 if precision == "float32" else 0.02
        if abs(losses[0] - losses[1]) > allowed * losses[0]:
            raise RuntimeError(f"losses differ in {precision}: plain {losses[0]}, fused {losses[1]}")
        short = "bf16" if precision == "bfloat16" else precision
        plain, fused, products = seconds
        figures |= {
            f"seconds_{h.formulation}_{short}": statistics.median(s) for h, s in zip(heads, seconds, strict=True)
        }
        figures[f"time_ratio_{short}"] = _ratio(fused, plain)
        figures[f"time_over_products_{short}"] = _ratio(fused, products)
        if precision == "float32":
            figures["peak_over_state"] = peaks[1] / heads[1].state_bytes
            figures["reference_peak_over_state"] = peaks[0] / heads[0].state_bytes
    sizes = [Head("fused", "float32", identities * part // 4, batch, embedding, threads) for part in (1, 2, 3, 4)]
    for head in sizes:
        (times,), _, (peak,) = _measured([head], repeats, say)
        figures[f"seconds_n{head.identities}"] = statistics.median(times)
        figures[f"mib_above_state_n{head.identities}"] = (peak - head.state_bytes) / 2**20
    if million:
        head = Head("fused", "float32", MILLION, MILLION_BATCH, embedding, threads)
        with child(_serve, head, head.identities) as turn:
            turn("step")
            figures["million_seconds"] = turn("step")[0]
            figures["million_rss_gib"] = turn("peak")[0] / 2**30
    return figures


@dataclass(frozen=True)
class Queue:
    """One formulation of AttFC's loss and queue, and its problem."""

    formulation: str  # plain or streamed
    precision: str
    slots: int
    batch: int
    embedding: int
    threads: int

    @property
    def state_bytes(self) -> int:
        """The queue's."""
        return (2 if self.precision == "bfloat16" else 4) * self.slots * self.embedding


def bench_attfc(
    slots: int,
    batch: int,
    embedding: int,
    identities: int,
    repeats: int,
    threads: int,
    emulated: bool,
    say: Callable[[str], None],
) -> dict[str, float]:
    """A step of AttFC's head on given features (reference order): streamed against the usual formulation.

    The usual one clones the queue, compares all labels with all, concatenates the logits and leaves the rest to
    autograd.

    Returns:
        head_time_ratio_P for the precisions P that this processor has (bf16 also where it is ``emulated``),
        head_memory_ratio (growth of peak memory, float32), seconds of everything, and seconds_n of the streamed form
        for ten times as many identities.

    Raises:
        RuntimeError: the formulations' losses differ.
    """
    figures: dict[str, float] = {"slots": slots, "batch": batch, "embedding": embedding, "threads": threads}
    precisions = ["float32"]
    if emulated or multiplies_bfloat16(CPU):
        precisions.append("bfloat16")
    else:
        say("bfloat16 is not native to this processor, plain PyTorch takes minutes a step: left out, see --emulated")
    for precision in precisions:
        queues = [Queue(name, precision, slots, batch, embedding, threads) for name in ("plain", "streamed")]
        with _children([(queue, identities) for queue in queues]) as turns:
            losses = [turn("step")[1] for turn in turns]
            seconds: list[list[float]] = [[] for _ in queues]
            for repeat in range(repeats):
                for queue, turn, times in zip(queues, turns, seconds, strict=True):
                    times.append(turn("step")[0])
                    say(f"{queue.formulation} {precision} S={slots:,} {repeat + 1}: {times[-1]:.3f} s")
            growth = [peak - base for peak, base in (turn("peak") for turn in turns)]
        if abs(losses[0] - losses[1]) > (1e-3 if precision == "float32" else 0.02) * losses[0]:
            raise RuntimeError(f"losses differ in {precision}: plain {losses[0]}, streamed {losses[1]}")
        short = "bf16" if precision == "bfloat16" else precision
        figures |= {
            f"seconds_{q.formulation}_{short}": statistics.median(s) for q, s in zip(queues, seconds, strict=True)
        }
        figures[f"head_time_ratio_{short}"] = _ratio(seconds[1], seconds[0])
        if precision == "float32":
            figures |= {f"gib_{q.formulation}": g / 2**30 for q, g in zip(queues, growth, strict=True)}
            figures["head_memory_ratio"] = growth[1] / growth[0]
    for count in (identities, 10 * identities):
        with child(_serve, Queue("streamed", "float32", slots, batch, embedding, threads), count) as turn:
            turn("step")
            figures[f"seconds_n{count}"] = statistics.median(turn("step")[0] for _ in range(repeats))
    return figures


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
    figures["grouped_over_flat"] = _ratio(rates["grouped"], rates["flat"])
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
    return figures | {"ratio_2d": _ratio(seconds["plain"], seconds["2d"]), "images": images}


def _masked_plainly(face: np.ndarray, points: np.ndarray, texture: np.ndarray) -> np.ndarray:
    """What one writes: a homography to the same six points, brightness matched, alpha blended in float."""
    to_face = cv2.invertAffineTransform(similarity(points, TEMPLATE_SIZE))
    matrix, _ = cv2.findHomography(ANCHORS, TARGETS @ to_face[:, :2].T + to_face[:, 2])
    worn = cv2.warpPerspective(texture, matrix, face.shape[1::-1]).astype(np.float32)
    layer = cv2.GaussianBlur(worn, (5, 5), 0.7)
    alpha, gain = layer[..., 3:] / 255, face.mean() / 115
    return np.clip(face * (1 - alpha) + gain * layer[..., :3], 0, 255).astype(np.uint8)


def bench_schedule(steps: int) -> dict[str, float]:
    """FastFace's time per step in microseconds: both forms, short and long runs, and a window summed anew.

    Returns:
        us_recurrence, us_haar (m = 4000); the same for a tenth of the steps and of m; us_naive: means and halves of
        the last m recomputed each step by NumPy.
    """
    losses = (5 + np.random.default_rng(0).normal(0, 0.5, steps)).tolist()
    m = 4000
    long: dict[str, Recurrence | HaarWindow] = {
        "us_recurrence": Recurrence(FastFace(), 10 * steps, 128),
        "us_haar": HaarWindow(FastFaceHaar(m=m), steps),
    }
    short: dict[str, Recurrence | HaarWindow] = {
        "us_recurrence_tenth": Recurrence(FastFace(), steps, 128),
        "us_haar_tenth": HaarWindow(FastFaceHaar(m=m // 10), steps),
    }
    figures: dict[str, float] = {"steps": steps}
    for name, watching in (long | short).items():
        started = time.perf_counter()
        for loss in losses:
            watching.observe(loss)
        figures[name] = (time.perf_counter() - started) / steps * 1e6
    window, means = np.zeros(m), np.zeros(m)
    started, some = time.perf_counter(), steps // 20
    for loss in losses[:some]:
        window = np.append(window[1:], loss)
        means = np.append(means[1:], window.mean())
        float((means[: m // 2].sum() - means[m // 2 :].sum()) / m)
    figures["us_naive"] = (time.perf_counter() - started) / some * 1e6
    return figures


def _ratio(seconds: list[float], reference: list[float]) -> float:
    """Median over the turns, since a machine's speed drifts between them."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def _measured(
    heads: list[Head], repeats: int, say: Callable[[str], None]
) -> tuple[list[list[float]], list[float], list[float]]:
    """Seconds of every turn, first losses and growth of peak memory; the heads take turns."""
    with _children([(head, head.identities) for head in heads]) as turns:
        first = [turn("step")[1] for turn in turns]  # not timed: pages of weights and momentum are touched
        seconds: list[list[float]] = [[] for _ in heads]
        for repeat in range(repeats):
            for head, turn, times in zip(heads, turns, seconds, strict=True):
                times.append(turn("step")[0])
                say(f"{head.formulation} {head.precision} N={head.identities:,} {repeat + 1}: {times[-1]:.3f} s")
        growth = [peak - base for peak, base in (turn("peak") for turn in turns)]
    return seconds, first, growth


@contextmanager
def _children(problems: list[Any]) -> Iterator[list[Callable[[str], Any]]]:
    if not problems:
        yield []
        return
    with child(_serve, *problems[0]) as turn, _children(problems[1:]) as rest:
        yield [turn, *rest]


@contextmanager
def child(serve: Callable[..., None], *problem: Any) -> Iterator[Callable[[str], Any]]:
    """A process that answers "step" with (seconds, loss) and "peak" with (peak, base) bytes."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, *problem), daemon=True)
    process.start()
    theirs.close()

    def turn(question: str) -> Any:
        ours.send(question)
        return ours.recv()

    try:
        yield turn
    finally:
        ours.close()
        process.join(30)
        process.kill()


def _serve(questions: Connection, problem: Head | Queue, identities: int) -> None:
    if problem.formulation == "plain":  # stock PyTorch, stock allocator
        torch.set_num_threads(problem.threads)
    else:
        use_processor(problem.threads)
    stepper = _head_stepper if isinstance(problem, Head) else _queue_stepper
    small = replace(problem, slots=max(WARM_ROWS, problem.batch)) if isinstance(problem, Queue) else problem
    stepper(small, WARM_ROWS)()
    base = peak_memory(CPU)
    answer(questions, stepper(problem, identities), base)


def answer(questions: Connection, step: Callable[[], float], base: int) -> None:
    """Takes steps and tells of them, until nobody asks any more."""
    while True:
        try:
            question = questions.recv()
        except EOFError:
            return
        if question == "step":
            started = time.perf_counter()
            loss = step()
            questions.send((time.perf_counter() - started, loss))
        else:
            questions.send((peak_memory(CPU), base))


def _head_stepper(head: Any, identities: int) -> Callable[[], float]:
    random = torch.Generator().manual_seed(0)
    x_BD = torch.randn(head.batch, head.embedding, generator=random)
    labels_B = torch.randint(0, identities, (head.batch,), generator=random)
    steppers = {"plain": _plain, "fused": _fused, "products": _products}
    return steppers[head.formulation](x_BD, labels_B, identities, head.precision)


def _plain(x_BD: Tensor, labels_B: Tensor, identities: int, precision: str) -> Callable[[], float]:
    """The reference: what one writes in stock PyTorch."""
    weight = initial_rows(0, identities, x_BD.shape[1], seed=0).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=5e-4, foreach=True)
    faces = torch.arange(len(x_BD))

    def step() -> float:
        x = x_BD.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            cos = F.linear(F.normalize(x), F.normalize(weight))
        cos = cos.float().clamp(-1, 1)
        target = torch.cos(torch.acos(cos[faces, labels_B]) + ARCFACE.m2)
        loss = F.cross_entropy(ARCFACE.scale * cos.index_put((faces, labels_B), target), labels_B)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _fused(x_BD: Tensor, labels_B: Tensor, identities: int, precision: str) -> Callable[[], float]:
    method = BigFace.model_validate({"margin": ARCFACE, "update": "fused", "precision": precision})
    head = ShardedFC(identities, x_BD.shape[1], method, Ranks(), seed=0)
    optimizer = head_optimizer(Config(method=method), method, head)
    assert isinstance(optimizer, RowSGD)

    def step() -> float:
        loss = head(x_BD.clone().requires_grad_(), labels_B, sgd=optimizer.tile_sgd())
        loss.backward()
        return float(loss.detach())

    return step


def _products(x_BD: Tensor, labels_B: Tensor, identities: int, precision: str) -> Callable[[], float]:
    """Only the four matrix products of the streamed form, on operands that are ready for them."""
    dtype = getattr(torch, precision)
    weight_ND, x_BD = initial_rows(0, identities, x_BD.shape[1], seed=0).to(dtype), x_BD.to(dtype)
    if not multiplies_bfloat16(x_BD.device):
        weight_ND, x_BD = weight_ND.float(), x_BD.float()
    size = tile_size(len(x_BD), x_BD.shape[1], x_BD.device)

    def step() -> float:
        total_BD = torch.zeros_like(x_BD)
        for weight_TD in weight_ND.split(size):
            torch.mm(x_BD, weight_TD.T)
        for weight_TD in weight_ND.split(size):
            cos_BT = torch.mm(x_BD, weight_TD.T)
            total_BD.addmm_(cos_BT, weight_TD)
            torch.mm(cos_BT.T, x_BD)
        return 0.0

    return step


def _queue_stepper(problem: Any, identities: int) -> Callable[[], float]:
    random = torch.Generator().manual_seed(0)
    x_BD = torch.randn(problem.batch, problem.embedding, generator=random)
    centres_BD = F.normalize(x_BD + torch.randn(x_BD.shape, generator=random))
    labels_B = torch.randint(0, identities, (problem.batch,), generator=random)
    softmax = Softmax(ARCFACE, precision=getattr(torch, problem.precision))
    queue = ClassQueue(problem.slots, problem.embedding, softmax, seed=0)
    queue.labels_S.copy_(torch.randint(0, identities, queue.labels_S.shape, generator=random))
    if problem.formulation == "plain":
        return _plain_queue(x_BD, centres_BD, labels_B, queue)

    def step() -> float:
        loss = queue(x_BD.clone().requires_grad_(), centres_BD, labels_B)
        loss.backward()
        queue.put(centres_BD, labels_B, 0)
        return float(loss.detach())

    return step


def _plain_queue(x_BD: Tensor, centres_BD: Tensor, labels_B: Tensor, queue: ClassQueue) -> Callable[[], float]:
    """The reference: the usual formulation."""
    centres_SD, labels_S = queue.centres_SD, queue.labels_S
    zeros = torch.zeros(len(x_BD), dtype=torch.int64)

    def step() -> float:
        unit = F.normalize(x_BD.clone().requires_grad_()).to(centres_SD.dtype)
        own = (unit * centres_BD.to(unit.dtype)).sum(1, keepdim=True)
        others = unit @ centres_SD.clone().detach().T
        others = others.masked_fill(labels_B[:, None] == labels_S[None], -torch.inf)
        own = torch.cos(torch.acos(own.float().clamp(-1, 1)) + ARCFACE.m2)
        logits = ARCFACE.scale * torch.cat([own, others.float().clamp(max=1)], 1)
        loss = F.cross_entropy(logits, zeros)
        loss.backward()
        centres_SD[: len(x_BD)] = centres_BD
        labels_S[: len(x_BD)] = labels_B
        return float(loss.detach())

    return step
