"""``bigface runs``: what was trained, with what, how far it came and how good it is; from MLflow and from folders."""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fr_core.config.recipes import flat
from fr_core.errors import UserError
from fr_core.train.metrics import read_metrics
from fr_core.train.mlflow_runs import PARENT_TAG, search_mlflow
from fr_core.verify.report import smaller_is_better

if TYPE_CHECKING:
    from mlflow.entities import Run as TrackedRun

TAR = "tar_at_far_1e-3"


@dataclass(frozen=True)
class Run:
    """One run, or a comparison or search with its runs as children."""

    name: str
    method: str
    net: str
    schedule: str
    state: str  # MLflow's: RUNNING, FINISHED, FAILED, KILLED; of a folder alone: FINISHED or UNFINISHED
    started: float  # seconds since 1970
    minutes: float | None  # from its start to its end, or to now
    figures: Mapping[str, float]  # the last of each
    run_id: str | None = None
    parent: str | None = None
    children: list["Run"] = field(default_factory=list)


def runs(folder: Path | None, uri: str | None, experiment: str | None, query: str, sort: str, limit: int) -> list[Run]:
    """The first runs of an order; a child stands below its parent, in the same order.

    Args:
        folder: of runs; with their ``mlflow.db`` unless ``uri`` names another, and runs that no MLflow knows.
        uri: of MLflow; None: the folder's.
        query: MLflow's filter; folders cannot be asked, and their runs are left out where there is one.
        sort: started, name or a figure, which comes best first; runs without it come last.
        limit: runs that are shown, children not counted.

    Raises:
        UserError: nothing there, no such figure, or a filter that MLflow does not understand.
    """
    database = None if folder is None else folder / "mlflow.db"
    if uri is None and database is not None and database.is_file():
        uri = f"sqlite:///{database}"
    if folder is not None and not folder.is_dir():
        raise UserError(f"{folder}: no folder of runs: give another, or --uri")
    found = [_tracked(run) for run in search_mlflow(uri, experiment, query)] if uri else []
    if folder is not None and not query:
        known = {run.run_id for run in found}
        found += [run for run in _in_folders(folder, experiment) if run.run_id not in known]
    if not found:
        raise UserError(f"no runs in {uri or folder}")
    if sort not in ("started", "name") and not any(sort in run.figures for run in found):
        have = sorted({name for run in found for name in run.figures})
        raise UserError(f"--sort {sort}: no run has this figure: started, name, {', '.join(have)}")
    return _sorted(_trees(found), sort)[:limit]


def run_table(trees: Iterable[Run]) -> list[tuple[str, ...]]:
    """Header first; children are indented."""
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
    """All runs for JSON, parents before children, each with its depth. Figures that are not finite are left out."""
    names = ("name", "run_id", "parent", "method", "net", "schedule", "state", "started", "minutes")
    return [
        {name: getattr(run, name) for name in names}
        | {"depth": depth, "figures": {name: value for name, value in run.figures.items() if math.isfinite(value)}}
        for run, depth in _walk(trees)
    ]


def _tracked(run: "TrackedRun") -> Run:
    """Of MLflow's."""
    params, info = run.data.params, run.info
    end = info.end_time or (time.time() * 1000 if info.status == "RUNNING" else None)
    return Run(
        info.run_name,
        *_kinds(params),
        info.status,
        info.start_time / 1000,
        (end - info.start_time) / 60_000 if end else None,
        run.data.metrics,
        info.run_id,
        run.data.tags.get(PARENT_TAG),
    )


def _in_folders(folder: Path, experiment: str | None) -> Iterator[Run]:
    """Runs of an experiment, or of all, that lie in a folder, or in folders in it."""
    for facts in sorted(folder.rglob("run.json")):
        out = facts.parent
        try:
            run = json.loads(facts.read_text())
            config, run_id, started = flat(run["config"]), run["run_id"], float(run["started"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another program's
        if experiment not in (None, config.get("tracking.experiment")):
            continue
        report = out / "report.json"
        rows = read_metrics(out)
        figures: dict[str, float] = {"steps": rows[-1]["step"], **rows[-1]} if rows else {}
        with suppress(OSError, ValueError, KeyError, TypeError):
            figures |= json.loads(report.read_text())["figures"]
        state = "FINISHED" if report.is_file() else "UNFINISHED"
        minutes = figures["seconds"] / 60 if "seconds" in figures else None
        yield Run(out.name, *_kinds(config), state, started, minutes, figures, run_id)


def _kinds(config: Mapping[str, Any]) -> tuple[str, str, str]:
    """Method, net and schedule, of a flat config; none of what is no training."""
    net = "net.net" if config.get("net.kind") == "quantised" else "net"
    bits = f" w{config['net.weights']}a{config['net.activations']}" if net == "net.net" else ""
    named = f"{config.get(f'{net}.kind', '')}{config.get(f'{net}.depth', '')}{bits}"
    return config.get("method.kind", ""), named, config.get("schedule.kind", "")


def _trees(found: list[Run]) -> list[Run]:
    """Puts children under their parents, where these were found too; the others stand at the top."""
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
    """Lower is better, by the best of a run and its children."""
    value = run.figures.get(figure, math.nan)
    own = math.inf if math.isnan(value) else value if smaller_is_better(figure) else -value
    return min([own, *(_rank(child, figure) for child in run.children)])


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
        run.state.lower(),
        shown(",.0f", "steps"),
        shown(".2f", "epochs", "epoch"),
        shown(".4f", "accuracy"),
        shown(".4f", TAR),
        "" if run.minutes is None else f"{run.minutes:.1f}",
        f"{datetime.fromtimestamp(run.started):%m-%d %H:%M}",
    )
