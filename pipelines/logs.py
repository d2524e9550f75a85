"""A run's events through the standard library's logging: lines for people, JSON objects for programs.

Ray workers and Ray jobs write JSON; a terminal shows lines. ``BIGFACE_LOG=json`` or ``=text`` overrides this.
The command logs to its standard error. A worker logs to its node's files (``ray logs``), and rank 0 to the command too.
"""

import io
import json
import logging
import math
import os
import platform
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from fr_core.data.store import AnyPath
from fr_core.errors import UserError

log = logging.getLogger("bigface")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # a terminal's, which Ray prints into a file too
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets this variable for the command of a job


def log_style() -> str:
    """Return ``json`` in a Ray job and ``text`` elsewhere, unless ``BIGFACE_LOG`` says otherwise.

    Raises:
        UserError: ``BIGFACE_LOG`` is neither json nor text.
    """
    style = os.environ.get("BIGFACE_LOG") or ("json" if IN_JOB in os.environ else "text")
    if style not in ("json", "text"):
        raise UserError(f"BIGFACE_LOG={style}: use json or text")
    return style


def start_logging(style: str | None = None, **where: object) -> None:
    """Write the events of this process to its standard error from now on.

    Args:
        style: json or text; None takes that of :func:`log_style`.
        where: facts that every JSON event carries beside its node, such as run and rank.
    """
    handler = _StandardError()
    json_line = JSONLine({"node": platform.node(), **where})
    handler.setFormatter(json_line if (style or log_style()) == "json" else Line())
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def turn_output_into_events() -> None:
    """Make an event of each line that this process prints from now on, such as libraries do."""
    sys.stdout = PrintedLines(sys.stdout, logging.INFO)
    sys.stderr = PrintedLines(sys.stderr, logging.WARNING)


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
        return json.dumps(event | self.where | as_json(_facts(record)))


class PrintedLines(io.TextIOBase):
    """A standard stream that logs each printed line as an event.

    Args:
        below: the stream itself, which events are written to.
        level: level of the events.
    """

    def __init__(self, below: TextIO, level: int) -> None:
        super().__init__()
        self.below, self.level, self.begun = below, level, ""

    def write(self, text: str) -> int:
        """Log each line that ends, unless it is empty."""
        *lines, self.begun = (self.begun + text).split("\n")
        for line in filter(None, (COLOURS.sub("", line).strip() for line in lines)):
            log.log(self.level, "%s", line, extra={"facts": {"printed": True}})
        return len(text)

    def fileno(self) -> int:
        """Return the number of the stream itself."""
        return self.below.fileno()


class _StandardError(logging.Handler):
    """Writes to ``sys.stderr`` as it is at the moment, since Rich replaces it while a bar is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the event. ``print`` would show it twice in a worker, where Ray Train logs what is printed."""
        try:
            stream = sys.stderr.below if isinstance(sys.stderr, PrintedLines) else sys.stderr
            stream.write(f"{self.format(record)}\n")
            stream.flush()
        except Exception:  # a log line that cannot be written must not end a training
            self.handleError(record)


def _facts(record: logging.LogRecord) -> Mapping[str, Any]:
    return getattr(record, "facts", {})


def as_json(value: Any) -> Any:
    """Return a value of JSON's kinds: numbers that are not finite, paths and the like as text."""
    if isinstance(value, Mapping):
        return {str(name): as_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(one) for one in value]
    known = isinstance(value, str | int | float) or value is None
    return value if known and not (isinstance(value, float) and not math.isfinite(value)) else str(value)


def _short(value: object) -> str:
    """Return a fact as text: floats with four digits, from 1000 on without decimals or exponent."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1000 <= abs(value) < math.inf else f"{value:.4g}"
