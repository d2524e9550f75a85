"""``bigface tune``: a search by Ray Tune over a recipe's knobs, each trial a run of its own in OUT/trials."""

import json
import logging
import math
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fr_core.config import Config, total_steps
from fr_core.config.nets import QuantisedNet
from fr_core.config.optim import FastFaceHaar
from fr_core.data.store import (
    AnyPath,
    RemotePath,
    explain_disk_errors,
    find_paths,
    refuse_job_folder,
    remove_folder,
    write_text_atomically,
)
from fr_core.errors import UserError
from fr_core.train.check import checked_plan, fitting_plan
from fr_core.train.mlflow_runs import Comparison
from fr_core.verify.pairs import read_pairs, resolved_fars
from fr_core.verify.report import far_name, markdown
from pipelines.experiments.search import (
    Search,
    Trial,
    mode,
    ray_domain,
    read_trials,
    settle,
    table,
    write_results,
)
from pipelines.experiments.trial import MISTAKE, Launch, run_trial
from pipelines.logs import log, start_logging
from pipelines.signals import on_signal
from pipelines.train import trackable, with_absolute_paths
from tune_spaces.fields import (
    Choice,
    Domain,
    Knob,
    at_steps,
    check_knobs,
    grid,
)

if TYPE_CHECKING:
    from ray.tune import Callback, Tuner
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial as TuneTrial
    from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler
    from ray.tune.search import SearchAlgorithm, Searcher

RUNGS = 8  # verifications of a trial; ASHA looks after 1, 2 and 4 of them
DRIVER = 0.1  # CPUs of a trial's own process where Ray Train's workers do its work
STOPS, SEARCHES = ("asha", "median", "none", "pbt"), ("tpe", "random", "grid")
ONLY_AT_THE_END = ("loss", "seconds", "peak_memory_mib", "classes_mib", "nominal_mib", "images_per_second")
LIVES = 3  # of a trial whose process or machine dies, each from the newest checkpoint
WINDOW = "schedule.window"
MOVABLE = ("schedule.", "optim.", "data.masks.")  # what a checkpoint of other values can go on with


@dataclass(frozen=True)
class Share:
    """Of the cluster."""

    at_once: int  # trials
    cpus: float  # of each worker, or of the trial that is its own worker


def share(cpus: float, gpus: float, workers: int, in_process: bool, most: int | None = None) -> Share:
    """How many trials run at once, so that none waits for ever for what another holds.

    A trial's process and its workers together take at most half of the CPUs; Ray Data has the others. Without
    Ray Data a trial is one process with a whole CPU.

    Raises:
        UserError: not even one fits.
    """
    if in_process:
        each, fitting = 1.0, math.floor(cpus)
    else:
        each = next((c for c in (1.0, 0.5, 0.25) if DRIVER + workers * c <= cpus / 2), 0.0)
        fitting = math.floor(cpus / 2 / (DRIVER + workers * each)) if each else 0
    if gpus:
        fitting = min(fitting, math.floor(gpus / workers))
    if fitting < 1:
        raise UserError(f"a trial of {workers} workers does not fit {cpus:g} CPUs and {gpus:g} GPUs: use --workers 1")
    if most and most > fitting:
        raise UserError(f"--at-once {most}: {fitting} trials fit {cpus:g} CPUs and {gpus:g} GPUs")
    return Share(most or fitting, each)


