"""Runs in MLflow: open, group and search them, and add later figures."""

import hashlib
import json
import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from fr_core.config.sections import Tracking
from fr_core.data.store import AnyPath, RemotePath, local_copy
from fr_core.errors import StorageError, UserError
from fr_core.nets.verifications import run_folder
from fr_core.train.metrics import PARAMETERS, report_figures
from fr_core.train.outbox import first_line, is_mistake, log, refused, try_briefly, within
from fr_core.train.page import CHOOSE_VIEW, NOTE, describe, origin_tags
from fr_core.verify.report import markdown

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

FILTER_EXAMPLE = "--filter \"params.`method.kind` = 'attfc'\""
MOST_WAIT = 60.0  # seconds for what a command does in MLflow beside a run
LOCK_WAIT = 5.0  # seconds in which another program may end what it writes
ADDRESSES = "give a server's http://…, a file as sqlite:///FILE, or off"
PARENT_TAG, COMPARISON_TAG = "mlflow.parentRunId", "bigface.comparison"


def open_mlflow(tracking: Tracking, folder: AnyPath) -> "tuple[MlflowClient, str]":
    """Return a client and the id of the experiment. The database and the experiment are made if they do not exist.

    Args:
        folder: folder of the runs; it holds the database, unless ``tracking.uri`` names another.

    Raises:
        UserError: the address can never work. MLflow knows no such address, its folder cannot be made, or it is not
            given and ``folder`` is a URL.
        Exception: MLflow fails, or the experiment was deleted.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it tells how it sets up a new database
    if tracking.uri is None and isinstance(folder, RemotePath):
        raise UserError(f"{folder} is a URL and cannot hold MLflow's database: give tracking.uri, or tracking.uri=off")
    uri = tracking.uri or f"sqlite:///{folder}/mlflow.db"
    database = _database_file(uri)
    try:
        if database:
            database.parent.mkdir(parents=True, exist_ok=True)
            _make_database(database)
            _check_database(database, uri)
        client = MlflowClient(uri)
    except (MlflowException, FileExistsError, NotADirectoryError) as error:
        if refused(error) or isinstance(error, OSError):
            raise UserError(f"tracking.uri = {uri}: {first_line(error)}: {ADDRESSES}") from None
        raise
    beside = f"file://{database.resolve().parent}/mlartifacts" if database else None
    return client, _experiment(client, tracking.experiment, beside)


def _database_file(uri: str) -> Path | None:
    """Return the file of an SQLite database; None for other addresses."""
    scheme, _, file = uri.partition("sqlite:///")
    return Path(file.partition("?")[0]) if file and not scheme else None


def _make_database(file: Path) -> None:
    """Make MLflow's database if it does not exist. The file is whole or absent, also if several runs begin at once."""
    from mlflow import MlflowClient

    if file.exists():
        return
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        MlflowClient(f"sqlite:///{part}")
        try:
            os.link(part, file)  # unlike a move, it fails where another run was faster
        except FileExistsError:
            return
        except OSError:  # a file system without links
            part.rename(file)
    finally:
        part.unlink(missing_ok=True)


