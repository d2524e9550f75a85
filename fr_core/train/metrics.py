"""The figures in a run's folder: ``metrics.csv``, the curves and ``report.json``."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure

from fr_core.config.recipes import stored_config
from fr_core.data.store import AnyPath, local_copy
from fr_core.errors import UserError
from fr_core.losses.ekd import THRESHOLDS
from fr_core.nets.factory import refuse_code
from fr_core.train.initial import parameter_figures

COLUMNS = (
    *("step", "epoch", "loss", "lr", "grad_norm", "head_grad_norm"),
    *("margin_loss", "distill_loss"),  # distilled runs
    *("positive_loss", "negative_loss", *THRESHOLDS),  # quantface
    *("detector", "stationary"),  # FastFace
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
PARAMETERS = "backbone_parameters"  # reports of older versions lack this figure
TAIL = 4096  # bytes; holds a few rows of metrics.csv


def read_metrics(out: AnyPath) -> list[dict[str, float]]:
    """Read the rows of a run's ``metrics.csv``, without a half-written last row. A run not yet started has no rows."""
    path = out / "metrics.csv"
    if not path.is_file():
        return []
    with local_copy(path) as local, local.open(newline="") as file:
        return _whole_rows(file)


def newest_metrics(out: AnyPath) -> dict[str, float] | None:
    """Read the last row of a run's ``metrics.csv``; None if it has no row. A local file is read from its end."""
    path = out / "metrics.csv"
    if not isinstance(path, Path):
        return next(reversed(read_metrics(out)), None)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        header = file.readline()
        file.seek(max(len(header), path.stat().st_size - TAIL))  # a row cut here lacks its last column
        lines = [header, *file.readlines()]
    return next(reversed(_whole_rows(line.decode() for line in lines)), None)


def _whole_rows(lines: Iterable[str]) -> list[dict[str, float]]:
    rows = []
    for row in csv.DictReader(lines):
        try:
            if row["data_wait"]:  # the last column; without it, the row is half written
                rows.append({name: float(row[name]) for name in COLUMNS if row.get(name)} | {"step": int(row["step"])})
        except (TypeError, ValueError, KeyError):
            continue
    return rows


def report_figures(out: AnyPath) -> dict[str, float]:
    """Read the figures of a run's ``report.json``. If an older report lacks parameter counts, count them by its config.

    Raises:
        UserError: there is no report of a training, or its config is of another version.
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
    stored = stored_config(config, str(path))
    refuse_code(path, stored.net, trust_code=False)  # a report of such a net has its counts
    return figures | parameter_figures(stored, identities)


def plot_curves(rows: list[dict[str, float]]) -> Figure:
    """Plot losses, FastFace's detector, learning rate and throughput over the steps, as far as the rows have them."""
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
