"""One trial of a search: its process trains alone or with Ray Train's workers, and waits for its turn."""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypedDict

from fr_core.config import Config, total_steps
from fr_core.config.nets import QuantisedNet
from fr_core.config.recipes import parse_config
from fr_core.data.store import AnyPath, to_path, write_text_atomically
from fr_core.errors import StorageError, UserError
from fr_core.train.resume import adopt_checkpoint
from pipelines.datasets.split import Fold
from pipelines.experiments.search import FOLD
from pipelines.gauges import Gauges
from pipelines.logs import log_event, start_logging
from pipelines.origin import write_origin
from tune_spaces.fields import Knob, with_values

if TYPE_CHECKING:
    from ray.train import Checkpoint
    from ray.train.v2._internal.execution.context import TrainRunContext

MISTAKE = "mistake.txt"  # file in a trial's folder: a user error, which a restart would repeat
TURN = 2.0  # seconds between looks for a free turn


class Launch(TypedDict):
    """Settings that all trials of a search share."""

    config: dict[str, Any]  # the recipe as JSON
    origin: dict[str, str]  # how the search was started
    knobs: Sequence[Knob]
    trials: str  # folder of the trials' runs
    steps_per_epoch: int
    workers: int
    in_process: bool
    pbt: bool
    judged: bool  # a scheduler may stop trials
    each: dict[str, float]  # resources that a worker reserves
    at_once: int  # trials that run at once
    objectives: list[str]
    folds: list[Fold]  # a trial trains once for each; empty: once, on the recipe's data


def run_trial(values: dict[str, float], launch: Launch) -> None:
    """Train the recipe with a trial's values; every trial's process runs this.

    With folds, a trial trains once for each, and its figures are means. After each fold, the scheduler may stop it.

    A trial continues from its newest checkpoint, or from the checkpoint that Ray Tune hands it (population-based
    training).

    Raises:
        UserError: the train loop raised it, or the run has no figure for an objective.
    """
    from ray import tune as ray_tune

    name = ray_tune.get_context().get_trial_name()
    out = to_path(launch["trials"]) / name
    start_logging("json", run=name)
    config = with_values(parse_config(launch["config"], "launch"), launch["knobs"], values)
    total = total_steps(config, launch["steps_per_epoch"])
    if (out / MISTAKE).is_file():
        raise UserError((out / MISTAKE).read_text())
    if donated := ray_tune.get_checkpoint():
        run = out / "run.json"
        run_id = json.loads(run.read_text())["run_id"] if run.is_file() else None
        with donated.as_directory() as folder:
            adopt_checkpoint(Path(folder), out, run_id)
    try:
        runs = [(fold.of(config), out.with_name(f"{name}{FOLD}{n}")) for n, fold in enumerate(launch["folds"])]
        found: list[dict[str, float]] = []
        inside: Launch = {**launch, "judged": launch["judged"] and not runs}  # of folds, the scheduler hears the means
        for run_config, run_out in runs or [(config, out)]:
            write_origin(launch["origin"], run_out)
            if launch["in_process"]:
                found.append(train_in_process(run_config, run_out, inside, total))
            else:
                with turn(launch["trials"], launch["at_once"]):
                    found.append(train_on_workers(run_config, run_out, inside, total))
            figures = mean_figures(found)
            if launch["judged"] and len(found) < len(runs):
                judged = {objective: figures[objective] for objective in launch["objectives"] if objective in figures}
                ray_tune.report({**judged, "step": len(found) * total})
        if isinstance(config.net, QuantisedNet):
            figures["nominal_mib"] = figures["backbone_parameters"] * config.net.weights / 8 / 2**20
        for name in launch["objectives"]:
            if name not in figures:
                raise UserError(f"the run ended without the figure {name}: give another --objective")
    except StorageError:  # storage may answer again once the trial has restarted
        raise
    except UserError as error:
        out.mkdir(parents=True, exist_ok=True)
        write_text_atomically(out / MISTAKE, str(error))
        raise
    total *= max(1, len(launch["folds"]))
    ray_tune.report({**figures, "step": total, "done": True})  # done: the scheduler does not pause the trial again


def mean_figures(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each figure that all runs have."""
    return {name: fmean(run[name] for run in found) for name in found[0] if all(name in run for run in found)}


def goes_to_scheduler(metrics: dict[str, float], launch: Launch, total: int) -> bool:
    """Return whether a report goes to the scheduler.

    The last step's does not: the whole run's report follows. Nor does that of a checkpoint without the objectives'
    figures, such as one saved for a drained node.
    """
    return launch["judged"] and metrics["step"] < total and all(name in metrics for name in launch["objectives"])


def train_in_process(config: Config, out: AnyPath, launch: Launch, total: int) -> dict[str, float]:
    """Train in this process alone, and return the run's figures."""
    from ray import tune as ray_tune

    from fr_core.data.stream import blocks_in_process
    from fr_core.device import use_processor
    from fr_core.ranks import Ranks
    from fr_core.train.loop import train_loop
    from pipelines.on_ray import worker_threads

    use_processor(worker_threads(launch["at_once"]))
    gauges = Gauges(out.name, 0)

    def report(metrics: dict[str, float], saved: AnyPath | None) -> None:
        gauges.set(metrics)
        log_event(metrics, saved)
        if saved is not None and goes_to_scheduler(metrics, launch, total):
            copy = ray_tune.Checkpoint.from_directory(str(saved)) if launch["pbt"] else None
            ray_tune.report(metrics, checkpoint=copy)

    return train_loop(config, out, Ranks(), blocks_in_process, report)


def train_on_workers(config: Config, out: AnyPath, launch: Launch, total: int) -> dict[str, float]:
    """Train on Ray Train's workers, whose reports reach Ray Tune, and return the run's figures."""
    from ray.tune.integration.ray_train import TuneReportCallback

    from pipelines.machines import place_workers
    from pipelines.on_ray import train_on_ray

    class ToTune(TuneReportCallback):
        """Hands reports with the objectives' figures to Ray Tune."""

        def after_report(
            self, run_context: "TrainRunContext", metrics: list[dict[str, float]], checkpoint: "Checkpoint | None"
        ) -> None:
            """Hand on rank 0's report, if it is one for the scheduler."""
            if goes_to_scheduler(metrics[0], launch, total):
                super().after_report(run_context, metrics, checkpoint)

    scaling = place_workers(launch["workers"], launch["each"])  # a trial does not see the machines that may come
    return train_on_ray(config, out, scaling, [ToTune()], launch["at_once"])


@contextmanager
def turn(search: str, at_once: int) -> Iterator[None]:
    """Wait until fewer than ``at_once`` trials of a search train, and count as one of them in the block.

    A trial's driver reserves next to no CPU, and Ray Tune's limit does not count trials that it restarts. Too many
    drivers would leave no CPU for workers. A turn is an actor with a fixed name, which ends with its owner.
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
