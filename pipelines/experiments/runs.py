"""``bigface runs``: list runs with their settings, progress and scores, from MLflow and from folders."""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fr_core.config.recipes import flat
from fr_core.errors import StorageError, UserError
from fr_core.nets.verifications import newest_verification
from fr_core.train.metrics import read_metrics
from fr_core.train.mlflow_runs import PARENT_TAG, saved_run_id, search_mlflow
from fr_core.verify.report import smaller_is_better
from pipelines.experiments.states import OF_MLFLOW, State
from pipelines.logs import log
from pipelines.train import SILENCE, last_touched

if TYPE_CHECKING:
    from mlflow.entities import Run as TrackedRun

TAR = "tar_at_far_1e-3"
SCORES = ("accuracy", TAR)  # columns of the table
COLUMNS = (  # of the table, those first that a narrow terminal shows
    *("run", "state", "accuracy", "steps", "started", "TAR@1e-3", "minutes"),
    *("method", "net", "schedule", "epochs"),
)
SUGGESTED = 8  # orders that an error names
LATER = tuple(f"/{name}" for name in SCORES)


@dataclass(frozen=True)
class Run:
    """One run, or a comparison or search whose runs are its children."""

    name: str
    method: str
    net: str
    schedule: str
    state: State
    started: float  # seconds since 1970
    minutes: float | None  # from the start to the end, or to now
    figures: Mapping[str, float]  # the last value of each
    run_id: str | None = None
    parent: str | None = None
    silent_since: float | None = None  # seconds since 1970; None: it gives signs of life, or nobody knows
    children: list["Run"] = field(default_factory=list)


def runs(folder: Path | None, uri: str | None, experiment: str | None, query: str, sort: str, limit: int) -> list[Run]:
    """List the first runs in an order, each child below its parent in the same order.

    Args:
        folder: folder of runs. It is searched at any depth, also for runs that MLflow does not know.
        uri: MLflow's database or server; None: the ``mlflow.db`` of ``folder`` and those beside its runs.
        experiment: name in MLflow; None: all experiments.
        query: filter of MLflow. Folders understand no filter, so runs that only a folder knows are left out.
        sort: started, name or a figure. The best figure comes first, and runs without the figure come last.
        limit: runs to show, children not counted.

    Raises:
        UserError: there are no runs, no run has the figure, or MLflow does not understand the filter.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"{folder}: no folder of runs: give another, or --uri")
    in_folders = [] if folder is None else list(_in_folders(folder, experiment))
    by_id = {run.run_id: run for run in in_folders if run.run_id}
    tracked = _all_tracked([uri] if uri else _databases(folder), experiment, query, bool(in_folders and not query))
    if folder is not None and (folder / "run.json").is_file():  # one run, whose database also knows the runs beside it
        tracked = [run for run in tracked if run.info.run_id in by_id]
    found = [_tracked(run, by_id.get(run.info.run_id)) for run in tracked]
    if not query:
        known = {run.run_id for run in found}
        found += [run for run in in_folders if run.run_id not in known]
    if not found:
        raise UserError(f"{uri or folder}: no runs there: bigface train RECIPE trains one")
    if sort not in ("started", "name") and not any(sort in run.figures for run in found):
        have = sorted({name for run in found for name in run.figures})
        raise UserError(f"--sort {sort}: no run has this figure: {_nearest_orders(sort, have)}")
    return _sorted(_trees(found), sort)[:limit]


def _nearest_orders(sort: str, figures: list[str]) -> str:
    """Return the orders whose names are like an unknown one; the first few where none is."""
    orders = ["started", "name", *figures]
    near = [name for name in orders if name.startswith(sort)] or get_close_matches(sort, orders, 3)
    if near:
        return f"did you mean {' or '.join(near[:3])}?"
    return f"use one of {', '.join(orders[:SUGGESTED])}{' …; --json lists all' * (len(orders) > SUGGESTED)}"


def run_table(trees: Iterable[Run]) -> list[tuple[str, ...]]:
    """Return a row for each run, header first; children are indented."""
    header = (
        "run",
        "method",
        "net",
        "schedule",
        "state",
        "steps",
        "epochs",
        "accuracy",
        "TAR@1e-3",
        "minutes",
        "started",
    )
    return [header, *(_row(run, depth) for run, depth in _walk(trees))]


def run_facts(trees: Iterable[Run]) -> list[dict[str, Any]]:
    """Return all runs for JSON, parents before children, each with its depth, without figures that are not finite."""
    names = ("name", "run_id", "parent", "method", "net", "schedule", "state", "started", "minutes")
    return [
        {name: getattr(run, name) for name in names}
        | {"depth": depth, "figures": {name: value for name, value in run.figures.items() if math.isfinite(value)}}
        for run, depth in _walk(trees)
    ]


def _databases(folder: Path | None) -> list[str]:
    """Return the URIs of a folder's database and of the databases beside the runs in it."""
    if folder is None:
        return []
    run_folders = [facts.resolve().parent for facts in sorted(folder.rglob("run.json"))]
    folders = dict.fromkeys([folder.resolve(), *(run.parent for run in run_folders)])
    files = [place / "mlflow.db" for place in folders]
    return [f"sqlite:///{file}" for file in files if file.is_file()]


