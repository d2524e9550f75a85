"""``bigface tune``: searches a recipe's knobs by Ray Tune; each trial is a run in OUT/trials."""

import json
import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fr_core.config import Config, total_steps
from fr_core.config.nets import QuantisedNet
from fr_core.config.optim import FastFaceHaar
from fr_core.data.store import (
    AnyPath,
    RemotePath,
    explain_disk_errors,
    find_paths,
    refuse_job_folder,
    write_text_atomically,
)
from fr_core.errors import UserError
from fr_core.train.check import checked_plan, fitting_plan, open_training_data
from fr_core.train.mlflow_runs import Comparison
from fr_core.verify.pair_lists import read_pairs
from fr_core.verify.pairs import resolved_fars
from fr_core.verify.report import far_name
from pipelines.datasets.split import Fold, folds_of, refuse_pairs
from pipelines.experiments.search import (
    Search,
    Trial,
    best_figures,
    deliver_trials,
    read_trials,
    table,
    verdict,
    write_results,
)
from pipelines.experiments.trial import MISTAKE, Launch, run_trial
from pipelines.experiments.tuner import make_tuner
from pipelines.logs import start_logging
from pipelines.origin import origin_of
from pipelines.signals import on_signal
from pipelines.train import trackable, with_absolute_paths
from tune_spaces.fields import at_steps, check_knobs, grid

RUNGS = 8  # verifications of a trial; ASHA compares trials after 1, 2 and 4 of them
DRIVER = 0.1  # CPUs of a trial's driver process when Ray Train's workers train
STOPS, SEARCHES = ("asha", "median", "none", "pbt"), ("tpe", "random", "grid")
ONLY_AT_THE_END = ("loss", "seconds", "peak_memory_mib", "classes_mib", "nominal_mib", "images_per_second")
WINDOW = "schedule.window"
MOVABLE = ("schedule.", "optim.", "data.masks.")  # fields that may change between two checkpoints of a trial


@dataclass(frozen=True)
class Share:
    """How trials share the cluster."""

    at_once: int  # trials that run at once
    cpus: float  # that each worker reserves, or a trial that trains in its own process


def share_cluster(cpus: float, gpus: float, workers: int, in_process: bool, most: int | None = None) -> Share:
    """Return how many trials run at once, so that no two trials wait for each other for ever.

    Drivers and workers together take at most half of the CPUs, and Ray Data has the others. With ``in_process`` there
    is no Ray Data: a trial is one process with a whole CPU.

    Args:
        cpus: CPUs of the cluster.
        gpus: cards of the cluster; 0 if it has none.
        workers: Ray Train workers of each trial.
        in_process: trials train in their own process.
        most: number of trials that the user asks for; None takes as many as fit.

    Raises:
        UserError: no trial fits, or fewer than ``most``.
    """
    if in_process:
        each, fitting = 1.0, math.floor(cpus)
    else:
        each = next((c for c in (1.0, 0.5, 0.25) if DRIVER + workers * c <= cpus / 2), 0.0)
        fitting = math.floor(cpus / 2 / (DRIVER + workers * each)) if each else 0
    if gpus:
        fitting = min(fitting, math.floor(gpus / workers))
    if fitting < 1:
        raise UserError(
            f"a trial of {workers} workers does not fit {cpus:g} CPUs and {gpus:g} GPUs: use fewer --workers"
        )
    if most and most > fitting:
        raise UserError(
            f"--at-once {most}: {fitting} trials fit {cpus:g} CPUs and {gpus:g} GPUs: use --at-once {fitting}"
        )
    return Share(most or fitting, each)


