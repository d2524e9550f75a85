"""What Ray Tune searches with: its tuner, searchers, schedulers and the callback of a search."""

import logging
import os
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fr_core.data.store import AnyPath, RemotePath, find_paths, remove_folder
from pipelines.experiments.search import Search, mode, ray_domain
from pipelines.experiments.whole_files import whole_files
from pipelines.logs import log
from tune_spaces.fields import Choice, Domain, Knob

if TYPE_CHECKING:
    from ray.tune import Callback, Tuner
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial as TuneTrial
    from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler
    from ray.tune.search import SearchAlgorithm, Searcher

LIVES = 3  # starts of a trial; after its process or machine dies, it continues from the newest checkpoint


def make_tuner(
    search: Search,
    out: AnyPath,
    trainable: Callable[[dict[str, float]], None],
    held: dict[str, float],
    at_once: int,
    judgements: tuple[int, int],
    resume: bool,
) -> "Tuner":
    """Return Ray Tune's Tuner for a search; Tune restores the searcher and callbacks of a resumed one.

    Args:
        judgements: steps between two reports of a trial to the scheduler, and reports of a whole trial.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # end_tune_early listens
    if isinstance(out, Path):  # Tune restarts trials it has not saved; at a URL, saving this often costs too much
        os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
    from ray import tune as ray_tune

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial leaves its traceback in its folder
    trainable = ray_tune.with_resources(trainable, {name: n for name, n in held.items() if n})
    space = {knob.name: ray_domain(knob.domain, search.search == "grid") for knob in search.knobs}
    place, files = (out.key, out.filesystem) if isinstance(out, RemotePath) else (str(out), whole_files())
    if resume and find_paths(out / "ray", "experiment_state-*.json"):
        return ray_tune.Tuner.restore(
            f"{place}/ray",
            trainable,
            storage_filesystem=files,
            resume_unfinished=True,
            resume_errored=True,  # after a machine is lost, a trial continues from its newest checkpoint
            param_space=space,
        )
    remove_folder(out / "ray")  # an earlier search may have ended before Tune saved its state
    several, trial_scheduler = len(search.objectives) > 1, scheduler(search, space, *judgements)
    return ray_tune.Tuner(
        trainable,
        param_space=space,
        tune_config=ray_tune.TuneConfig(
            metric=None if several else search.objective,
            mode=None if several else mode(search.objective),
            search_alg=searcher(search, at_once),
            scheduler=trial_scheduler,
            num_samples=1 if search.search == "grid" else search.trials,
            max_concurrent_trials=at_once if search.search == "tpe" else None,  # the other searchers limit themselves
            trial_name_creator=lambda trial: trial.trial_id,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=ray_tune.RunConfig(
            name="ray",
            storage_path=place,
            storage_filesystem=files,
            failure_config=ray_tune.FailureConfig(max_failures=LIVES - 1),
            verbose=0,
            callbacks=[trial_callback(search, trial_scheduler)],
            checkpoint_config=ray_tune.CheckpointConfig(num_to_keep=4),  # a donor's checkpoint must outlive its copying
        ),
    )


def searcher(search: Search, at_once: int) -> "Searcher | SearchAlgorithm":
    """Return Ray Tune's search algorithm: Optuna's TPE, or its own for random and grid search."""
    if search.search == "tpe":
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)

        if search.against:
            names = search.objectives
            return OptunaSearch(metric=names, mode=[mode(name) for name in names], seed=search.seed)
        return OptunaSearch(seed=search.seed)
    from ray.tune.search.basic_variant import BasicVariantGenerator

    at_once = 0 if search.stop == "pbt" else at_once  # 0: no limit, since a population is created as a whole
    return BasicVariantGenerator(max_concurrent=at_once, random_state=search.seed)


def scheduler(search: Search, space: dict[str, Any], rung: int, rungs: int) -> "TrialScheduler | None":
    """Return the scheduler that stops trials, or None.

    It measures time in a run's steps, which a resumed trial goes on counting.
    """
    from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule

    match search.stop:
        case "asha":
            return ASHAScheduler(
                "step", grace_period=rung, max_t=rungs * rung, reduction_factor=2, stop_last_trials=False
            )
        case "median":
            return MedianStoppingRule("step", grace_period=rung, min_samples_required=3)
        case "pbt":
            random.seed(search.seed)  # the scheduler and its domains draw from global generators
            np.random.seed(search.seed)
            return population()(
                "step",
                perturbation_interval=2 * rung,
                hyperparam_mutations=space,
                custom_explore_fn=partial(clip_to_domains, search.knobs),  # a mutation may leave its domain
                synch=True,  # else the first trial to end has none to learn from
            )
    return None


def population() -> "type[PopulationBasedTraining]":
    """Return Ray Tune's population-based training with two mends.

    Tune's own waits for ever for a trial that failed, and for a trial of which a resumed search has no report.
    """
    from ray.tune.experiment import Trial as TuneTrial
    from ray.tune.schedulers import PopulationBasedTraining

    class Population(PopulationBasedTraining):
        """Population-based training that waits for no trial that will not report."""

        def on_trial_error(self, tune_controller: "TuneController", trial: TuneTrial) -> None:
            """Count a failed trial as trained to the end, so that none waits for it."""
            self._trial_state[trial].last_train_time = sys.maxsize

        def choose_trial_to_run(self, tune_controller: "TuneController") -> TuneTrial | None:
            """Return the next trial; if all wait and none runs, let the next round begin."""
            chosen = super().choose_trial_to_run(tune_controller)
            waiting = [trial for trial in tune_controller.get_trials() if trial.status == TuneTrial.PAUSED]
            running = any(trial.status == TuneTrial.RUNNING for trial in tune_controller.get_trials())
            if chosen is None and waiting and not running:
                reached = max(self._trial_state[trial].last_train_time for trial in waiting)
                self._next_perturbation_sync = int(reached + self._perturbation_interval)
                chosen = super().choose_trial_to_run(tune_controller)
            return chosen

    return Population


def clip_to_domains(knobs: Sequence[Knob], values: dict[str, float]) -> dict[str, float]:
    """Return the values clipped to their knobs' domains; of a choice, the nearest member."""

    def inside(domain: Domain, value: float) -> float:
        if isinstance(domain, Choice):
            return value if value in domain.values else min(domain.values, key=lambda one: abs(one - value))
        return min(max(value, domain.low), domain.high)

    return values | {knob.name: inside(knob.domain, values[knob.name]) for knob in knobs}