def _all_tracked(uris: list[str], experiment: str | None, query: str, others: bool) -> list["TrackedRun"]:
    """Return the runs of several databases, without those whose folders newer runs took.

    Args:
        others: whether folders know runs. Then databases that cannot be read cost no more than a warning.

    Raises:
        UserError: no database can be searched.
    """
    found: list[TrackedRun] = []
    errors: list[UserError] = []
    for uri in uris:
        try:
            found += [run for run in search_mlflow(uri, experiment, query) if not _replaced(run, uri)]
        except UserError as error:  # such as an experiment that only another database has
            errors.append(error)
    unreadable = [error for error in errors if isinstance(error, StorageError)]
    if errors and len(errors) == len(uris) and not (others and unreadable == errors):
        raise errors[0]
    for reason in unreadable:
        log.warning("runs are shown as their folders tell: %s", reason)
    return found


def _replaced(run: "TrackedRun", uri: str) -> bool:
    """Return whether the folder of a run's name, beside the database, holds another run by now."""
    database = uri.removeprefix("sqlite:///")
    if database == uri or PARENT_TAG in run.data.tags:
        return False
    return saved_run_id(Path(database).parent / run.info.run_name) not in (None, run.info.run_id)


def _tracked(run: "TrackedRun", in_folder: Run | None) -> Run:
    """Return a run as MLflow knows it.

    Args:
        in_folder: the same run as its folder shows it, if the folder was found. Its scores are newer than MLflow's, it
            tells whether a run still takes steps, and how long a finished run trained.
    """
    params, info = run.data.params, run.info
    state = OF_MLFLOW.get(info.status, "running")
    minutes = (info.end_time - info.start_time) / 60_000 if info.end_time else None
    if info.status == "RUNNING":
        minutes = time.time() / 60 - info.start_time / 60_000
    if in_folder and info.status == "RUNNING" and in_folder.silent_since is not None:
        state, minutes = "interrupted", in_folder.silent_since / 60 - info.start_time / 60_000
    if in_folder and info.status == "FINISHED" and in_folder.minutes is not None:
        minutes = in_folder.minutes
    scores = _scores(in_folder.figures) if in_folder else {}
    return Run(
        info.run_name,
        *_kinds(params),
        state,
        info.start_time / 1000,
        minutes,
        {**_later_scores(run.data.metrics), **run.data.metrics, **scores},
        info.run_id,
        run.data.tags.get(PARENT_TAG),
    )


def _scores(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: figures[name] for name in SCORES if name in figures}


