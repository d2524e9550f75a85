"""Runs in MLflow: open, group and search them, and add later figures."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from fr_core.config.sections import Tracking
from fr_core.data.store import AnyPath, RemotePath, local_copy
from fr_core.errors import UserError
from fr_core.nets.verifications import run_folder
from fr_core.train.metrics import PARAMETERS, report_figures
from fr_core.train.outbox import first_line, log, refused, try_briefly

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

FILTER_EXAMPLE = "--filter \"params.`method.kind` = 'attfc'\""
PARENT_TAG, COMPARISON_TAG = "mlflow.parentRunId", "bigface.comparison"


def open_mlflow(tracking: Tracking, folder: AnyPath) -> "tuple[MlflowClient, str]":
    """Return a client and the id of the experiment. The experiment is made if it does not exist.

    Args:
        folder: folder of the runs; it holds the database, unless ``tracking.uri`` names another.

    Raises:
        UserError: ``folder`` is a URL, which cannot hold a database, and no ``tracking.uri`` is given.
    """
    from mlflow import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it tells how it sets up a new database
    if tracking.uri is None and isinstance(folder, RemotePath):
        raise UserError(f"{folder} is a URL and cannot hold MLflow's database: give tracking.uri, or tracking.uri=off")
    uri = tracking.uri or f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment is not None:
        return client, experiment.experiment_id
    database = uri.removeprefix("sqlite:///")
    beside = None if database == uri else f"file://{Path(database).resolve().parent}/mlartifacts"
    return client, client.create_experiment(tracking.experiment, artifact_location=beside)


def log_verification(ref: AnyPath, name: str, figures: Mapping[str, float], files: Iterable[Path] = ()) -> str | None:
    """Add figures of a later verification to the MLflow run that trained the net, as ``NAME/FIGURE``.

    Args:
        ref: path that the net was opened from. Only a run's folder, or a checkpoint in it, leads to an MLflow run.
        files: pictures and tables to add, under ``verify/NAME``.

    Returns:
        The id of the MLflow run, or None if there is none.

    Raises:
        UserError: MLflow refuses.
    """
    run = run_folder(ref)
    run_id = saved_run_id(run) if run else None
    if run is None or run_id is None:
        return None
    from mlflow.entities import Metric

    try:
        tracking = Tracking.model_validate(json.loads((run / "run.json").read_text())["config"]["tracking"])
        if tracking.uri is None and not (run.parent / "mlflow.db").is_file():  # the folder was copied from elsewhere
            return None
        client, _ = open_mlflow(tracking, run.parent)
        now = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[Metric(f"{name}/{n}", float(value), now, 0) for n, value in figures.items()])
        for path in files:
            client.log_artifact(run_id, str(path), f"verify/{name}")
    except Exception as error:  # MLflow passes on any error of its database or store
        raise UserError(f"{run}: cannot add figures to its MLflow run: {first_line(error)}") from None
    return run_id


class Comparison:
    """The parent MLflow run of a comparison or a search. The same results file goes on with the same parent run.

    If the server is away, the runs go on without a parent run, and ``run_id`` is None.

    Args:
        results: results file of the comparison or the search.
        anew: start a new parent run, since earlier results at this path were replaced.

    Raises:
        UserError: MLflow refuses, or its database cannot be made.
    """

    def __init__(self, tracking: Tracking, results: AnyPath, anew: bool = False) -> None:
        folder = results.resolve().parent
        self.uri = tracking.uri or f"sqlite:///{folder}/mlflow.db"
        self.run_id: str | None = None
        key = hashlib.sha256(str(results.resolve()).encode()).hexdigest()
        try_briefly()
        try:
            self.client, experiment = open_mlflow(tracking, folder)
            tagged = f"tags.`{COMPARISON_TAG}` = '{key}'"
            found = [] if anew else self.client.search_runs([experiment], tagged, max_results=1)  # the newest
            if found:
                run = found[0]
            else:
                name, tags = PurePath(results.name).stem, {COMPARISON_TAG: key}
                run = self.client.create_run(experiment, run_name=name, tags=tags)
            self.client.update_run(run.info.run_id, status="RUNNING")
            self.run_id = run.info.run_id
        except Exception as error:  # MLflow passes on any error of its database or store
            if refused(error) or not self.uri.startswith("http"):
                raise UserError(f"tracking.uri = {self.uri}: {first_line(error)}") from None
            log.warning("MLflow cannot be reached; runs get no parent run there: %s", first_line(error))

    def close(self, table: str, files: Iterable[AnyPath] = (), status: str = "FINISHED") -> None:
        """Add the table in Markdown, and files, and end the parent run. Log a warning if MLflow cannot be reached.

        Args:
            status: FINISHED, FAILED or KILLED.
        """
        if self.run_id is None:
            return
        try:
            self.client.log_text(self.run_id, table, "comparison.md")
            for path in files:
                with local_copy(path) as file:
                    self.client.log_artifact(self.run_id, str(file))
            self.client.set_terminated(self.run_id, status)
        except Exception as error:  # MLflow passes on any error of its database or store
            log.warning("MLflow could not record the end of run %s: %s", self.run_id, first_line(error))


def finished_runs(uri: str, experiment: str, query: str) -> list[tuple[str, Callable[[], dict[str, float]]]]:
    """List the finished trainings of an MLflow experiment: a name, and a function that reads the figures.

    The figures are those of :func:`report_figures`, and of later verifications (``NAME/FIGURE``).

    Args:
        query: filter in MLflow's syntax; empty for all runs.

    Raises:
        UserError: the database or the experiment does not exist, or MLflow does not understand the filter.
    """
    from mlflow import MlflowClient

    finished = " and ".join(filter(None, [query, "attributes.status = 'FINISHED'"]))
    trainings = [run for run in search_mlflow(uri, experiment, finished) if COMPARISON_TAG not in run.data.tags]
    client = MlflowClient(uri)
    return [(run.info.run_name, partial(_tracked_figures, client, run)) for run in trainings]


def search_mlflow(uri: str, experiment: str | None, query: str) -> "list[Run]":
    """Return the runs of an MLflow experiment, or of all experiments.

    Args:
        query: filter in MLflow's syntax; empty for all runs.

    Raises:
        UserError: the database or the experiment does not exist, or MLflow does not understand the filter.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    database = uri.removeprefix("sqlite:///")
    if database != uri and not Path(database).is_file():  # MLflow would create an empty one
        raise UserError(f"{uri}: no such database: give --uri, or folders of runs")
    try:
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(experiment) if experiment else None
        if experiment and found is None:
            raise UserError(f"{uri}: no experiment {experiment!r}: give --experiment")
        searched = [found] if found else client.search_experiments()
        ids = [one.experiment_id for one in searched]
        page = client.search_runs(ids, query)
        runs = list(page)
        while page.token:
            page = client.search_runs(ids, query, page_token=page.token)
            runs += page
    except MlflowException as error:
        mend = f": write it like {FILTER_EXAMPLE}" if query and "filter" in str(error).lower() else ""
        raise UserError(f"{uri}: {str(error).splitlines()[0]}{mend}") from None
    return runs


def _tracked_figures(client: "MlflowClient", run: "Run") -> dict[str, float]:
    from mlflow.exceptions import MlflowException

    metrics = run.data.metrics
    if PARAMETERS in metrics:
        return metrics
    with TemporaryDirectory() as folder:
        try:
            client.download_artifacts(run.info.run_id, "report.json", folder)
        except (MlflowException, OSError):
            raise UserError("no report.json among its artifacts") from None
        return report_figures(Path(folder)) | metrics


def saved_run_id(out: AnyPath) -> str | None:
    """Read the id of a run's MLflow run from its ``run.json``; None if there is none."""
    try:
        return json.loads((out / "run.json").read_text())["run_id"]
    except (OSError, ValueError, KeyError):
        return None