def tune(
    search: Search, out: AnyPath, at_once: int | None = None, minutes: float | None = None, resume: bool = False
) -> tuple[list[Trial], int | None]:
    """Searches, and leaves ``trials.csv``, pictures and ``winner.toml`` in ``out``, local or at a URL.

    Returns:
        All trials, in the order of their names; and the signal that ended the search before its time, if one did.

    Raises:
        UserError: a search that cannot be, a folder of another one, or no trial that came to an end.
    """
    from pipelines.on_ray import capacity, cluster_machines, start_ray

    out = out.resolve()
    refuse_job_folder(out)
    start_logging(run=out.name)
    search, steps_per_epoch = checked(replace(search, config=trackable(search.config, out)), out, at_once)
    start_ray(dashboard=not search.in_process)  # without one a second trial of Ray Train waits for ever
    cpus, gpus = capacity(cluster_machines())
    shared = share(cpus, gpus, search.workers, search.in_process, at_once)
    at_once = claim(search, out, resume, shared.at_once, at_once is not None)
    tracking = search.config.tracking
    parent = Comparison(tracking, out, anew=not resume) if tracking.uri != "off" else None
    rung = max(1, math.ceil(total_steps(search.config, steps_per_epoch) / RUNGS))
    base = tracked(search, rung, parent)
    launch: Launch = {
        "config": base.model_dump(mode="json"),
        "knobs": search.knobs,
        "trials": str(out / "trials"),
        "steps_per_epoch": steps_per_epoch,
        "workers": search.workers,
        "in_process": search.in_process,
        "pbt": search.stop == "pbt",
        "judged": search.stop != "none",
        "cpus": shared.cpus,
        "at_once": at_once,
        "objectives": search.objectives,
    }
    held = {"CPU": 1.0, "GPU": min(1.0, gpus)} if search.in_process else {"CPU": DRIVER}
    try:
        tuner = make_tuner(search, out, partial(run_trial, launch=launch), held, at_once, rung, resume)
        with ended_early(minutes) as came:
            trials = read_trials(tuner.fit(), search)
        files = write_results(search, trials, out)
    except BaseException:
        if parent:
            parent.close("", status="FAILED")
        raise
    reached = [trial for trial in trials if trial.state != "failed"]
    whole = len(trials) == search.trials and all(trial.state != "interrupted" for trial in trials)
    if parent:
        settle(trials, base, out)
        status = "KILLED" if not whole else "FINISHED" if reached else "FAILED"
        parent.close(markdown(table(search, trials)), files, status)
    if trials and not reached:
        raise UserError(f"all {len(trials)} trials failed, the last: {trials[-1].reason}")
    return trials, came[0] if came else None


def checked(search: Search, out: AnyPath, at_once: int | None = None) -> tuple[Search, int]:
    """The search with absolute paths, and the steps of an epoch.

    Raises:
        UserError: knobs that the recipe lacks or refuses, or options that do not go together.
    """
    config = with_absolute_paths(search.config)
    for wanted, given, known in (("--search", search.search, SEARCHES), ("--stop", search.stop, STOPS)):
        if given not in known:
            raise UserError(f"{wanted} {given}: use one of {', '.join(known)}")
    if search.in_process and search.workers != 1:
        raise UserError("--in-process runs one worker; leave --workers out, or leave --in-process out")
    for name in search.objectives:
        if name not in ("accuracy", *ONLY_AT_THE_END) and not name.startswith("tar_at_far_1e-"):
            raise UserError(f"no objective {name}: use accuracy, tar_at_far_1e-3, {', '.join(ONLY_AT_THE_END)}")
    if "nominal_mib" in search.objectives and not isinstance(config.net, QuantisedNet):
        raise UserError("nominal_mib is the size of a quantised net: give another objective")
    if search.stop != "none" and (search.against or search.objective in ONLY_AT_THE_END):
        raise UserError(f"--stop {search.stop} judges by one figure of verifications along the way: use --stop none")
    if not config.verify.pairs and any(name not in ONLY_AT_THE_END for name in search.objectives):
        raise UserError(f"--objective {search.objective} needs verify.images and verify.pairs")
    if search.stop == "pbt":
        if not search.in_process or search.search != "random" or isinstance(out, RemotePath):
            raise UserError(
                "--stop pbt hands checkpoints from trial to trial: use it with --search random --in-process, and a "
                "local --out"
            )
        if at_once:
            raise UserError("--stop pbt trains all trials in turns, as many at once as fit: leave --at-once out")
        for knob in search.knobs:
            if not knob.path.startswith(MOVABLE) or knob.path == WINDOW:
                raise UserError(f"--stop pbt changes a run on its way, and {knob.name} cannot change: use --only")
    if isinstance(config.schedule, FastFaceHaar) and config.schedule.m and any(k.path == WINDOW for k in search.knobs):
        raise UserError("schedule.m says how long the window is, so that window changes nothing: leave one of them out")
    plan = checked_plan(config, search.workers)
    knobs = at_steps(search.knobs, total_steps(config, plan.steps_per_epoch))
    if config.verify.pairs:
        resolved = [f"tar_at_far_{far_name(far)}" for far in resolved_fars(read_pairs(config.verify.pairs).same)]
        for name in search.objectives:
            if name.startswith("tar_at_far_") and name not in resolved:
                raise UserError(f"no objective {name}: {config.verify.pairs} has pairs for {', '.join(resolved)}")
    points = math.prod(len(grid(knob.domain)) for knob in knobs)
    if search.search == "grid" and points != search.trials:
        raise UserError(f"the grid has {points} points: use --trials {points}, or fewer knobs by --only")
    for end in check_knobs(config, knobs):
        fitting_plan(end, plan.dataset, search.workers)
    return replace(search, config=config, knobs=knobs), plan.steps_per_epoch


