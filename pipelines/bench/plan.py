"""``bigface bench plan``: how far the predicted time of a step is from the measured one, on this machine's processors.

A few small operators are timed first. They take the place of a card's data sheet (docs/cards.md). What is computed is
measured in processor time of its thread, so that other programs on the machine disturb it little.
"""

import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fr_core.config import Config
from fr_core.config.recipes import load_config
from fr_core.data.schema import open_dataset
from fr_core.data.stream import Batch, make_plan
from fr_core.device import use_processor
from fr_core.heads.class_queue import ClassQueue
from fr_core.heads.sharded_fc import ShardedFC
from fr_core.nets.backbone import normalised
from fr_core.ranks import Ranks
from fr_core.train.initial import initial_state
from fr_core.train.methods import step
from fr_core.train.methods.bigface import tile_sgd
from fr_core.train.state import TrainState
from fr_core.train.traffic import Exchange, exchanges, gradient_bytes
from fr_core.train.update import begin_step, encode_class_images, update
from pipelines.bench.manifest import write_simulated
from pipelines.bench.turns import CPU
from pipelines.experiments.cards import Rates
from pipelines.experiments.step_time import Parts, step_parts

BATCH = 64
COMMON = ["data.lanes=4", "train.precision=float32", f"train.global_batch={BATCH}", "tracking.uri=off"]
NET = "net={kind='iresnet', depth=18, width=32, input_size=64, embedding=256, stem_stride=2}"
CASES = {
    "plain head": ("bigface_r50", [NET]),
    "fused head": ("bigface_r50", [NET, "method.update=fused"]),
    "AttFC": ("attfc_r50", [NET, "method.precision=float32"]),
}
IDENTITIES, IMAGES = 20_000, 80_000
CONVOLUTIONS = ((32, 32, 1), (64, 16, 2), (128, 8, 1), (256, 4, 2))  # channels, side and stride of layers to time
LAUNCHES = 100  # tiny operators whose mean time is that of a launch
TIMES = 5  # runs of an operator in a calibration, whose median counts
Seconds = dict[str, float]
T = TypeVar("T")


def bench_plan(repeats: int, ranks: list[int], say: Callable[[str], None]) -> tuple[list[tuple[str, ...]], Seconds]:
    """Predict and measure a training step, for three heads and some numbers of gloo ranks.

    All ranks calibrate and measure at the same time, so that they share caches and memory as in training. Parts are
    measured one by one, and then the whole step. Only the collectives are measured in time that passes.

    Args:
        repeats: calibrations, each followed by a measurement; figures are medians.
        ranks: numbers of ranks.
        say: function that shows a line of progress.

    Returns:
        A table with the header first, and figures. For each case, number of ranks W and part: ``ms_CASE_wW_PART`` is
        measured, and ``ratio_CASE_wW_PART`` is the prediction over it.
    """
    table: list[tuple[str, ...]] = [("head", "ranks", "part", "measured ms", "predicted / measured")]
    figures: Seconds = {"identities": IDENTITIES}
    for case in CASES:
        for size in ranks:
            found = measured(case, size, repeats)
            for part, pairs in found.items():
                milliseconds = 1e3 * statistics.median(seconds for seconds, _ in pairs)
                share = statistics.median(predicted / seconds for seconds, predicted in pairs)
                name = f"{case}_w{size}_{part}".replace(" ", "_")
                figures |= {f"ms_{name}": milliseconds, f"ratio_{name}": share}
                table.append((case, str(size), part, f"{milliseconds:.1f}", f"{share:.2f}"))
                say(f"{case}, {size} ranks, {part}: {milliseconds:.1f} ms, predicted / measured {share:.2f}")
    return table, figures


