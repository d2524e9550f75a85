"""A run's events through the standard library's logging: lines for people, JSON objects for programs.

Ray workers and Ray jobs write JSON; a terminal shows lines. ``BIGFACE_LOG=json`` or ``=text`` overrides this.
The command logs to its standard error. A worker logs to its node's files (``ray logs``).
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
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets this variable for the command of a job


def start_logging(style: str | None = None, **where: object) -> None:
    """Write the events of this process to its standard error from now on.

    Args:
        style: json or text. None takes ``BIGFACE_LOG``, else JSON in a Ray job and text elsewhere.
        where: facts that every JSON event carries beside its node, such as run and rank.

    Raises:
        UserError: ``BIGFACE_LOG`` is neither json nor text.
    """
    style = style or os.environ.get("BIGFACE_LOG") or ("json" if IN_JOB in os.environ else "text")
    if style not in ("json", "text"):
        raise UserError(f"BIGFACE_LOG={style}: use json or text")
    handler = _StandardError()
    handler.setFormatter(JSONLine({"node": platform.node(), **where}) if style == "json" else Line())
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def log_event(metrics: dict[str, float], saved: AnyPath | None) -> None:
    """Log a report of the train loop; this is a ``Report`` of ``fr_core/train/loop.py``."""
    facts = {name: metrics[name] for name in ("step", "loss", "accuracy") if name in metrics}
    if saved is not None:
        log.info("checkpoint saved", extra={"facts": facts | {"checkpoint": str(saved)}})
    elif not math.isfinite(metrics["loss"]):
        log.warning("loss not finite, step dropped", extra={"facts": facts})
    elif "accuracy" in metrics:
        log.info("verified", extra={"facts": facts})


class Line(logging.Formatter):
    """Formats an event as ``14:02:03 checkpoint saved  step 20  loss 4.891``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the event as one line."""
        facts = "".join(f"  {name} {_short(value)}" for name, value in _facts(record).items())
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        return f"{datetime.fromtimestamp(record.created):%H:%M:%S} {level}{record.getMessage()}{facts}"


class JSONLine(logging.Formatter):
    """Formats an event as one JSON object: UTC time, level, event, place and facts.

    Numbers that are not finite become strings, since JSON has none.
    """

    def __init__(self, where: dict[str, object]) -> None:
        super().__init__()
        self.where = where

    def format(self, record: logging.LogRecord) -> str:
        """Return the event as one line of JSON."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        event = {"time": time, "level": record.levelname.lower(), "event": record.getMessage()}
        facts = {name: value if _is_json(value) else str(value) for name, value in _facts(record).items()}
        return json.dumps(event | self.where | facts)


class _StandardError(logging.Handler):
    """Writes to ``sys.stderr`` as it is at the moment, since Rich replaces it while a bar is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the event."""
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:  # a log line that cannot be written must not end a training
            self.handleError(record)


def _facts(record: logging.LogRecord) -> dict[str, object]:
    return getattr(record, "facts", {})


def _is_json(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _short(value: object) -> str:
    """Return a fact as text: floats with four digits, from 1000 on without decimals or exponent."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1000 <= abs(value) < math.inf else f"{value:.4g}"