@contextmanager
def ended_early(minutes: float | None) -> Iterator[list[int]]:
    """Has Tune end in the block by the signal that it listens to once it runs: after a time, at Ctrl-C, at SIGTERM.

    Its trials save nothing more then, and it returns what it has. A second Ctrl-C or SIGTERM ends it at once.

    Yields:
        The Ctrl-C or SIGTERM that came.
    """
    came, asked, over = list[int](), threading.Event(), threading.Event()

    def ask(number: int) -> None:
        came.append(number)
        asked.set()

    def end() -> None:
        asked.wait(None if minutes is None else 60 * minutes)
        while not over.wait(0.1):
            if signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL:
                os.kill(os.getpid(), signal.SIGUSR1)
                return

    timer = threading.Thread(target=end, daemon=True)
    timer.start()
    try:
        with ExitStack() as signals:
            for number in (signal.SIGINT, signal.SIGTERM):
                signals.enter_context(on_signal(number, partial(ask, number)))
            yield came
    finally:
        over.set()
        asked.set()
        timer.join()
        if threading.current_thread() is threading.main_thread():  # elsewhere Tune did not listen either
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def claim(search: Search, out: AnyPath, resume: bool, at_once: int, told: bool = False) -> int:
    """Makes the folder this search's, with its number of trials at once, which Tune keeps when it goes on.

    Args:
        at_once: that fit, or fewer where the user ``told`` so.

    Returns:
        That number.

    Raises:
        UserError: it holds one already, or another one than is to go on, or one that does not fit this machine or is
            another user's, or it cannot be written.
    """
    path, facts = out / "search.json", search.facts()
    if resume:
        if not path.is_file():
            raise UserError(f"--resume: {out} holds no search: leave --resume out")
        if isinstance(path, Path) and path.stat().st_uid != os.getuid():  # Tune's own files there are pickles
            raise UserError(f"{out} is another user's: going on with a search runs what its files say")
        then = json.loads(path.read_text())
        different = [name for name in facts if facts[name] != then.get(name)]
        if different:
            raise UserError(f"{out} holds another search ({', '.join(different)} differ): use another folder")
        if then["at_once"] > at_once or (told and then["at_once"] != at_once):
            why = "--at-once" if told else "here fit"
            raise UserError(f"{out} runs {then['at_once']} trials at once, {why} {at_once}: use another folder")
        for mistake in find_paths(out / "trials", f"*/{MISTAKE}"):  # which may be mended
            mistake.unlink()
        return int(then["at_once"])
    if path.is_file():
        raise UserError(f"{out} holds a search: --resume goes on with it, or use another folder")
    with explain_disk_errors(out):
        (out / "trials").mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(facts | {"at_once": at_once}, indent=1) + "\n")
    return at_once


