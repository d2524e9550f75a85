"""A run's events by the standard library's logging: a line for people, a JSON object where programs read it.

Workers of Ray and Ray jobs write JSON, terminals lines; ``BIGFACE_LOG=json`` or ``=text`` decides for the command.
A worker's events lie in its node's logs (``ray logs``), the command's own on its standard error.
"""

import json
import logging
import math
import os
import platform
import sys
from datetime import UTC, datetime

from fr_core.data.store import AnyPath
from fr_core.errors import UserError

log = logging.getLogger("bigface")
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # what Ray sets for a job's command


def start_logging(style: str | None = None, **where: object) -> None:
    """Writes the events of this process to its standard error from now on.

    Args:
        style: json or text; None: what ``BIGFACE_LOG`` says, else JSON in a Ray job and text elsewhere.
        where: facts that every JSON event carries beside its node, such as run and rank.

    Raises:
        UserError: another ``BIGFACE_LOG``.
    """
    style = style or os.environ.get("BIGFACE_LOG") or ("json" if IN_JOB in os.environ else "text")
    if style not in ("json", "text"):
        raise UserError(f"BIGFACE_LOG={style}: json or text")
    handler = _StandardError()
    handler.setFormatter(JSONLine({"node": platform.node(), **where}) if style == "json" else Line())
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def log_event(metrics: dict[str, float], saved: AnyPath | None) -> None:
    """Logs what the train loop reports, as it reports it (``Report`` in ``fr_core/train/loop.py``)."""
    facts = {name: metrics[name] for name in ("step", "loss", "accuracy") if name in metrics}
    if saved is not None:
        log.info("checkpoint saved", extra={"facts": facts | {"checkpoint": str(saved)}})
    elif not math.isfinite(metrics["loss"]):
        log.warning("loss not finite, step dropped", extra={"facts": facts})
    elif "accuracy" in metrics:
        log.info("verified", extra={"facts": facts})


class Line(logging.Formatter):
    """``14:02:03 checkpoint saved  step 20  loss 4.891``."""

    def format(self, record: logging.LogRecord) -> str:
        facts = "".join(f"  {name} {_short(value)}" for name, value in _facts(record).items())
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        return f"{datetime.fromtimestamp(record.created):%H:%M:%S} {level}{record.getMessage()}{facts}"


class JSONLine(logging.Formatter):
    """One object: time (UTC), level, event, where it was, and the event's own facts. What is not finite is text."""

    def __init__(self, where: dict[str, object]) -> None:
        super().__init__()
        self.where = where

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        own = {"time": time, "level": record.levelname.lower(), "event": record.getMessage()}
        facts = {name: value if _is_json(value) else str(value) for name, value in _facts(record).items()}
        return json.dumps(own | self.where | facts)


class _StandardError(logging.Handler):
    """The one of the moment: Rich puts its own there while a bar is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:  # a line that cannot be written must not end a training
            self.handleError(record)


def _facts(record: logging.LogRecord) -> dict[str, object]:
    return getattr(record, "facts", {})


def _is_json(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
