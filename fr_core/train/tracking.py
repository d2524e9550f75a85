"""Records a run's figures, in ``metrics.csv`` of its folder and in MLflow. Only rank 0 tracks.

It records parameters, losses, learning rates, throughput, a sample batch, curves and the report. A resumed run goes on
in the same MLflow run, whose id is in the checkpoints and in ``run.json``.
"""

import csv
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from fr_core.config import Config
from fr_core.config.nets import FactoryNet
from fr_core.config.recipes import flat
from fr_core.data.schema import Dataset
from fr_core.data.store import AnyPath, RemotePath, atomic_file, explain_disk_errors, write_text_atomically
from fr_core.data.stream import Batch
from fr_core.nets.checkpoint_files import BACKBONE, step_name
from fr_core.train.metrics import COLUMNS, plot_curves, read_metrics
from fr_core.train.mlflow_runs import PARENT_TAG, open_mlflow, saved_run_id
from fr_core.train.outbox import (
    CALL_METRICS,
    HEALTHY_WAIT,
    Letter,
    Outbox,
    log,
    read_undelivered,
)
from fr_core.train.page import (
    NO_CHARTS,
    NOTE,
    chart_name,
    data_inputs,
    describe,
    figures_table,
    headline,
    read_origin,
    run_tags,
)
from fr_core.verify.report import contact_sheet

if TYPE_CHECKING:
    from mlflow import MlflowClient

FLUSH_EVERY = 10.0  # seconds between deliveries to MLflow
BEAT_EVERY = 10.0  # seconds between touches of metrics.csv, which show that the run goes on
SAMPLE_IMAGES = 32


