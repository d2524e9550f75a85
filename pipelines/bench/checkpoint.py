"""``bigface bench checkpoint``: how long a checkpoint keeps the training waiting, written beside it and not."""

import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fr_core.config.recipes import load_config
from fr_core.device import use_processor
from fr_core.nets.checkpoint_files import IDENTITIES
from fr_core.ranks import Ranks
from fr_core.train.loop import step
from fr_core.train.save import Saver
from pipelines.bench.memory import made_up
from pipelines.bench.turns import ratio


def bench_checkpoint(
    identities: int, folder: Path, repeats: int, threads: int, say: Callable[[str], None]
) -> dict[str, float]:
    """Save a small net with a large class matrix and its momentum, in this process, by both ways in turn.

    Args:
        folder: scratch folder for one checkpoint at a time.
        threads: threads of PyTorch.
        say: function that shows a line of progress.

    Returns:
        ``gib``: size of a checkpoint. ``WAY_blocked_s_per_gib``: seconds in which no step is taken, for WAY beside and
        at_once. ``beside_whole_s_per_gib``: seconds until the checkpoint is whole. ``blocked_ratio``: blocked beside
        over blocked at once. ``step_ratio``: a step's time while a checkpoint is written over its time alone.
    """
    use_processor(threads)
    common = ["net.depth=10", "net.width=8", "net.input_size=32", "train.global_batch=8", "train.keep=1"]
    config = load_config("bigface_r50", common)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / IDENTITIES).write_bytes(b"names")
    state, batch = made_up(config, Ranks(), identities, folder)
    step(config, state, batch, Ranks())  # makes the momentum

    def timed(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    found: dict[str, list[float]] = {name: [] for name in ("beside", "at_once", "whole", "step_beside", "step_alone")}
    for repeat in range(repeats):
        for way in ("beside", "at_once"):
            train = config.train.model_copy(update={"save_beside": way == "beside"})
            saver = Saver(config.model_copy(update={"train": train}), folder / "run", Ranks())
            begun = time.perf_counter()
            found[way].append(timed(partial(saver.save, state, lambda: None, lambda _: None)))
            if way == "beside":
                found["step_beside"].append(timed(lambda: step(config, state, batch, Ranks())))
                saver.wait()
                found["whole"].append(time.perf_counter() - begun)
                found["step_alone"].append(timed(lambda: step(config, state, batch, Ranks())))
            saver.close()
        say(f"checkpoint {repeat + 1}: {found['beside'][-1]:.2f} s beside, {found['at_once'][-1]:.2f} s at once")
    gib = sum(file.stat().st_size for file in (folder / "run").rglob("*.safetensors")) / 2**30
    shutil.rmtree(folder / "run")
    (folder / IDENTITIES).unlink()
    return {
        "gib": gib,
        "beside_blocked_s_per_gib": statistics.median(found["beside"]) / gib,
        "at_once_blocked_s_per_gib": statistics.median(found["at_once"]) / gib,
        "beside_whole_s_per_gib": statistics.median(found["whole"]) / gib,
        "blocked_ratio": ratio(found["beside"], found["at_once"]),
        "step_ratio": ratio(found["step_beside"], found["step_alone"]),
    }