def measured(case: str, size: int, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Return rank 0's seconds of each part, measured and predicted, in each repeat."""
    recipe, overrides = CASES[case]
    with TemporaryDirectory(prefix="bigface-") as folder:
        layout = load_config(recipe).method.facts.layout
        write_simulated(Path(folder), layout, IMAGES, IDENTITIES, 1)
        given = recipe, [f"data.path={folder}", *COMMON, *overrides], size, folder, repeats
        with ProcessPoolExecutor(size, get_context("spawn")) as pool:
            return next(iter(pool.map(as_rank, range(size), *([value] * size for value in given))))


def as_rank(
    rank: int, recipe: str, overrides: list[str], size: int, folder: str, repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Calibrate and measure as one rank; ``folder`` is where the ranks meet."""
    use_processor(1)
    warnings.simplefilter("ignore", FutureWarning)  # PyTorch warns that collectives will be renamed
    ranks, config = Ranks(rank, size), load_config(recipe, overrides)
    if size > 1:
        dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=size)
    state = initial_state(config, make_plan(config, open_dataset(folder)), ranks, CPU)
    batch = random_batch(config, ranks)
    run_parts(config, state, batch, ranks)  # touches all pages
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(repeats):
        rates = calibrated(ranks)
        predicted = in_groups(step_parts(config, IDENTITIES, ranks, ("float32", "float32"), rates, CPU))
        for part, seconds in run_parts(config, state, batch, ranks).items():
            found[part].append((seconds, predicted[part]))
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()
    return dict(found)


def in_groups(parts: Parts) -> Seconds:
    """Return predicted seconds by the names of the measured parts; those of a step are without its collectives."""
    found: Seconds = defaultdict(float)
    for name, part in parts.items():
        found["collectives" if ": " in name else name] += part.seconds
    return found | {"step": sum(part.seconds for name, part in parts.items() if ": " not in name)}


def random_batch(config: Config, ranks: Ranks) -> Batch:
    """Return a rank's batch of random images."""
    random, side = torch.Generator().manual_seed(ranks.rank), config.net.input_size
    own, more = config.train.global_batch // ranks.size, config.method.facts.class_images
    pixels = torch.randint(0, 256, (own, 1 + more, side, side, 3), generator=random, dtype=torch.uint8)
    labels_B = torch.randint(0, IDENTITIES, (own,), generator=random)
    return Batch(0, np.arange(own), labels_B, pixels[:, 0].contiguous(), pixels[:, 1:].contiguous())


def run_parts(config: Config, state: TrainState, batch: Batch, ranks: Ranks) -> Seconds:
    """Return the seconds of each part of a step by itself, and of a whole step."""
    found: Seconds = {}

    def timed(name: str, work: Callable[[], T], clock: Callable[[], float] = time.thread_time) -> T:
        if ranks.size > 1:
            dist.barrier()
        began = clock()
        out = work()
        found[name] = clock() - began
        return out

    begin_step(config, state)
    images = normalised(batch.images_BHWC, state.backbone)
    out = timed("backbone forward", lambda: state.backbone(images))
    timed("backbone backward", lambda: out.backward(torch.randn_like(out)))
    if state.encoder:
        timed("encoder", lambda: encode_class_images(config, state, batch.class_images_BKHWC))
    timed("head", head_pass(config, state, ranks))
    timed("update", lambda: update(config, state, torch.ones(()), ranks))
    if ranks.size > 1:
        timed("collectives", lambda: exchange_all(config, ranks), time.perf_counter)
    timed("step", lambda: step(config, state, batch, ranks))
    return found


def head_pass(config: Config, state: TrainState, ranks: Ranks) -> Callable[[], None]:
    """Return both passes of the head on random faces."""
    head, batch, method = state.head, config.train.global_batch, config.method.class_matrix
    own = batch if isinstance(head, ShardedFC) else batch // ranks.size
    x = torch.randn(own, config.net.embedding, requires_grad=True)
    labels = torch.arange(own) * (IDENTITIES // own)

    def passes() -> None:
        if isinstance(head, ShardedFC):
            fused = method is not None and method.update == "fused"
            head(x, labels, None, tile_sgd(state) if fused else None).backward()
        elif isinstance(head, ClassQueue):
            head(x, F.normalize(x.detach()), labels).backward()

    return passes


def exchange_all(config: Config, ranks: Ranks) -> None:
    """Run the collectives of a step, the gradients' sum included, on numbers that nobody needs."""
    gradients = Exchange("gradients", "all_reduce", gradient_bytes(config))
    for exchange in (*exchanges(config, ranks), gradients):
        given = torch.zeros(exchange.bytes // 4)
        for _ in range(exchange.times):
            match exchange.collective:
                case "all_gather":
                    dist.all_gather_into_tensor(given.new_empty(ranks.size * len(given)), given)
                case "reduce_scatter":
                    dist.reduce_scatter_tensor(given.new_empty(len(given) // ranks.size), given)
                case "all_reduce":
                    dist.all_reduce(given)


def calibrated(ranks: Ranks) -> Rates:
    """Return the speeds of this processor, measured on a few operators while all ranks measure."""
    if ranks.size > 1:
        dist.barrier()
    faces, rows, logits = torch.randn(64, 256), torch.randn(2048, 256), torch.randn(64, 2048)

    def products() -> None:  # of a head: logits, and the gradients of faces and rows
        torch.mm(faces, rows.T)
        torch.mm(logits, rows)
        torch.mm(logits.T, faces)

    product = 3 * 2 * 64 * 256 * 2048 / median_seconds(products)
    own, flops, taken = BATCH // ranks.size, 0.0, 0.0
    for channels, side, stride in CONVOLUTIONS:
        conv, x = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False), maps_of(own, channels, side)
        conv = conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # no stub has it
        flops += 3 * 2 * 9 * channels * x.numel() / stride**2
        taken += median_seconds(partial(both_passes, conv, x))
    norm, x = nn.BatchNorm2d(32), maps_of(own, 32, 32)
    maps = 8 * x.nbytes / median_seconds(partial(both_passes, norm, x))  # 3 accesses there, 5 back
    weights = torch.randn(3, 2**23)  # 96 MiB, more than a cache holds
    swept = 3 * weights[0].nbytes / median_seconds(lambda: torch.add(weights[0], weights[1], out=weights[2]))

    def epilogue() -> None:
        logits.mul_(1.0)
        logits.amax(1)
        logits.sub_(1.0).clamp_(-10, 0).exp_().sum(1)

    tile = 10 * logits.nbytes / median_seconds(epilogue)
    sweep = {"maps": maps, "weights": swept, "logits": tile}
    number = torch.zeros(1)

    def launches() -> None:
        for _ in range(LAUNCHES):
            number.add_(1)

    launch = median_seconds(launches) / LAUNCHES
    ring, hop = 1.0, 0.0
    if ranks.size > 1:
        large, small = torch.zeros(2**20), torch.zeros(8)
        hop = median_seconds(lambda: dist.all_reduce(small), time.perf_counter) / np.log2(ranks.size)
        whole = median_seconds(lambda: dist.all_reduce(large), time.perf_counter)
        share = 2 * (ranks.size - 1) / ranks.size
        ring = share * large.nbytes / max(1e-9, whole - hop * np.log2(ranks.size))
    return Rates({"float32": flops / taken}, {"float32": product}, sweep, launch, ring, hop, overlaps=False)


def maps_of(images: int, channels: int, side: int) -> Tensor:
    """Return random feature maps, channels-last."""
    return torch.randn(images, channels, side, side).to(memory_format=torch.channels_last).requires_grad_()


def both_passes(layer: nn.Module, x: Tensor) -> None:
    """Run a layer forward and backward."""
    out = layer(x)
    out.backward(out.detach())


def median_seconds(work: Callable[[], object], clock: Callable[[], float] = time.thread_time) -> float:
    """Return the median seconds of a few runs, by default in processor time."""
    seconds = []
    for _ in range(TIMES + 1):
        began = clock()
        work()
        seconds.append(clock() - began)
    return statistics.median(seconds[1:])