def tracked(search: Search, rung: int, parent: Comparison | None) -> Config:
    """The trials' config: they save and verify where the scheduler looks, and stand under the parent in MLflow."""
    changes: dict[str, object] = {"save_every": rung, "log_every": min(rung, search.config.train.log_every)}
    if search.stop != "none":
        changes["verify_every"] = rung
    update: dict[str, object] = {"train": search.config.train.model_copy(update=changes)}
    if parent:
        child = {"uri": parent.uri, "parent": parent.run_id}
        update["tracking"] = search.config.tracking.model_copy(update=child)
    return search.config.model_copy(update=update)


def make_tuner(
    search: Search,
    out: AnyPath,
    trainable: Callable[[dict[str, float]], None],
    held: dict[str, float],
    at_once: int,
    rung: int,
    resume: bool,
) -> "Tuner":
    """Ray Tune's view of the search; a resumed one knows its own searcher and callbacks."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # ended_early listens
    if isinstance(out, Path):  # a trial that no saved state knows is begun anew; to a URL all goes up each time
        os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
    from ray import tune as ray_tune

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial's traceback stands in its folder
    trainable = ray_tune.with_resources(trainable, {name: n for name, n in held.items() if n})
    space = {knob.name: ray_domain(knob.domain, search.search == "grid") for knob in search.knobs}
    if resume and find_paths(out / "ray", "experiment_state-*.json"):
        return ray_tune.Tuner.restore(
            (out / "ray").key if isinstance(out, RemotePath) else str(out / "ray"),
            trainable,
            storage_filesystem=out.filesystem if isinstance(out, RemotePath) else None,
            resume_unfinished=True,
            resume_errored=True,  # a machine that went: the run goes on from its newest checkpoint
            param_space=space,
        )
    remove_folder(out / "ray")  # of a search that ended before Tune first saved its state
    several, judge = len(search.objectives) > 1, scheduler(search, space, rung)
    return ray_tune.Tuner(
        trainable,
        param_space=space,
        tune_config=ray_tune.TuneConfig(
            metric=None if several else search.objective,
            mode=None if several else mode(search.objective),
            search_alg=searcher(search, at_once),
            scheduler=judge,
            num_samples=1 if search.search == "grid" else search.trials,
            max_concurrent_trials=at_once if search.search == "tpe" else None,  # the others limit themselves
            trial_name_creator=lambda trial: trial.trial_id,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=ray_tune.RunConfig(
            name="ray",
            storage_path=out.key if isinstance(out, RemotePath) else str(out),
            storage_filesystem=out.filesystem if isinstance(out, RemotePath) else None,
            failure_config=ray_tune.FailureConfig(max_failures=LIVES - 1),
            verbose=0,
            callbacks=[ended_trials(search, judge)],
            checkpoint_config=ray_tune.CheckpointConfig(num_to_keep=4),  # a donor's must outlive its copying
        ),
    )


def searcher(search: Search, at_once: int) -> "Searcher | SearchAlgorithm":
    if search.search == "tpe":
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)

        if search.against:
            names = search.objectives
            return OptunaSearch(metric=names, mode=[mode(name) for name in names], seed=search.seed)
        return OptunaSearch(seed=search.seed)
    from ray.tune.search.basic_variant import BasicVariantGenerator

    at_once = 0 if search.stop == "pbt" else at_once  # 0: no limit; a population is there as a whole
    return BasicVariantGenerator(max_concurrent=at_once, random_state=search.seed)


def scheduler(search: Search, space: dict[str, Any], rung: int) -> "TrialScheduler | None":
    """Time is a run's steps, which a resumed trial goes on counting."""
    from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule

    match search.stop:
        case "asha":
            most = RUNGS * rung
            return ASHAScheduler("step", grace_period=rung, max_t=most, reduction_factor=2, stop_last_trials=False)
        case "median":
            return MedianStoppingRule("step", grace_period=rung, min_samples_required=3)
        case "pbt":
            random.seed(search.seed)  # what it draws from, and its domains
            np.random.seed(search.seed)
            return population()(
                "step",
                perturbation_interval=2 * rung,
                hyperparam_mutations=space,
                custom_explore_fn=partial(bounded, search.knobs),  # a mutation may leave the domain
                synch=True,  # else the first trial to end has nobody to learn from
            )
    return None


