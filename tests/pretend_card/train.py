"""Runs the real train loop on the pretend card, and counts a step that is neither logged nor saved."""

import itertools
import shutil
import time
import traceback
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.torch import save_file

import fr_core.train.loop as loop
from fr_core.config import Config
from fr_core.config.recipes import load_config
from fr_core.data.schema import open_dataset
from fr_core.data.stream import Batch, blocks_in_process
from fr_core.errors import RunStopped
from fr_core.nets.checkpoint_files import checkpoints
from fr_core.nets.iresnet import IResNet
from fr_core.ranks import Ranks
from fr_core.train.notice import Notice
from fr_core.train.reading import Reading
from fr_core.train.state import TrainState
from tests.helpers.datasets import write_dataset
from tests.helpers.embeddings import embedded
from tests.pretend_card.card import PretendCard
from tests.pretend_card.cases import overrides_of, recipe_of
from tests.pretend_card.counts import PROJECT

LOSS_SCALE = 256.0  # float16 does not overflow at it, so that the counted step is a good one
STEPS, ASKED_IN, STOPPED_AFTER = 6, 2, 3  # steps of a run; a stop is asked for in a step, and obeyed after the next
COUNTED = 5  # the step that is counted
CLIP = "optim.clip=0.001"  # below every gradient, so that each step clips
LENGTH = [f"train.max_steps={STEPS}", "train.log_every=2", "train.save_every=2", "train.verify_every=2"]
PAIRS = 8


def write_files(folder: Path) -> None:
    """Write what the cases read: datasets, pairs of images, a teacher, and a teacher's embeddings."""
    write_dataset(folder / "flat", 200, 40)
    write_dataset(folder / "grouped", 200, 40, layout="grouped", chunk=6)
    for i, image in enumerate(np.random.default_rng(0).integers(0, 255, (PAIRS, 32, 32, 3), dtype=np.uint8)):
        cv2.imwrite(str(folder / f"{i}.png"), image)
    rows = [f"{i}.png,{(i + 1 + i % 3) % PAIRS}.png,{i % 2}" for i in range(PAIRS)]
    (folder / "pairs.csv").write_text("\n".join(["image_a,image_b,same", *rows, ""]))
    torch.manual_seed(0)
    save_file(IResNet(10, 8, 1, 32, 32).state_dict(), folder / "teacher.safetensors")
    embedded(folder / "embeddings", open_dataset(folder / "flat"), dimensions=32)


def config_of(case: str, folder: Path) -> Config:
    """Return the config of a case; its precision is that of the recipes for cards, unless the case says another."""
    pairs = [f"verify.images={folder}", f"verify.pairs={folder / 'pairs.csv'}"]
    given = [
        "tracking.uri=off",
        "train.precision=auto",
        "train.compile=off",
        CLIP,
        *LENGTH,
        *pairs,
        *overrides_of(case, str(folder)),
    ]
    return load_config(f"debug_{recipe_of(case)}", given)


class Counting:
    """Takes the place of the loop's step, and keeps the counts from the start of one step to the start of the next."""

    def __init__(self, card: PretendCard) -> None:
        self.card, self.step = card, loop.step
        self.found: dict[str, Any] = {}
        self.devices: set[str] = set()

    def __call__(self, config: Config, state: TrainState, batch: Batch, ranks: Ranks) -> Reading:
        """Train on one batch."""
        if state.step == COUNTED - 1:
            self.card.counts.clear()
        elif state.step == COUNTED:
            self.found = self.card.counts.as_json()
        self.devices.add(str(state.device))
        state.loss_scale = min(state.loss_scale, LOSS_SCALE)
        return self.step(config, state, batch, ranks)


def train(case: str, folder: Path, card: PretendCard) -> dict[str, Any]:
    """Train a case on the card: stop it after a step, resume it, and verify it on the way and at its end.

    Returns:
        The report's figures, the counts, the step of the stop, the checkpoints, the devices, and the seconds of CPU
        time. ``refused`` is the error that ended the run, with its line, or None.
    """
    out, before = folder / "run", time.process_time()
    loop.step = counting = Counting(card)
    result: dict[str, Any] = {"refused": None}
    try:
        with card:
            config = config_of(case, folder)
            result["stopped_at"] = stopped_run(config, out)
            result["figures"] = loop.train_loop(config, out, Ranks(), blocks_in_process, lambda metrics, saved: None)
    except Exception as error:
        result["refused"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]} at {line_of(error)}"
    finally:
        loop.step = counting.step
        result["saved"] = [path.name for path in checkpoints(out)]
        shutil.rmtree(out, ignore_errors=True)
    return result | counting.found | {"devices": sorted(counting.devices), "seconds": time.process_time() - before}


def stopped_run(config: Config, out: Path) -> int:
    """Train until a stop is asked for, and return the step that was saved then."""
    steps = itertools.count(1)
    try:
        loop.train_loop(
            config,
            out,
            Ranks(),
            blocks_in_process,
            lambda metrics, saved: None,
            lambda: Notice.STOP if next(steps) == ASKED_IN else Notice.NONE,
        )
    except RunStopped as stopped:
        return stopped.step
    raise AssertionError("the run did not stop")


def line_of(error: BaseException) -> str:
    """Return the innermost line of the project that raised an error."""
    lines = [
        f"{Path(frame.filename).relative_to(PROJECT)}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(str(PROJECT / "fr_core"))
    ]
    return lines[-1] if lines else "no line of the project"
