"""A search and its results: trials, the best of them, tables, pictures and the winner's recipe."""

import csv
import json
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from fr_core.config import Config
from fr_core.data.store import AnyPath, atomic_file, explain_disk_errors, find_paths, write_text_atomically
from fr_core.errors import UserError
from fr_core.train.mlflow_runs import MOST_WAIT, open_mlflow
from fr_core.train.outbox import Outbox, first_line, log, read_undelivered, within
from fr_core.verify.report import smaller_is_better
from pipelines.experiments.states import State
from tune_spaces.fields import Choice, Domain, Integers, Knob, LogUniform, StepShare, Uniform, grid, with_values

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from ray.tune import ResultGrid
    from ray.tune.search.sample import Domain as RayDomain

try:
    import tomli_w
except ImportError:
    raise UserError("a search needs: pip install 'bigface[tune]'") from None

WHOLE_RUN = "steps"  # figure that only the report of a whole run has
FOLD = "-fold"  # between a trial's name and the number of a fold, in the name of a run


@dataclass(frozen=True)
class Search:
    """Settings of a search. Only a search with the same settings can continue in its folder."""

    knobs: Sequence[Knob]
    config: Config
    trials: int = 50
    search: str = "tpe"
    stop: str = "asha"
    objective: str = "accuracy"
    against: str | None = None  # a second objective
    seed: int = 0
    workers: int = 1
    in_process: bool = False
    folds: int | None = None  # parts of the training people to verify on in turn; None: the recipe's pairs
    recipe: str = ""  # name or file that the config was loaded from, for the MLflow pages

    @property
    def objectives(self) -> list[str]:
        """Return the names of the one or two figures that the search optimises."""
        return [self.objective, *([self.against] if self.against else [])]

    def facts(self) -> dict[str, Any]:
        """Return the settings as JSON, without the tracking section: a search may move to another server."""
        knobs = {knob.name: [knob.path, asdict(knob.domain)] for knob in self.knobs}
        facts = {name: value for name, value in vars(self).items() if name not in ("knobs", "config", "recipe")}
        config = self.config.model_dump(mode="json", exclude={"tracking"})
        return json.loads(json.dumps(facts | {"knobs": knobs, "config": config}))


@dataclass(frozen=True)
class Trial:
    """One trial of a search."""

    name: str
    state: State  # stopped by the scheduler, or interrupted by the end of the search
    values: dict[str, float]  # by knob
    figures: dict[str, float]
    reason: str = ""  # why it failed


def mode(figure: str) -> str:
    """Return Ray Tune's word for how a figure is optimised: min or max."""
    return "min" if smaller_is_better(figure) else "max"


def ray_domain(domain: Domain, in_grid: bool) -> "RayDomain | dict[str, Iterable[float]]":
    """Return a knob's domain as Ray Tune writes it; for a grid search, as a list of points."""
    from ray import tune as ray_tune

    if in_grid:
        return ray_tune.grid_search(list(grid(domain)))
    match domain:
        case Uniform(low, high):
            return ray_tune.uniform(low, high)
        case LogUniform(low, high):
            return ray_tune.loguniform(low, high)
        case Integers(low, high):
            return ray_tune.randint(low, high + 1)
        case Choice(values):
            return ray_tune.choice(list(values))
        case StepShare():
            raise TypeError("call at_steps first: it turns shares of the steps into numbers")
        case _ as unknown:
            assert_never(unknown)


def read_trials(results: "ResultGrid", search: Search) -> list[Trial]:
    """Return all trials that have begun. Trials that were running when the search ended are interrupted."""
    from ray.tune.result import AUTO_RESULT_KEYS

    trials = []
    for number in range(len(results)):
        result = results[number]
        try:
            with result.filesystem.open_input_file(f"{result.path}/params.json") as file:
                given = json.loads(file.read())
        except FileNotFoundError:
            continue
        name, reason, metrics = Path(result.path).name, "", result.metrics or {}
        state: State = "interrupted"
        if result.error:
            state, last = "failed", str(result.error).strip().splitlines()[-1]
            reason = last.partition("Error: ")[2] or last
        elif metrics.get("done"):
            state = "finished" if WHOLE_RUN in metrics else "stopped"
        numbers = {
            key: value
            for key, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and key not in AUTO_RESULT_KEYS
        }
        values = {knob.name: given[knob.name] for knob in search.knobs}
        trials.append(Trial(name, state, values, numbers, reason))
    return sorted(trials, key=lambda trial: trial.name)


