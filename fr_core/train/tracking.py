"""Where a run's figures go: ``metrics.csv`` in its folder, and MLflow. Rank 0 alone tracks.

Parameters, losses, rates, throughput, a sample batch, curves and the report. A restarted run goes on in the same
MLflow run, whose id its checkpoints and ``run.json`` carry.
"""

import csv
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

from matplotlib.figure import Figure

from fr_core.config import Config, Tracking, flat, parse_config
from fr_core.data.store import AnyPath, RemotePath, fetched, writable, write_text_atomically, written
from fr_core.data.stream import Batch
from fr_core.errors import UserError
from fr_core.losses.ekd import THRESHOLDS
from fr_core.train.outbox import (
    CALL_METRICS,
    HEALTHY_WAIT,
    Outbox,
    first_line,
    log,
    read_undelivered,
    refused,
    try_briefly,
)
from fr_core.train.state import parameter_figures
from fr_core.verify.report import contact_sheet

COLUMNS = (
    *("step", "epoch", "loss", "lr", "grad_norm", "head_grad_norm"),
    *("margin_loss", "distill_loss"),  # of a distilled run
    *("positive_loss", "negative_loss", *THRESHOLDS),  # of quantface
    *("detector", "stationary"),  # of FastFace
    *("images_per_second", "data_wait"),
)
PANELS = {
    "loss": "loss",
    "distill_loss": "distance to the teacher",
    "positive_loss": "positives' loss",
    "negative_loss": "negatives' loss",
    "detector": "fall of the loss",
    "lr": "learning rate",
    "images_per_second": "images/s",
}
PARAMETERS = "backbone_parameters"  # a figure that older reports lack
PARENT_TAG, COMPARISON_TAG = "mlflow.parentRunId", "bigface.comparison"
FLUSH_EVERY = 10.0  # seconds between deliveries to MLflow
SAMPLE_IMAGES = 32
TAIL = 4096  # bytes: a few rows of metrics.csv