def trial_callback(search: Search, trial_scheduler: "TrialScheduler | None") -> "Callback":
    """Return a callback that logs the end of each trial and keeps ASHA's state for a resumed search.

    Tune saves the state of searchers and callbacks, but not of schedulers.
    """
    from ray.tune import Callback
    from ray.tune.schedulers import ASHAScheduler

    class TrialEnds(Callback):
        """Logs trials that end, and saves ASHA's brackets."""

        def __init__(self) -> None:
            # An attribute, so that pickling the search keeps this the very scheduler that the search has.
            self.scheduler = trial_scheduler

        def get_state(self) -> dict[str, object] | None:
            """Return ASHA's brackets, which hold the figures of all trials at each rung."""
            return {"brackets": self.scheduler._brackets} if isinstance(self.scheduler, ASHAScheduler) else None

        def set_state(self, state: dict[str, Any]) -> None:
            """Restore ASHA's brackets."""
            assert isinstance(self.scheduler, ASHAScheduler)
            self.scheduler._brackets = state["brackets"]

        def on_trial_complete(
            self, iteration: int, trials: list["TuneTrial"], trial: "TuneTrial", **info: object
        ) -> None:
            """Log a trial that finished or was stopped, with its objectives."""
            figures = trial.last_result or {}
            scores = {name: figures[name] for name in search.objectives if name in figures}
            done = sum(other is trial or other.is_finished() for other in trials)
            facts = {"trial": trial.trial_id, "ended": f"{done}/{search.trials}", "step": figures.get("step", 0)}
            log.info("trial ended", extra={"facts": facts | scores})

        def on_trial_error(self, iteration: int, trials: list["TuneTrial"], trial: "TuneTrial", **info: object) -> None:
            """Log a trial that failed."""
            log.warning("trial failed", extra={"facts": {"trial": trial.trial_id}})

    return TrialEnds()