def best(search: Search, trials: Sequence[Trial]) -> list[Trial]:
    """Return the finished trials, best first; with two objectives, only those of the Pareto front."""
    done = [t for t in trials if t.state == "finished" and all(name in t.figures for name in search.objectives)]
    signs = [-1 if mode(name) == "max" else 1 for name in search.objectives]

    def costs(trial: Trial) -> list[float]:
        return [sign * trial.figures[name] for sign, name in zip(signs, search.objectives, strict=True)]

    def beaten(trial: Trial) -> bool:
        worst = costs(trial)
        return any(costs(t) != worst and all(a <= b for a, b in zip(costs(t), worst, strict=True)) for t in done)

    return sorted((t for t in done if not (search.against and beaten(t))), key=costs)


def table(search: Search, trials: Sequence[Trial], most: int = 10) -> list[tuple[str, ...]]:
    """Return a table of the best trials, header first."""
    rows: list[tuple[str, ...]] = [("trial", *search.objectives, *(knob.name for knob in search.knobs))]
    for trial in best(search, trials)[:most]:
        scores = (f"{trial.figures[name]:.4g}" for name in search.objectives)
        rows.append((trial.name, *scores, *(f"{value:.4g}" for value in trial.values.values())))
    return rows


def verdict(search: Search, trials: Sequence[Trial]) -> str:
    """Return in Markdown how many trials finished, and which is best."""
    winners, goal = best(search, trials), " and ".join(f"{mode(name)} {name}" for name in search.objectives)
    finished = sum(trial.state == "finished" for trial in trials)
    counts = f"{finished} of {len(trials)} trials finished; searched for {goal}."
    if not winners:
        return f"**No best trial.** {counts}"
    scores = ", ".join(f"{name} {value:.4g}" for name, value in best_figures(search, trials).items())
    values = ", ".join(f"{name} {value:.4g}" for name, value in winners[0].values.items())
    return f"**Best: {winners[0].name}, {scores}**, with {values}. {counts}"


def best_figures(search: Search, trials: Sequence[Trial]) -> dict[str, float]:
    """Return the objectives of the best trial; none if no trial finished."""
    return {name: trial.figures[name] for trial in best(search, trials)[:1] for name in search.objectives}


def write_results(search: Search, trials: Sequence[Trial], out: AnyPath) -> list[AnyPath]:
    """Write ``trials.csv`` and, if any trial has finished, the pictures and ``winner.toml``.

    Returns:
        The files.

    Raises:
        UserError: ``out`` cannot be written.
    """
    figures = sorted({name for trial in trials for name in trial.figures})
    knobs = [knob.name for knob in search.knobs]
    files = [out / "trials.csv"]
    with explain_disk_errors(files[0]), atomic_file(files[0]) as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "state", *(f"knob/{name}" for name in knobs), *figures, "reason"])
        for trial in trials:
            values = [trial.values[name] for name in knobs] + [trial.figures.get(name, "") for name in figures]
            writer.writerow([trial.name, trial.state, *values, trial.reason])
    if winners := best(search, trials):
        winner = winners[0]
        config = with_values(search.config, search.knobs, winner.values)
        judge = "means over the folds" if search.folds else "on the pairs"
        scores = ", ".join(f"{name} {winner.figures[name]:.6g}" for name in search.objectives)
        scores += f"; one seed, {judge} that chose this trial"
        files.append(out / "winner.toml")
        with explain_disk_errors(files[-1]):
            write_text_atomically(
                files[-1], winner_recipe(config, scores, winner.name, len(trials), out, search.stop == "pbt")
            )
        for name, figure in pictures(search, trials).items():
            files.append(out / f"{name}.png")
            with explain_disk_errors(files[-1]), atomic_file(files[-1]) as part:
                figure.savefig(part, format="png", bbox_inches="tight")
    return files