def tune(
    search: Search, out: AnyPath, at_once: int | None = None, minutes: float | None = None, resume: bool = False
) -> tuple[list[Trial], int | None]:
    """Run a search and write ``trials.csv``, pictures and ``winner.toml`` into ``out``, local or at a URL.

    Args:
        at_once: trials that run at once; None takes as many as fit.
        minutes: end the search after this time.
        resume: continue the search in ``out``.

    Returns:
        All trials in the order of their names, and the signal that ended the search early, if any.

    Raises:
        UserError: bad options, a folder of another search, or all trials failed.
    """
    from pipelines.machines import autoscaler_config, capacity, check_room, keep_no_machine, machines_of, reserved
    from pipelines.ray_start import start_ray

    out = out.resolve()
    refuse_job_folder(out)
    start_logging(run=out.name)
    search = replace(search, config=trackable(search.config, out))
    folds = folds_of_search(search, out)
    search, steps_per_epoch = check_search(search, out, at_once, folds)
    start_ray(dashboard=not search.in_process)  # without it a second trial of Ray Train waits for ever
    grows = autoscaler_config()
    if grows:
        keep_no_machine()
    machines = machines_of(grows)
    cpus, gpus = capacity(machines)
    shared = share_cluster(cpus, gpus, search.workers, search.in_process, at_once)
    each = reserved(shared.cpus, gpus)
    if not search.in_process:
        check_room(search.workers, each, machines, grows)
    at_once = claim_folder(search, out, resume, shared.at_once, asked=at_once is not None)
    tracking = search.config.tracking
    origin = origin_of(search.recipe)
    parent = Comparison(tracking, out, origin, anew=not resume) if tracking.uri != "off" else None
    steps = total_steps(search.config, steps_per_epoch)
    rung = max(1, math.ceil(steps / RUNGS))
    base = trial_config(search, rung, parent)
    launch: Launch = {
        "config": base.model_dump(mode="json"),
        "origin": origin,
        "knobs": search.knobs,
        "trials": str(out / "trials"),
        "steps_per_epoch": steps_per_epoch,
        "workers": search.workers,
        "in_process": search.in_process,
        "pbt": search.stop == "pbt",
        "judged": search.stop != "none",
        "each": each,
        "at_once": at_once,
        "objectives": search.objectives,
        "folds": folds,
    }
    held = {"CPU": 1.0, "GPU": min(1.0, gpus)} if search.in_process else {"CPU": DRIVER}
    try:
        judgements = (steps, len(folds)) if folds else (rung, RUNGS)
        tuner = make_tuner(search, out, partial(run_trial, launch=launch), held, at_once, judgements, resume)
        with end_tune_early(minutes) as signals:
            trials = read_trials(tuner.fit(), search)
        files = write_results(search, trials, out)
    except BaseException:
        if parent:
            parent.close("The search failed.", table(search, []), status="FAILED")
        raise
    reached = [trial for trial in trials if trial.state != "failed"]
    whole = len(trials) == search.trials and all(trial.state != "interrupted" for trial in trials)
    if parent:
        deliver_trials(trials, base, out)
        status = "KILLED" if not whole else "FINISHED" if reached else "FAILED"
        parent.close(verdict(search, trials), table(search, trials), files, status, best_figures(search, trials))
    if trials and not reached:
        raise UserError(f"all {len(trials)} trials failed, the last: {trials[-1].reason}")
    return trials, signals[0] if signals else None


def folds_of_search(search: Search, out: AnyPath) -> list[Fold]:
    """Cut the training people into the search's folds, which lie in its folder; none without ``--folds``.

    Raises:
        UserError: there are too few people, pairs are given too, or ``--stop`` or ``--out`` does not go with folds.
    """
    if search.folds is None:
        return []
    refuse_pairs(search.config)
    if search.stop == "pbt":
        raise UserError("--stop pbt moves checkpoints between trials, which folds forbid: use --stop asha")
    if isinstance(out, RemotePath):
        raise UserError(f"--folds writes datasets, and {out} is a URL: give a local --out that all machines share")
    shards = open_training_data(with_absolute_paths(search.config)).root
    return folds_of(shards, out / "folds", search.folds)


def check_search(
    search: Search, out: AnyPath, at_once: int | None = None, folds: Sequence[Fold] = ()
) -> tuple[Search, int]:
    """Check a search, and return it with absolute paths, and the steps of an epoch, of the first fold if any.

    Raises:
        UserError: the recipe lacks or refuses a knob, or options contradict each other.
    """
    whole = with_absolute_paths(search.config)
    config = folds[0].of(whole) if folds else whole
    for wanted, given, known in (("--search", search.search, SEARCHES), ("--stop", search.stop, STOPS)):
        if given not in known:
            raise UserError(f"{wanted} {given}: use one of {', '.join(known)}")
    if search.in_process and search.workers != 1:
        raise UserError("--in-process runs one worker: leave out --workers or --in-process")
    for name in search.objectives:
        if name not in ("accuracy", *ONLY_AT_THE_END) and not name.startswith("tar_at_far_1e-"):
            raise UserError(f"no objective {name}: use one of accuracy, tar_at_far_1e-3, {', '.join(ONLY_AT_THE_END)}")
    if "nominal_mib" in search.objectives and not isinstance(config.net, QuantisedNet):
        raise UserError("nominal_mib is the size of a quantised net: give another objective")
    if search.stop != "none" and (search.against or search.objective in ONLY_AT_THE_END):
        raise UserError(f"--stop {search.stop} compares trials by one figure of their verifications: use --stop none")
    if not config.verify.pairs and any(name not in ONLY_AT_THE_END for name in search.objectives):
        raise UserError(f"--objective {search.objective}: give verify.images=DIR verify.pairs=FILE, or --folds 3")
    if search.stop == "pbt":
        if not search.in_process or search.search != "random" or isinstance(out, RemotePath):
            raise UserError(
                "--stop pbt hands checkpoints from trial to trial: give --search random, --in-process and a local --out"
            )
        if at_once:
            raise UserError("--stop pbt trains all trials in turns: leave --at-once out")
        for knob in search.knobs:
            if not knob.path.startswith(MOVABLE) or knob.path == WINDOW:
                raise UserError(
                    f"--stop pbt changes knobs on the way, and {knob.name} cannot change: choose others by --only"
                )
    if isinstance(config.schedule, FastFaceHaar) and config.schedule.m and any(k.path == WINDOW for k in search.knobs):
        raise UserError("schedule.m sets the window's length, so the knob window has no effect: leave one of them out")
    plan = checked_plan(config, search.workers)
    knobs = at_steps(search.knobs, total_steps(config, plan.steps_per_epoch))
    if config.verify.pairs:
        resolved = [f"tar_at_far_{far_name(far)}" for far in resolved_fars(read_pairs(config.verify.pairs).same)]
        for name in search.objectives:
            if name.startswith("tar_at_far_") and name not in resolved:
                raise UserError(f"no objective {name}: {config.verify.pairs} has pairs for {', '.join(resolved)} only")
    points = math.prod(len(grid(knob.domain)) for knob in knobs)
    if search.search == "grid" and points != search.trials:
        raise UserError(f"the grid has {points} points: use --trials {points}, or choose fewer knobs by --only")
    for end in check_knobs(config, knobs):
        fitting_plan(end, plan.dataset, search.workers)
    return replace(search, config=whole, knobs=knobs), plan.steps_per_epoch