class Tracker:
    """Records one run. At a URL, where no row can be appended, it rewrites ``metrics.csv`` every few seconds.

    Args:
        step: step at which the run resumes; later rows are dropped.
        run_id: id of the MLflow run to go on with, if any.
    """

    def __init__(self, config: Config, out: AnyPath, step: int, run_id: str | None) -> None:
        self.config, self.out = config, out
        self.pending: list[list[str | float]] = []
        self.last_flush = self.last_beat = time.monotonic()
        self.sampled = False
        self.run_id = None if config.tracking.uri == "off" else run_id or saved_run_id(out)
        self.outbox: Outbox | None = None
        with explain_disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        self.rows = [row for row in read_metrics(out) if row["step"] <= step]
        self._write_rows()
        self.started, self.restarts = self._read_facts()
        self._write_facts()
        self.origin = read_origin(out)
        if config.tracking.uri != "off":
            known = self.run_id
            self.outbox = Outbox(config.tracking, self._open_run, out, begins=step == 0 and known is None)
            fresh = known is None or self.run_id != known
            letters = read_undelivered(out, step)
            self.outbox.post(["tags", {**run_tags(config, self.origin), NOTE: describe(self.origin)}])
            if fresh:
                self.outbox.post(["params", {n: str(v) for n, v in flat(config.model_dump(mode="json")).items()}])
                self._post_earlier_rows(letters)
            for letter in letters:
                if letter[0] != "params" or not fresh:  # MLflow refuses a second value of a parameter
                    self.outbox.post(letter)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a training step: in the CSV at once, in MLflow in batches."""
        row = {name: metrics[name] for name in COLUMNS if name in metrics} | {"step": step}
        self.rows.append(row)
        if isinstance(self.out, Path):
            self._append(self.out / "metrics.csv", row)
        self.log_charts(step, metrics)

    def log_charts(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add points to MLflow's charts."""
        self._log(step, {chart_name(name): value for name, value in metrics.items() if name not in NO_CHARTS})

    def log_report(self, step: int, figures: Mapping[str, float]) -> None:
        """Record the figures of the run's report in MLflow, also in the run's description."""
        self._log(step, figures)
        self._post(["tags", {NOTE: describe(self.origin, headline(figures), figures_table(figures))}])

    def log_net(self, step: int) -> None:
        """Log the net of the checkpoint of a step as an MLflow model, unless other code than bigface's makes it."""
        if self.config.tracking.net and not isinstance(self.config.net, FactoryNet):
            self._post(["net", f"checkpoints/{step_name(step)}/{BACKBONE}", step])

    def log_data(self, dataset: Dataset) -> None:
        """Record in MLflow which datasets the run is trained and verified on."""
        self._post(["inputs", data_inputs(self.config, dataset)])

    def _log(self, step: int, figures: Mapping[str, float]) -> None:
        if self.outbox:
            now = int(time.time() * 1000)
            self.pending += [[name, float(value), now, step] for name, value in figures.items()]
        if time.monotonic() - self.last_flush > FLUSH_EVERY:
            self.flush()

    def _post(self, letter: Letter) -> None:
        if self.outbox:
            self.outbox.post(letter)

    def log_picture(self, name: str, figure: Figure) -> None:
        """Save a picture in the run's folder and in MLflow."""
        path = self.out / "pictures" / f"{name}.png"
        with explain_disk_errors(path):
            path.parent.mkdir(exist_ok=True)
            with atomic_file(path) as part:
                figure.savefig(part, format="png")
        self.log_file(f"pictures/{name}.png", "pictures")

    def log_file(self, path: str, folder: str | None = None) -> None:
        """Copy a file of the run's folder to MLflow, into ``folder`` of its artifacts."""
        self._post(["file", path, folder])

    def step_done(self, batch: Batch) -> None:
        """Touch ``metrics.csv`` after the first step and then every few seconds, to show that the run goes on.

        Save a picture of the first batch.
        """
        first = not self.sampled
        if first:
            self.sampled = True
            self._log_sample_batch(batch)
        if isinstance(self.out, Path) and (first or time.monotonic() - self.last_beat > BEAT_EVERY):
            self.last_beat = time.monotonic()
            os.utime(self.out / "metrics.csv")

    def _log_sample_batch(self, batch: Batch) -> None:
        """Save a picture of the first images of a batch, as the net sees them."""
        images = batch.images_BHWC[:SAMPLE_IMAGES].cpu().numpy()
        self.log_picture("sample_batch", contact_sheet(images, 8, f"training images, epoch {batch.epoch}"))

    def flush(self) -> None:
        """Pass pending figures on to MLflow, and rewrite ``metrics.csv`` at a URL."""
        self.last_flush = time.monotonic()
        if isinstance(self.out, RemotePath):
            self._write_rows()
        if self.outbox:
            for start in range(0, len(self.pending), CALL_METRICS):
                self.outbox.post(["metrics", self.pending[start : start + CALL_METRICS]])
        self.pending = []

    def wait(self) -> None:
        """Wait until MLflow has what was passed on so far, or save that in the run's folder, for a resumed run.

        Another thread may call this.
        """
        if self.outbox:
            self.outbox.wait(HEALTHY_WAIT)

    def health(self) -> dict[str, float]:
        """Return figures about the run itself: restarts, and the rows and files that MLflow does not have yet."""
        waiting = self.outbox.undelivered() if self.outbox else 0
        return {"restarts": self.restarts, "undelivered": waiting}

    def log_curves(self) -> None:
        """Save the curves of the run so far, as a picture."""
        if self.rows:
            self.log_picture("curves", plot_curves(self.rows))

    def pictures(self) -> list[str]:
        """Return the paths of the run's pictures, relative to its folder."""
        return sorted(f"pictures/{path.name}" for path in (self.out / "pictures").glob("*.png"))

    def close(self, status: str) -> None:
        """Deliver what is pending, and end the MLflow run with status FINISHED, FAILED or KILLED."""
        self.flush()
        if self.outbox:
            self.outbox.post(["status", status])
            self.outbox.close()

    def _post_earlier_rows(self, letters: list[Letter]) -> None:
        """Post the rows of a run that MLflow does not know yet, but for those in letters that are posted anyway."""
        posted = {step for kind, *rest in letters if kind == "metrics" for _, _, _, step in rest[0]}
        for row in self.rows:
            if row["step"] not in posted:
                self.log_charts(int(row["step"]), row)
        self.flush()

    def _write_rows(self) -> None:
        path = self.out / "metrics.csv"
        with explain_disk_errors(path), atomic_file(path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def _append(self, path: Path, row: dict[str, float]) -> None:
        whole = path.stat().st_size
        with explain_disk_errors(path):
            try:
                with path.open("a", newline="") as file:
                    csv.DictWriter(file, COLUMNS).writerow(row)
            except OSError:
                os.truncate(path, whole)
                raise

    def _read_facts(self) -> tuple[float, int]:
        """Return when the run was first started, and how often it was started again, this time included."""
        path = self.out / "run.json"
        if not path.is_file():
            return time.time(), 0
        facts = json.loads(path.read_text())
        return facts["started"], facts.get("restarts", 0) + 1  # older versions did not count

    def _write_facts(self) -> None:
        path = self.out / "run.json"
        state = {"run_id": self.run_id, "started": self.started, "restarts": self.restarts}
        facts = state | {"config": self.config.model_dump(mode="json")}
        with explain_disk_errors(path):
            write_text_atomically(path, json.dumps(facts, indent=1) + "\n")

    def _open_run(self) -> "tuple[MlflowClient, str]":
        from mlflow.exceptions import MlflowException

        tracking = self.config.tracking
        client, experiment = open_mlflow(tracking, self.out.resolve().parent)
        if self.run_id is not None:
            try:
                client.update_run(self.run_id, status="RUNNING")
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                log.warning("MLflow has no run %s: this folder was moved; a new MLflow run begins", self.run_id)
                self.run_id = None
        if self.run_id is None:
            tags = {PARENT_TAG: tracking.parent} if tracking.parent else {}
            self.run_id = client.create_run(experiment, run_name=self.out.name, tags=tags).info.run_id
            self._write_facts()
        return client, self.run_id