def _later_scores(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the scores of later verifications, which MLflow calls NAME/FIGURE; of several, the last by name."""
    return {name.rpartition("/")[2]: metrics[name] for name in sorted(metrics) if name.endswith(LATER)}


def _in_folders(folder: Path, experiment: str | None) -> Iterator[Run]:
    """Yield the runs of an experiment, or of all, that lie in a folder at any depth."""
    for facts in sorted(folder.rglob("run.json")):
        out = facts.parent
        try:
            run = json.loads(facts.read_text())
            config, run_id, started = flat(run["config"]), run["run_id"], float(run["started"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # the file of another program
        if experiment not in (None, config.get("tracking.experiment")):
            continue
        rows = read_metrics(out)
        figures: dict[str, float] = {"steps": rows[-1]["step"], **rows[-1]} if rows else {}
        with suppress(OSError, ValueError, KeyError, TypeError):
            figures |= json.loads((out / "report.json").read_text())["figures"]
        verified = newest_verification(out)
        figures |= _scores(verified.figures) if verified else {}
        minutes = figures["seconds"] / 60 if "seconds" in figures else None
        silent_since = _silent_since(out, facts)
        yield Run(out.name, *_kinds(config), _state(out), started, minutes, figures, run_id, silent_since=silent_since)


def _state(out: Path) -> State:
    """Return the state of a run that only its folder knows."""
    if (out / "report.json").is_file():
        return "finished"
    touched = last_touched(out)  # every few seconds while steps are taken
    return "running" if touched and time.time() - touched / 1e9 < SILENCE else "interrupted"


def _silent_since(out: Path, facts: Path) -> float | None:
    """Return when a run last gave a sign of life, in seconds since 1970, or None if that was a moment ago.

    Args:
        facts: ``run.json``, which is written when the run starts or is resumed.
    """
    seen = max(facts.stat().st_mtime_ns, last_touched(out) or 0) / 1e9
    return seen if time.time() - seen > SILENCE else None


def _kinds(config: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return method, net and schedule of a flat config; empty texts for what is no training."""
    net = "net.net" if config.get("net.kind") == "quantised" else "net"
    bits = f" w{config['net.weights']}a{config['net.activations']}" if net == "net.net" else ""
    named = f"{config.get(f'{net}.kind', '')}{config.get(f'{net}.depth', '')}{bits}"
    return config.get("method.kind", ""), named, config.get("schedule.kind", "")


def _trees(found: list[Run]) -> list[Run]:
    """Put children under their parents; a run whose parent was not found stands at the top."""
    by_id = {run.run_id: run for run in found if run.run_id}
    tops = []
    for run in found:
        if run.parent in by_id:
            by_id[run.parent].children.append(run)
        else:
            tops.append(run)
    return tops


def _sorted(trees: list[Run], sort: str) -> list[Run]:
    for run in trees:
        run.children[:] = _sorted(run.children, sort)
    if sort == "name":
        return sorted(trees, key=lambda run: run.name)
    newest = sorted(trees, key=lambda run: -run.started)
    return newest if sort == "started" else sorted(newest, key=lambda run: _rank(run, sort))


def _rank(run: Run, figure: str) -> float:
    """Return a number by which the best of a run and its children comes first, the lowest number first."""
    value = run.figures.get(figure, math.nan)
    signed = value if smaller_is_better(figure) else -value
    rank = math.inf if math.isnan(value) else signed
    return min([rank, *(_rank(child, figure) for child in run.children)])


def _walk(trees: Iterable[Run], depth: int = 0) -> Iterator[tuple[Run, int]]:
    for run in trees:
        yield run, depth
        yield from _walk(run.children, depth + 1)


def _row(run: Run, depth: int) -> tuple[str, ...]:
    def shown(form: str, *names: str) -> str:
        return next((format(run.figures[name], form) for name in names if name in run.figures), "")

    return (
        "  " * depth + run.name,
        run.method,
        run.net,
        run.schedule,
        run.state,
        shown(",.0f", "steps"),
        shown(".2f", "epochs", "epoch"),
        *(_share(run.figures[name]) if name in run.figures else "" for name in SCORES),
        "" if run.minutes is None else f"{run.minutes:.1f}",
        f"{datetime.fromtimestamp(run.started):%m-%d %H:%M}",
    )


def _share(value: float) -> str:
    """Return a share with four decimals, or in scientific notation where these would all be 0."""
    return f"{value:.2g}" if 0 < abs(value) < 5e-5 else f"{value:.4f}"