def winner_recipe(config: Config, scores: str, name: str, trials: int, out: AnyPath, moved: bool) -> str:
    """Return the winner's recipe as TOML, which has no null: fields that are None are left out and keep this default.

    Args:
        config: the recipe with the winner's values.
        scores: its objectives, and what they were measured on.
        name: the winning trial.
        trials: number of trials.
        out: folder of the search.
        moved: the trial may have trained with other values before (population-based training).
    """
    lines = [
        f"# The best of {trials} trials: {name} in {out}",
        "#   command    bigface train winner.toml",
        f"#   score      {scores}",
    ]
    if moved:
        lines.append("#              after a schedule of values (ray/pbt_*), of which these are the last")
    return "\n".join(lines) + "\n" + tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def pictures(search: Search, trials: Sequence[Trial]) -> dict[str, "Figure"]:
    """Draw Optuna's pictures by name: parallel coordinates, importances (PED-ANOVA) and, for two objectives, the front.

    Parallel coordinates and importances are those of the first objective.
    """
    import matplotlib

    matplotlib.use("Agg")
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator
    from optuna.visualization import matplotlib as plots
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = search.objectives
    study = optuna.create_study(directions=["minimize" if mode(name) == "min" else "maximize" for name in names])
    distributions = OptunaSearch.convert_search_space({k.name: ray_domain(k.domain, False) for k in search.knobs})
    for trial in trials:
        if trial.state == "finished" and all(name in trial.figures for name in names):
            values = [trial.figures[name] for name in names]
            past = optuna.trial.create_trial(params=trial.values, distributions=distributions, values=values)
            study.add_trial(past)
    made: dict[str, Any] = {}  # axes of Matplotlib by picture
    first = (lambda t: t.values[0]) if search.against else None  # without a target, Optuna draws the best dark
    with warnings.catch_warnings(action="ignore"):  # Optuna warns that its pictures are experimental
        made["parallel"] = plots.plot_parallel_coordinate(study, target=first, target_name=names[0])
        made["parallel"].figure.set_size_inches(1.8 * (1 + len(search.knobs)), 5)  # leaves room for the axes' numbers
        if len({trial.values[0] for trial in study.trials}) > 1:  # else no knob matters
            sign = -1 if mode(names[0]) == "max" else 1  # PED-ANOVA asks what makes its target low
            made["importance"] = plots.plot_param_importances(
                study,
                evaluator=PedAnovaImportanceEvaluator(),
                target=lambda t: sign * t.values[0],
                target_name=names[0],
            )
            made["importance"].get_legend().remove()  # the axis names the only target
        if search.against:
            made["pareto"] = plots.plot_pareto_front(study, target_names=names)
    return {name: axes.figure for name, axes in made.items()}


def deliver_trials(trials: Sequence[Trial], config: Config, out: AnyPath) -> None:
    """Send MLflow the figures that trials could not deliver, and close the runs of trials that did not finish.

    This covers trials that Ray Tune had not yet noted. If MLflow fails, a warning says so.
    """
    states = {trial.name: trial.state for trial in trials}
    try:
        client, _ = within(MOST_WAIT, partial(open_mlflow, config.tracking, out.parent))
        for path in find_paths(out / "trials", "*/run.json"):
            run_id, trial = json.loads(path.read_text())["run_id"], path.parent.name.partition(FOLD)[0]
            state = states.get(trial)
            if run_id and (left := read_undelivered(path.parent, sys.maxsize)):
                outbox = Outbox(config.tracking, partial(tuple, (client, run_id)), path.parent)
                for letter in [*left, ["status", "FINISHED"]]:
                    outbox.post(letter)
                outbox.close()
            if run_id and state != "finished" and not (path.parent / "report.json").is_file():
                status = "FAILED" if state == "failed" else "KILLED"
                within(MOST_WAIT, partial(client.set_terminated, run_id, status))
    except Exception as error:  # MLflow passes on any error of its database or store
        log.warning("MLflow does not know how the trials ended: %s", first_line(error))