class Tracker:
    """Records one run. At a URL, where no row can be appended, ``metrics.csv`` is written anew every few seconds.

    Args:
        step: the step that the run goes on from; rows beyond it (of a life that ended) are dropped.
        run_id: the MLflow run to go on with, if any.
    """

    def __init__(self, config: Config, out: AnyPath, step: int, run_id: str | None) -> None:
        self.config, self.out = config, out
        self.pending: list[Any] = []
        self.last_flush = time.monotonic()
        self.run_id = None if config.tracking.uri == "off" else run_id or _saved_run_id(out)
        self.outbox: Outbox | None = None
        with writable(out):
            out.mkdir(parents=True, exist_ok=True)
        self.rows = [row for row in read_metrics(out) if row["step"] <= step]
        self._write_rows()
        self._write_facts()
        if config.tracking.uri != "off":
            known = self.run_id
            self.outbox = Outbox(config.tracking, self._open_run, out)
            if known is None or self.run_id != known:
                self.outbox.post(["params", {n: str(v) for n, v in flat(config.model_dump(mode="json")).items()}])
            for letter in read_undelivered(out, step):
                self.outbox.post(letter)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a training step, to the CSV at once and to MLflow in batches."""
        row = {name: metrics[name] for name in COLUMNS if name in metrics} | {"step": step}
        self.rows.append(row)
        if isinstance(self.out, Path):
            self._append(self.out / "metrics.csv", row)
        self.log_figures(step, {name: value for name, value in metrics.items() if name != "step"})

    def log_figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Named numbers, to MLflow only."""
        if self.outbox:
            now = int(time.time() * 1000)
            self.pending += [[name, float(value), now, step] for name, value in figures.items()]
        if time.monotonic() - self.last_flush > FLUSH_EVERY:
            self.flush()

    def log_picture(self, name: str, figure: Figure) -> None:
        """A picture into the run's folder and MLflow."""
        path = self.out / "pictures" / f"{name}.png"
        with writable(path):
            path.parent.mkdir(exist_ok=True)
            with written(path) as part:
                figure.savefig(part, format="png")
        self.log_file(f"pictures/{name}.png", "pictures")

    def log_file(self, path: str, folder: str | None = None) -> None:
        """A file of the run's folder into a folder of MLflow's."""
        if self.outbox:
            self.outbox.post(["file", path, folder])

    def log_sample_batch(self, batch: Batch) -> None:
        """The first images of a batch as the net sees them."""
        images = batch.images_BHWC[:SAMPLE_IMAGES].numpy()
        self.log_picture("sample_batch", contact_sheet(images, 8, f"training images, epoch {batch.epoch}"))

    def flush(self) -> None:
        """Hands on what is pending, to MLflow and to a URL."""
        self.last_flush = time.monotonic()
        if isinstance(self.out, RemotePath):
            self._write_rows()
        if self.outbox:
            for start in range(0, len(self.pending), CALL_METRICS):
                self.outbox.post(["metrics", self.pending[start : start + CALL_METRICS]])
        self.pending = []

    def settle(self) -> None:
        """Sees to it that whoever goes on from here has all up to here."""
        self.flush()
        if self.outbox:
            self.outbox.settle(HEALTHY_WAIT)

    def log_curves(self) -> None:
        """Loss, FastFace's detector and the rate over the steps, as far as the run has come."""
        if self.rows:
            self.log_picture("curves", curves(self.rows))

    def pictures(self) -> list[str]:
        """Those of the run so far, relative to its folder."""
        return sorted(f"pictures/{path.name}" for path in (self.out / "pictures").glob("*.png"))

    def close(self, status: str) -> None:
        """Delivers what is pending; ``status`` is FINISHED, FAILED or KILLED."""
        self.flush()
        if self.outbox:
            self.outbox.post(["status", status])
            self.outbox.close()

    def _write_rows(self) -> None:
        path = self.out / "metrics.csv"
        with writable(path), written(path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def _append(self, path: Path, row: dict[str, float]) -> None:
        whole = path.stat().st_size
        with writable(path):
            try:
                with path.open("a", newline="") as file:
                    csv.DictWriter(file, COLUMNS).writerow(row)
            except OSError:
                os.truncate(path, whole)
                raise

    def _write_facts(self) -> None:
        path, started = self.out / "run.json", time.time()
        if path.is_file():  # the run goes on
            started = json.loads(path.read_text())["started"]
        facts = {"run_id": self.run_id, "started": started, "config": self.config.model_dump(mode="json")}
        with writable(path):
            write_text_atomically(path, json.dumps(facts, indent=1) + "\n")

    def _open_run(self) -> tuple[Any, str]:
        from mlflow.exceptions import MlflowException

        tracking = self.config.tracking
        client, experiment = open_mlflow(tracking, self.out.resolve().parent)
        if self.run_id is not None:
            try:
                client.update_run(self.run_id, status="RUNNING")
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                log.warning("MLflow has no run %s: this one was moved here; a new one begins", self.run_id)
                self.run_id = None
        if self.run_id is None:
            tags = {PARENT_TAG: tracking.parent} if tracking.parent else {}
            self.run_id = client.create_run(experiment, run_name=self.out.name, tags=tags).info.run_id
            self._write_facts()
        return client, self.run_id


def open_mlflow(tracking: Tracking, folder: AnyPath) -> tuple[Any, str]:
    """A client, and the id of the experiment, which is made where it does not exist.

    Args:
        folder: of the runs; the database lies in it unless ``tracking.uri`` names another.
    """
    from mlflow import MlflowClient

    if tracking.uri is None and isinstance(folder, RemotePath):
        raise UserError(f"no database can lie at {folder}: give tracking.uri, or tracking.uri=off")
    client = MlflowClient(tracking.uri or f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment is not None:
        return client, experiment.experiment_id
    place = None if tracking.uri else f"file://{folder}/mlartifacts"
    return client, client.create_experiment(tracking.experiment, artifact_location=place)


def log_verification(ref: AnyPath, name: str, figures: Mapping[str, float], files: Iterable[Path] = ()) -> str | None:
    """Adds figures of a later verification to the MLflow run that trained the net, as ``NAME/FIGURE``.

    Args:
        ref: where the net was opened from; only a run's folder or a checkpoint in one leads to an MLflow run.
        files: pictures and tables to add, under ``verify/NAME``.

    Returns:
        Its id, or None where there is none.

    Raises:
        UserError: MLflow refuses.
    """
    run = ref.resolve()
    run = run.parent.parent if run.parent.name == "checkpoints" else run
    run_id = _saved_run_id(run)
    if run_id is None:
        return None
    from mlflow.entities import Metric

    try:
        tracking = Tracking.model_validate(json.loads((run / "run.json").read_text())["config"]["tracking"])
        if tracking.uri is None and not (run.parent / "mlflow.db").is_file():  # the run was copied from elsewhere
            return None
        client, _ = open_mlflow(tracking, run.parent)
        now = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[Metric(f"{name}/{n}", float(value), now, 0) for n, value in figures.items()])
        for path in files:
            client.log_artifact(run_id, str(path), f"verify/{name}")
    except Exception as error:  # MLflow hands through whatever its database or store raises
        raise UserError(f"{run}: not added to its MLflow run: {first_line(error)}") from None
    return run_id


class Comparison:
    """The MLflow run that the runs of a comparison or a search are shown under; the same results go on with one.

    Where a server is away, they go on without it, and ``run_id`` is None.

    Args:
        anew: whatever stood at the same path was another one.

    Raises:
        UserError: MLflow refuses, or its database cannot be.
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
            facts = {"run_name": PurePath(results.name).stem, "tags": {COMPARISON_TAG: key}}
            run = found[0] if found else self.client.create_run(experiment, **facts)
            self.client.update_run(run.info.run_id, status="RUNNING")
            self.run_id = run.info.run_id
        except Exception as error:  # MLflow hands through whatever its database or store raises
            if refused(error) or not self.uri.startswith("http"):
                raise UserError(f"tracking.uri = {self.uri}: {first_line(error)}") from None
            log.warning("MLflow is away; its runs will stand alone: %s", first_line(error))

    def close(self, table: str, files: Iterable[AnyPath] = (), status: str = "FINISHED") -> None:
        """Records the table as it stands, in Markdown, and files beside it, if MLflow can be told.

        Args:
            status: FINISHED, FAILED or KILLED.
        """
        if self.run_id is None:
            return
        try:
            self.client.log_text(self.run_id, table, "comparison.md")
            for path in files:
                with fetched(path) as file:
                    self.client.log_artifact(self.run_id, str(file))
            self.client.set_terminated(self.run_id, status)
        except Exception as error:  # see above
            log.warning("MLflow was not told how %s ended: %s", self.run_id, first_line(error))


def read_metrics(out: AnyPath) -> list[dict[str, float]]:
    """Rows of a run's ``metrics.csv``; none if it has not begun. A half-written last row is left out."""
    path = out / "metrics.csv"
    if not path.is_file():
        return []
    with fetched(path) as local, local.open(newline="") as file:
        return _whole_rows(file)


def newest_metrics(out: AnyPath) -> dict[str, float] | None:
    """The last row of a run's ``metrics.csv``, read from its end where it is local: a long run is followed cheaply."""
    path = out / "metrics.csv"
    if not isinstance(path, Path):
        return next(reversed(read_metrics(out)), None)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        header = file.readline()
        file.seek(max(len(header), path.stat().st_size - TAIL))  # a row that this cuts lacks its last column
        lines = [header, *file.readlines()]
    return next(reversed(_whole_rows(line.decode() for line in lines)), None)


def _whole_rows(lines: Iterable[str]) -> list[dict[str, float]]:
    rows = []
    for row in csv.DictReader(lines):
        try:
            if row["data_wait"]:  # the last column: a row without it is half written
                rows.append({name: float(row[name]) for name in COLUMNS if row.get(name)} | {"step": int(row["step"])})
        except (TypeError, ValueError, KeyError):
            continue
    return rows


def report_figures(out: AnyPath) -> dict[str, float]:
    """Figures of a run's ``report.json``; parameters are counted by its config where an older one lacks them.

    Raises:
        UserError: no report of a training, or a config of another version.
    """
    path = out / "report.json"
    try:
        report = json.loads(path.read_text())
        figures, config = report["figures"], report["config"]
        identities = int(figures["identities"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: no report of a finished training") from None
    if PARAMETERS in figures:
        return figures
    return figures | parameter_figures(parse_config(config, str(path)), identities)


def finished_runs(uri: str, experiment: str, query: str) -> list[tuple[str, Callable[[], dict[str, float]]]]:
    """Names of the finished runs of an MLflow experiment, and what reads their figures as :func:`report_figures` does.

    Figures of later verifications are among them (``NAME/FIGURE``).

    Args:
        query: MLflow's filter, or none.

    Raises:
        UserError: no such database or experiment, or a filter that MLflow does not understand.
    """
    from mlflow import MlflowClient

    finished = " and ".join(filter(None, [query, "attributes.status = 'FINISHED'"]))
    trainings = [run for run in search_mlflow(uri, experiment, finished) if COMPARISON_TAG not in run.data.tags]
    client = MlflowClient(uri)
    return [(run.info.run_name, partial(_tracked_figures, client, run)) for run in trainings]


def search_mlflow(uri: str, experiment: str | None, query: str) -> list[Any]:
    """Runs of an MLflow experiment, or of all of them.

    Args:
        query: MLflow's filter, or none.

    Raises:
        UserError: no such database or experiment, or a filter that MLflow does not understand.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    database = uri.removeprefix("sqlite:///")
    if database != uri and not Path(database).is_file():  # MLflow would make one
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
        raise UserError(f"{uri}: {str(error).splitlines()[0]}") from None
    return runs


def curves(rows: list[dict[str, float]]) -> Figure:
    """Loss, FastFace's detector where there is one, learning rate and throughput over the steps."""
    shown = [name for name in PANELS if any(name in row for row in rows)]
    figure = Figure(figsize=(7, 2.4 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, shown, strict=True):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), linewidth=1)
        axes.set_ylabel(PANELS[name])
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    return figure


def _tracked_figures(client: Any, run: Any) -> dict[str, float]:
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


def _saved_run_id(out: AnyPath) -> str | None:
    try:
        return json.loads((out / "run.json").read_text())["run_id"]
    except (OSError, ValueError, KeyError):
        return None