def population() -> "type[PopulationBasedTraining]":
    """Tune's population based training, which would wait for ever for a trial that failed, and for one that a resumed
    search has not heard of.
    """
    from ray.tune.experiment import Trial as TuneTrial
    from ray.tune.schedulers import PopulationBasedTraining

    class Population(PopulationBasedTraining):
        def on_trial_error(self, tune_controller: "TuneController", trial: TuneTrial) -> None:
            self._trial_state[trial].last_train_time = sys.maxsize

        def choose_trial_to_run(self, tune_controller: "TuneController") -> TuneTrial | None:
            chosen = super().choose_trial_to_run(tune_controller)
            waiting = [trial for trial in tune_controller.get_trials() if trial.status == TuneTrial.PAUSED]
            running = any(trial.status == TuneTrial.RUNNING for trial in tune_controller.get_trials())
            if chosen is None and waiting and not running:
                reached = max(self._trial_state[trial].last_train_time for trial in waiting)
                self._next_perturbation_sync = int(reached + self._perturbation_interval)
                chosen = super().choose_trial_to_run(tune_controller)
            return chosen

    return Population


def bounded(knobs: Sequence[Knob], values: dict[str, float]) -> dict[str, float]:
    """The values, those beyond an end of their domain put on it, those beside a choice on the nearest one."""

    def inside(domain: Domain, value: float) -> float:
        if isinstance(domain, Choice):
            return value if value in domain.values else min(domain.values, key=lambda one: abs(one - value))
        return min(max(value, domain.low), domain.high)

    return values | {knob.name: inside(knob.domain, values[knob.name]) for knob in knobs}


def ended_trials(search: Search, judge: "TrialScheduler | None") -> "Callback":
    """A line for each trial that ends; and, for a search that goes on, what ASHA compares trials with: Tune keeps the
    states of searchers and callbacks, and none of schedulers.
    """
    from ray.tune import Callback
    from ray.tune.schedulers import ASHAScheduler

    class Ended(Callback):
        def __init__(self) -> None:
            self.judge = judge  # an attribute: the same object as the search's also once both were pickled

        def get_state(self) -> dict[str, object] | None:
            return {"brackets": self.judge._brackets} if isinstance(self.judge, ASHAScheduler) else None

        def set_state(self, state: dict[str, Any]) -> None:
            assert isinstance(self.judge, ASHAScheduler)
            self.judge._brackets = state["brackets"]

        def on_trial_complete(
            self, iteration: int, trials: list["TuneTrial"], trial: "TuneTrial", **info: object
        ) -> None:
            figures = trial.last_result or {}
            scores = {name: figures[name] for name in search.objectives if name in figures}
            done = sum(other is trial or other.is_finished() for other in trials)
            facts = {"trial": trial.trial_id, "ended": f"{done}/{search.trials}", "step": figures.get("step", 0)}
            log.info("trial ended", extra={"facts": facts | scores})

        def on_trial_error(self, iteration: int, trials: list["TuneTrial"], trial: "TuneTrial", **info: object) -> None:
            log.warning("trial failed", extra={"facts": {"trial": trial.trial_id}})

    return Ended()
