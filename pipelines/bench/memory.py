"""``bigface bench memory``: a training step's peak memory and time under each switch that trades one for the other.

Each setting has its own processes, one for each rank, because peak memory is a high-water mark.
"""

import statistics
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from fr_core.config import Config
from fr_core.config.recipes import load_config
from fr_core.data.schema import SCHEMA_VERSION, Dataset, Manifest, Shard
from fr_core.data.stream import Batch, make_plan
from fr_core.device import multiplies_bfloat16, peak_memory, use_processor
from fr_core.ranks import Ranks
from fr_core.train.initial import initial_state
from fr_core.train.loop import step
from fr_core.train.state import TrainState
from pipelines.bench.turns import CPU, answer, child


@dataclass(frozen=True)
class Setting:
    """Switches that are on, and the number of ranks."""

    name: str
    overrides: tuple[str, ...] = ()
    ranks: int = 1


def settings(batch: int) -> list[Setting]:
    """Return the settings for this processor; bfloat16 is among them only where it is native."""
    recompute, fused, shard_state = "train.recompute=true", "method.update=fused", "optim.shard_state=true"
    bfloat16 = [Setting("bfloat16", ("train.precision=bfloat16",))]
    return [
        Setting("plain"),
        Setting("recompute", (recompute,)),
        Setting("accumulate", ("train.accumulate=4",)),
        Setting("ghost batch", (f"train.ghost_batch={batch // 4}",)),
        Setting("fused head", (fused,)),
        *(bfloat16 if multiplies_bfloat16(CPU) else []),
        Setting("recompute, fused head", (recompute, fused)),
        Setting("two ranks", (), 2),
        Setting("two ranks, shard state", (shard_state,), 2),
        Setting("two ranks, bfloat16 gradients", ("train.compress_gradients=bfloat16",), 2),
        Setting("two ranks, all", (recompute, fused, shard_state), 2),
    ]


def bench_memory(
    depth: int,
    width: int,
    size: int,
    batch: int,
    identities: int,
    repeats: int,
    threads: int,
    say: Callable[[str], None],
) -> tuple[list[tuple[str, ...]], dict[str, float]]:
    """Train an IR-ResNet with a class matrix on random images, one setting after the other.

    Args:
        batch: global batch, a multiple of 4.
        threads: threads of all ranks together.
        say: function that shows a line of progress.

    Returns:
        A table with the header first, and figures. For each setting these are rank 0's peak in MiB above the bare
        process, and the median seconds of a step.
    """
    common = [f"net.depth={depth}", f"net.width={width}", f"net.input_size={size}", f"train.global_batch={batch}"]
    figures: dict[str, float] = {"depth": depth, "width": width, "size": size, "batch": batch, "identities": identities}
    table: list[tuple[str, ...]] = [("setting", "peak MiB", "of plain", "seconds a step", "of plain")]
    for setting in settings(batch):
        config = load_config("bigface_r100", ["train.precision=float32", *common, *setting.overrides])
        peak, seconds = measured(config, setting.ranks, identities, repeats, max(1, threads // setting.ranks))
        say(f"{setting.name}: {peak:,.0f} MiB, {seconds:.2f} s")
        name = setting.name.replace(",", "").replace(" ", "_")
        figures |= {f"{name}_mib": peak, f"{name}_seconds": seconds}
        ratios = peak / figures["plain_mib"], seconds / figures["plain_seconds"]
        table.append((setting.name, f"{peak:,.0f}", f"{ratios[0]:.2f}", f"{seconds:.2f}", f"{ratios[1]:.2f}"))
    return table, figures


def measured(config: Config, size: int, identities: int, repeats: int, threads: int) -> tuple[float, float]:
    """Return rank 0's peak memory in MiB above the bare process, and its median seconds of a step."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        ranks = [Ranks(rank, size) for rank in range(size)]
        turns = [stack.enter_context(child(serve, config, r, identities, threads, folder)) for r in ranks]
        pool = stack.enter_context(ThreadPoolExecutor(size))

        def ask(question: str) -> tuple[float, float]:
            answers = list(pool.map(lambda turn: turn(question), turns))
            return answers[0]

        ask("step")  # not timed: it touches the pages of weights and momentum
        seconds = statistics.median(ask("step")[0] for _ in range(repeats))
        peak, base = ask("peak")
    return (peak - base) / 2**20, seconds


def serve(questions: Connection, config: Config, ranks: Ranks, identities: int, threads: int, folder: str) -> None:
    """Answer questions as one rank; ``folder`` is where the ranks meet."""
    use_processor(threads)
    warnings.simplefilter("ignore", FutureWarning)  # PyTorch warns that collectives will be renamed
    if ranks.size > 1:
        dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=ranks.rank, world_size=ranks.size)
    small = {"depth": 10, "width": 8, "input_size": 32}
    stepper(config.model_copy(update={"net": config.net.model_copy(update=small)}), ranks, 1000)()
    base = peak_memory(CPU)
    answer(questions, stepper(config, ranks, identities), base)


def stepper(config: Config, ranks: Ranks, identities: int) -> Callable[[], float]:
    """Return a function that takes a training step, on the same random images each time, and returns the loss."""
    state, batch = made_up(config, ranks, identities)
    return lambda: step(config, state, batch, ranks).metrics["loss"]


def made_up(config: Config, ranks: Ranks, identities: int, root: Path = Path()) -> tuple[TrainState, Batch]:
    """Return the state of a run on a dataset that nobody made, and a batch of random images.

    Args:
        root: folder of the dataset; saving needs its ``identities.parquet``.
    """
    images, side = config.train.global_batch, config.net.input_size
    shard = Shard(file="", row_groups=(images,), images=images, bytes=0, sha256="")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        layout="flat",
        image_size=side,
        identities=identities,
        images=images,
        shards=(shard,),
        source="",
        rejects={},
        warnings={},
    )
    state = initial_state(config, make_plan(config, Dataset(root, manifest)), ranks, CPU)
    random, share = torch.Generator().manual_seed(ranks.rank), images // ranks.size
    pixels_BHWC = torch.randint(0, 256, (share, side, side, 3), generator=random, dtype=torch.uint8)
    labels_B = torch.randint(0, identities, (share,), generator=random)
    return state, Batch(0, np.arange(share), labels_B, pixels_BHWC, pixels_BHWC[:, None, :0])