def _experiment(client: "MlflowClient", name: str, artifacts: str | None) -> str:
    """Return the id of an experiment, which is made if it does not exist, also if several runs begin at once.

    Args:
        artifacts: where files of a new experiment go; None: where the server puts them.

    Raises:
        MlflowException: the experiment was deleted, or MLflow fails.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifacts, tags={NOTE: CHOOSE_VIEW})
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise MlflowException(
            f"experiment {name!r} was deleted: give tracking.experiment=NAME, or restore it by "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}`"
        )
    return found.experiment_id


def log_verification(ref: AnyPath, name: str, figures: Mapping[str, float], files: Iterable[Path] = ()) -> str | None:
    """Add figures of a later verification to the MLflow run that trained the net, as ``NAME/FIGURE``.

    Args:
        ref: path that the net was opened from. Only a run's folder, or a checkpoint in it, leads to an MLflow run.
        files: pictures and tables to add, under ``verify/NAME``.

    Returns:
        The id of the MLflow run, or None if there is none, or if MLflow fails, which a warning says.
    """
    run = run_folder(ref)
    run_id = saved_run_id(run) if run else None
    if run is None or run_id is None:
        return None

    def add() -> str | None:
        from mlflow.entities import Metric

        try_briefly()
        tracking = Tracking.model_validate(json.loads((run / "run.json").read_text())["config"]["tracking"])
        if tracking.uri is None and not (run.parent / "mlflow.db").is_file():  # the folder was copied from elsewhere
            return None
        client, _ = open_mlflow(tracking, run.parent)
        now = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[Metric(f"{name}/{n}", float(value), now, 0) for n, value in figures.items()])
        for path in files:
            client.log_artifact(run_id, str(path), f"verify/{name}")
        return run_id

    try:
        return within(MOST_WAIT, add)
    except Exception as error:  # MLflow passes on any error of its database or store
        log.warning("%s: figures are not added to its MLflow run: %s", run, first_line(error))
        return None


class Comparison:
    """The parent MLflow run of a comparison or a search. The same results file goes on with the same parent run.

    If MLflow fails, the runs go on without a parent run, and ``run_id`` is None.

    Args:
        results: results file of the comparison or the search.
        origin: how it was started, as a run's folder tells it.
        anew: start a new parent run, since earlier results at this path were replaced.

    Raises:
        UserError: the address can never work.
    """

    def __init__(self, tracking: Tracking, results: AnyPath, origin: Mapping[str, str], anew: bool = False) -> None:
        self.tracking, self.results, self.origin = tracking, results.resolve(), origin
        self.uri = tracking.uri or f"sqlite:///{self.results.parent}/mlflow.db"
        self.run_id: str | None = None
        try_briefly()
        try:
            self.client, self.run_id = within(MOST_WAIT, partial(self._open, anew))
        except Exception as error:  # MLflow passes on any error of its database or store
            if is_mistake(error):
                raise
            log.warning("MLflow (%s) fails; runs get no parent run there: %s", self.uri, first_line(error))

    def _open(self, anew: bool) -> "tuple[MlflowClient, str]":
        """Make the parent run, or open that of earlier results at this path."""
        client, experiment = open_mlflow(self.tracking, self.results.parent)
        key = hashlib.sha256(str(self.results).encode()).hexdigest()
        tagged = f"tags.`{COMPARISON_TAG}` = '{key}'"
        found = [] if anew else client.search_runs([experiment], tagged, max_results=1)  # the newest
        if found:
            run = found[0]
        else:
            name, tags = PurePath(self.results.name).stem, {COMPARISON_TAG: key, **origin_tags(self.origin)}
            run = client.create_run(experiment, run_name=name, tags=tags)
        client.update_run(run.info.run_id, status="RUNNING")
        return client, run.info.run_id

    def close(
        self,
        verdict: str,
        table: list[tuple[str, ...]],
        files: Iterable[AnyPath] = (),
        status: str = "FINISHED",
        figures: Mapping[str, float] | None = None,
    ) -> None:
        """Describe the parent run by a verdict and a table, add files, and end it. Log a warning if MLflow fails.

        Args:
            verdict: what was found, in Markdown.
            table: figures of the runs, header first.
            status: FINISHED, FAILED or KILLED.
            figures: those that the run list shows for the whole.
        """
        run_id = self.run_id
        if run_id is None:
            return

        def end() -> None:
            self.client.set_tag(run_id, NOTE, describe(self.origin, verdict, table))
            self.client.log_text(run_id, f"{verdict}\n\n{markdown(table)}", "comparison.md")
            for name, value in (figures or {}).items():
                self.client.log_metric(run_id, name, value)
            for path in files:
                with local_copy(path) as file:
                    self.client.log_artifact(run_id, str(file))
            self.client.set_terminated(run_id, status)

        try:
            within(MOST_WAIT, end)
        except Exception as error:  # MLflow passes on any error of its database or store
            log.warning("MLflow could not record the end of run %s: %s", run_id, first_line(error))


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
        StorageError: the database is locked or cannot be read.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try_briefly()
    file = _database_file(uri)
    if file and not file.is_file():  # MLflow would make one
        raise UserError(f"{uri}: no such database: give --uri, or folders of runs")
    try:
        if file:
            _check_database(file, uri)
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
    except UserError:
        raise
    except MlflowException as error:
        mend = f": write it like {FILTER_EXAMPLE}" if query and "filter" in str(error).lower() else ""
        raise UserError(f"{uri}: {first_line(error)}{mend}") from None
    except Exception as error:  # MLflow passes on any error of its database or store
        raise StorageError(f"{uri}: {first_line(error)}") from None
    return runs


def _check_database(file: Path, uri: str) -> None:
    """Read which version of MLflow's tables a database has. MLflow would make what is missing, and wait for long.

    Raises:
        StorageError: it is no whole database of MLflow, or another program has locked it.
    """
    version, reason = None, "no version"
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", timeout=LOCK_WAIT, uri=True)) as database:
            version = database.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error as error:
        reason = first_line(error)
    if reason == "database is locked":
        raise StorageError(f"{uri}: another program has locked it: try again when that has ended")
    if version is None:
        raise StorageError(f"{uri}: no whole database of MLflow ({reason}): move it away; the next run makes a new one")


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
