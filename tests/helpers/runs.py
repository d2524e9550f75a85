"""Short runs without Ray, and what they leave."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fr_core.train.loop as loop
from fr_core.config.recipes import load_config
from fr_core.data.schema import open_dataset
from fr_core.data.stream import batches, blocks_in_process, make_plan
from fr_core.nets import iresnet
from fr_core.nets.checkpoint_files import checkpoints
from fr_core.ranks import Ranks
from fr_core.train.initial import initial_state
from fr_core.train.metrics import read_metrics


def config_of(dataset, *overrides):
    base = [f"data.path={dataset}", "tracking.uri=off", "data.lanes=8"]
    return load_config("debug_bigface", [*base, *overrides])


def run(config, out, ranks=None):
    torch.set_num_threads(1)
    return loop.train_loop(config, Path(out), ranks or Ranks(), blocks_in_process, lambda metrics, saved: None)


def losses(out):
    return [row["loss"] for row in read_metrics(Path(out))]


def last_weights(out):
    """The whole model of a run's newest checkpoint, the class matrix put together again."""
    folder = checkpoints(Path(out))[-1]
    head = torch.cat([load_file(path)["weight"] for path in sorted(folder.glob("head_*"))])
    return load_file(folder / "backbone.safetensors") | {"head": head}


def rank_run(ranks, config, out):
    run(config, out, ranks)


def smooth_run(ranks, config, out):
    """A run without PReLU's kink, across which rounding would flip a whole slope and be amplified from step to step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iresnet, "PReLU", lambda channels: torch.nn.SiLU())
        run(config, out, ranks)


def state_and_batches(config, ranks=None):
    ranks = ranks or Ranks()
    plan = make_plan(config, open_dataset(config.data.path))
    state = initial_state(config, plan, ranks, torch.device("cpu"))
    return state, batches(config, plan, ranks, 0, state.total_steps, blocks_in_process)


def interrupted(config, out, at, monkeypatch, ranks=None):
    """Runs until just after step ``at``, then dies without saving."""

    def dying(config, state, batch, ranks, step=loop.step):
        if state.step == at:
            raise KeyboardInterrupt
        return step(config, state, batch, ranks)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "step", dying)
        with pytest.raises(KeyboardInterrupt):
            run(config, out, ranks)
