"""``bigface replay``: applies FastFace to a past loss log without training (docs/methods/fastface.md)."""

import csv
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pydantic import ValidationError

from fr_core.config.optim import FastFace, FastFaceHaar, FastFaceRecurrence
from fr_core.errors import UserError
from fr_core.optim.fastface import watcher
from fr_core.optim.schedules import learning_rate

FORMS: dict[str, type[FastFace] | type[FastFaceRecurrence] | type[FastFaceHaar]] = {
    "run": FastFace,
    "recurrence": FastFaceRecurrence,
    "haar": FastFaceHaar,
}
POINTS = 2000  # points of a curve in the picture


def replay(
    log: Path, form: str, settings: list[str], batch: int, lr: float | None
) -> tuple[list[dict[str, float]], int, Figure]:
    """Feed a log's losses to FastFace.

    Args:
        log: CSV with columns step and loss, or last_step and mean_loss. A mean covers the steps since the row before.
        form: run, recurrence or haar.
        settings: ``name=value`` of the form's schedule section.
        batch: global batch of the log, for ``reference_batch``.
        lr: base rate. None takes the first rate in the log's column lr, else 0.1.

    Returns:
        The changes of the rate that the loss decides, the number of steps, and a picture. A change has ``step``
        (counted from 1, the first step at the new rate), ``factor`` and ``rate``.

    Raises:
        UserError: the log cannot be read, a loss is not finite, or the form or a setting is unknown or unusable.
    """
    if lr is not None and not 0 < lr < np.inf:
        raise UserError(f"--lr {lr:g}: a rate is greater than 0, such as --lr 0.1")
    losses, logged_rate = read_log(log)
    if form not in FORMS:
        raise UserError(f"--form {form}: use one of {', '.join(FORMS)}")
    try:
        schedule = FORMS[form].model_validate(dict(map(_setting, settings)))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        known = ", ".join(sorted(FORMS[form].model_fields.keys() - {"kind", "warmup_epochs"}))
        wrong = "no such setting" if first["type"] == "extra_forbidden" else first["msg"]
        raise UserError(f"--set {name}={first['input']}: {wrong}; {form} has {known}") from None
    base = lr or logged_rate or 0.1
    try:
        fastface = watcher(schedule, len(losses), batch)
    except UserError as error:
        raise UserError(as_options(str(error))) from None
    assert fastface is not None
    changes: list[dict[str, float]] = []
    detector, factors = np.empty(len(losses)), np.empty(len(losses))
    for step, loss in enumerate(losses.tolist(), 1):
        factors[step - 1] = before = fastface.factor
        fastface.observe(loss)
        detector[step - 1] = fastface.detector
        if fastface.factor != before:
            changes.append({"step": step + 1, "factor": fastface.factor / before, "rate": base * fastface.factor})
    limit = schedule.slope if isinstance(schedule, FastFace) else schedule.threshold
    tail = np.array([learning_rate(schedule, step, len(losses), len(losses)) for step in range(len(losses))])
    return changes, len(losses), picture(losses, detector, base * factors * tail, limit)


def as_options(message: str) -> str:
    """Return an error about fields of the schedule section as one about ``--set``, by which replay sets them.

    ``schedule.patience = 0.05 …`` becomes ``--set patience=0.05 …``. A log has no warm-up.
    """
    message = message.replace('schedule.kind = "fastface"', "--form run").replace(" after the warm-up", "")
    message = message.replace("the run has", "the log has")
    return re.sub(r"schedule\.(\w+)", r"--set \1=…", re.sub(r"schedule\.(\w+) = ", r"--set \1=", message))


def read_log(path: Path) -> tuple[np.ndarray, float | None]:
    """Return the loss of every step, float64, and the log's first learning rate, if any.

    Raises:
        UserError: the file cannot be read, lacks columns, has steps that do not rise or losses that are not finite.
    """
    losses: list[float] = []
    rate = None
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            means = {"last_step", "mean_loss"} <= set(columns)
            if not means and not {"step", "loss"} <= set(columns):
                raise UserError(
                    f"{path}: needs columns step, loss or last_step, mean_loss; it has {', '.join(columns)}"
                )
            for row in reader:
                step = int(row["last_step" if means else "step"])
                loss = float(row["mean_loss" if means else "loss"])
                if not np.isfinite(loss):
                    raise UserError(f"{path}: the loss of step {step} is {loss}")
                if step <= len(losses):
                    raise UserError(f"{path}: step {step} after step {len(losses)}: steps must rise")
                losses += [loss] * (step - len(losses))
                rate = rate or float(row.get("lr") or 0) or None
    except (OSError, UnicodeDecodeError, ValueError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: not readable as a loss log: {reason}") from None
    if not losses:
        raise UserError(f"{path}: holds no losses: give a log with rows")
    return np.array(losses), rate


def picture(losses: np.ndarray, detector: np.ndarray, rates: np.ndarray, limit: float) -> Figure:
    """Draw loss, detector with its limit, and rate over the steps."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    steps = np.unique(np.linspace(0, len(losses) - 1, POINTS).astype(int))
    for axes, values, name in zip(panels, (losses, detector, rates), ("loss", "detector", "rate"), strict=True):
        axes.plot(steps + 1, values[steps], linewidth=1)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    panels[1].axhline(limit, color="grey", linestyle="--", linewidth=1)
    late = np.abs(detector[len(detector) // 10 :])
    panels[1].set_ylim(-2 * limit, max(4 * limit, float(np.quantile(late, 0.98))))
    panels[2].set_yscale("log")
    panels[2].set_xlabel("step")
    return figure


def _setting(text: str) -> tuple[str, Any]:
    """Parse ``name=value``; a value that is no TOML is a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text}: not of the form name=value: write --set {text}=VALUE")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value