@contextmanager
def end_tune_early(minutes: float | None) -> Iterator[list[int]]:
    """End Ray Tune in the block after a time, at Ctrl-C or at SIGTERM.

    Once it runs, Tune ends by SIGUSR1: its trials save nothing more, and it returns what it has. A second Ctrl-C or
    SIGTERM ends the process at once.

    Yields:
        A list of the signals that came: Ctrl-C or SIGTERM.
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
        if threading.current_thread() is threading.main_thread():  # Tune listens only there
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def claim_folder(search: Search, out: AnyPath, resume: bool, at_once: int, asked: bool = False) -> int:
    """Take a folder for a new search, or check that it holds the search to resume.

    The folder keeps the number of trials at once, since Ray Tune cannot change it when a search continues.

    Args:
        at_once: trials that fit at once, or the number that the user asked for.
        asked: whether the user asked for this number.

    Returns:
        The number of trials at once.

    Raises:
        UserError: the folder holds a search already or cannot be written. To resume: it holds no search, another one,
            one of another user, or one that needs a larger machine.
    """
    path, facts = out / "search.json", search.facts()
    if resume:
        if not path.is_file():
            raise UserError(f"--resume: {out} holds no search: leave --resume out")
        if isinstance(path, Path) and path.stat().st_uid != os.getuid():  # Tune reads pickles from the folder
            raise UserError(
                f"{out} is another user's: its files can run code when a search continues; start a search of your own"
            )
        then = json.loads(path.read_text())
        different = [name for name in facts if facts[name] != then.get(name)]
        if different:
            raise UserError(f"{out} holds another search ({', '.join(different)} differ): use another folder")
        if then["at_once"] > at_once or (asked and then["at_once"] != at_once):
            why = f"--at-once {at_once} asks for another number" if asked else f"only {at_once} fit here"
            raise UserError(f"{out} runs {then['at_once']} trials at once, {why}: use another folder")
        for mistake in find_paths(out / "trials", f"*/{MISTAKE}"):  # the user may have mended them
            mistake.unlink()
        return int(then["at_once"])
    if path.is_file():
        raise UserError(f"{out} holds a search: --resume continues it; or use another folder")
    with explain_disk_errors(out):
        (out / "trials").mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(facts | {"at_once": at_once}, indent=1) + "\n")
    return at_once


def trial_config(search: Search, rung: int, parent: Comparison | None) -> Config:
    """Return the config of all trials, before their values.

    Trials save and verify every ``rung`` steps, when the scheduler compares them. With folds, it compares them at the
    end of each fold. In MLflow they are children of ``parent``.
    """
    changes: dict[str, object] = {"save_every": rung, "log_every": min(rung, search.config.train.log_every)}
    if search.stop != "none" and not search.folds:
        changes["verify_every"] = rung
    update: dict[str, object] = {"train": search.config.train.model_copy(update=changes)}
    if parent:
        child = {"uri": parent.uri, "parent": parent.run_id, "net": False}
        update["tracking"] = search.config.tracking.model_copy(update=child)
    return search.config.model_copy(update=update)
