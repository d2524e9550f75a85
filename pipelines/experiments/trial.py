"""One trial of a search: what its process runs, alone or with Ray Train's workers, and whom it waits for."""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from fr_core.config import Config, total_steps
from fr_core.config.nets import QuantisedNet
from fr_core.config.recipes import parse_config
from fr_core.data.store import AnyPath, to_path, write_text_atomically
from fr_core.errors import StorageError, UserError
from fr_core.train.checkpoint import adopt_checkpoint
from pipelines.gauges import Gauges
from pipelines.logs import log_event, start_logging
from tune_spaces.fields import Knob, with_values

if TYPE_CHECKING:
    from ray.train import Checkpoint
    from ray.train.v2._internal.execution.context import TrainRunContext

MISTAKE = "mistake.txt"  # in a trial's folder: the user's, which another life would only repeat
TURN = 2.0  # seconds between looks for a free turn


class Launch(TypedDict):
    """What all trials of a search have in common."""

    config: dict[str, Any]  # in JSON
    knobs: Sequence[Knob]
    trials: str  # the folder of their runs
    steps_per_epoch: int
    workers: int
    in_process: bool
    pbt: bool
    judged: bool  # by a scheduler
    cpus: float  # of each worker
    at_once: int  # trials
    objectives: list[str]


def run_trial(values: dict[str, float], launch: Launch) -> None:
    """What a trial's process runs: the recipe with its values, from its newest checkpoint or the one given."""
    from ray import tune as ray_tune

    name = ray_tune.get_context().get_trial_name()
    out = to_path(launch["trials"]) / name
    start_logging("json", run=name)
    config = with_values(parse_config(launch["config"], "launch"), launch["knobs"], values)
    total = total_steps(config, launch["steps_per_epoch"])
    if (out / MISTAKE).is_file():
        raise UserError((out / MISTAKE).read_text())
    given = ray_tune.get_checkpoint()
    if given:
        run = out / "run.json"
        with given.as_directory() as folder:
            adopt_checkpoint(Path(folder), out, json.loads(run.read_text())["run_id"] if run.is_file() else None)
    try:
        if launch["in_process"]:
            figures = train_here(config, out, launch, total)
        else:
            with turn(launch["trials"], launch["at_once"]):
                figures = train_in_trial(config, out, launch, total)
        if isinstance(config.net, QuantisedNet):
            figures["nominal_mib"] = figures["backbone_parameters"] * config.net.weights / 8 / 2**20
        for name in launch["objectives"]:
            if name not in figures:
                raise UserError(f"the run ended without {name}")
    except StorageError:  # may have passed in the next life
        raise
    except UserError as error:
        out.mkdir(parents=True, exist_ok=True)
        write_text_atomically(out / MISTAKE, str(error))
        raise
    ray_tune.report({**figures, "step": total, "done": True})  # done: no scheduler puts it off once more


def judged(metrics: dict[str, float], launch: Launch, total: int) -> bool:
    """Whether a scheduler hears of it: not of the last step, whose report is the whole run's, nor of a checkpoint
    without figures, as one for a drained node.
    """
    return launch["judged"] and metrics["step"] < total and all(name in metrics for name in launch["objectives"])


def train_here(config: Config, out: AnyPath, launch: Launch, total: int) -> dict[str, float]:
    """By this process alone."""
    from ray import tune as ray_tune

    from fr_core.data.stream import blocks_in_process
    from fr_core.device import use_processor
    from fr_core.ranks import Ranks
    from fr_core.train.loop import train_loop
    from pipelines.on_ray import threads_of_each

    use_processor(threads_of_each(launch["at_once"]))
    gauges = Gauges(out.name, 0)

    def report(metrics: dict[str, float], saved: AnyPath | None) -> None:
        gauges.set(metrics)
        log_event(metrics, saved)
        if saved is not None and judged(metrics, launch, total):
            copy = ray_tune.Checkpoint.from_directory(str(saved)) if launch["pbt"] else None
            ray_tune.report(metrics, checkpoint=copy)

    return train_loop(config, out, Ranks(), blocks_in_process, report)


def train_in_trial(config: Config, out: AnyPath, launch: Launch, total: int) -> dict[str, float]:
    """By Ray Train's workers, whose reports Ray Tune hears."""
    from ray.tune.integration.ray_train import TuneReportCallback

    from pipelines.on_ray import train_on_ray

    class ToTune(TuneReportCallback):
        def after_report(
            self, run_context: "TrainRunContext", metrics: list[dict[str, float]], checkpoint: "Checkpoint | None"
        ) -> None:
            if judged(metrics[0], launch, total):
                super().after_report(run_context, metrics, checkpoint)

    return train_on_ray(config, out, launch["workers"], launch["cpus"], [ToTune()], launch["at_once"])


@contextmanager
def turn(search: str, at_once: int) -> Iterator[None]:
    """Waits until fewer than ``at_once`` trials of a search train, and is one of them in the block.

    A trial's driver holds next to no CPU, and those that Tune starts again after they failed pass no limit of its: too
    many of them would leave no CPU to anyone's workers. A turn is an actor of a fixed name, which ends with its owner.
    """
    import ray

    holder: Any = ray.remote(num_cpus=0)(type("Turn", (), {}))
    names = itertools.cycle(f"turn {number} of {search}" for number in range(at_once))
    for tried, name in enumerate(names, 1):
        with suppress(ValueError):  # the name is taken
            actor = holder.options(name=name).remote()
            break
        if tried % at_once == 0:
            time.sleep(TURN)
    try:
        yield
    finally:
        ray.kill(actor)
