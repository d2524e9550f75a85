"""What a program made a card do: operators, waits for answers and copies, each with the line that caused it."""

import sys
from collections import Counter
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

PROJECT = Path(__file__).parents[2]
CAUSES = (str(PROJECT / "fr_core"), str(PROJECT / "pipelines"))


class Place(NamedTuple):
    """A line of the project, and the function that holds it."""

    function: str
    line: int


class Event(NamedTuple):
    """Something that happened at a place; ``what`` is an operator, or the kind of a wait or a copy."""

    what: str
    place: Place


class Counts:
    """Numbers of events since the last :meth:`clear`.

    ``operators`` are aten operators, each at least one launch. ``waits`` are answers of the card for which the host
    waits. ``copies`` go between host and card; ``copied`` has their bytes.
    """

    def __init__(self) -> None:
        self.operators: Counter[Event] = Counter()
        self.waits: Counter[Event] = Counter()
        self.copies: Counter[Event] = Counter()
        self.copied: Counter[Event] = Counter()
        self.unrepeatable: set[str] = set()  # operators so far that have no deterministic algorithm
        self.period = 0  # number of calls of clear

    def clear(self) -> None:
        """Forget all events."""
        for counter in (self.operators, self.waits, self.copies, self.copied):
            counter.clear()
        self.period += 1

    def operator(self, name: str) -> None:
        """Count an operator."""
        self.operators[Event(name, cause())] += 1

    def wait(self, what: str) -> None:
        """Count an answer for which the host waits."""
        self.waits[Event(what, cause())] += 1

    def copy(self, what: str, size: int) -> None:
        """Count a copy of so many bytes."""
        event = Event(what, cause())
        self.copies[event] += 1
        self.copied[event] += size

    def as_json(self) -> dict[str, Any]:
        """Return the number of operators, and waits and copies by place."""
        return {
            "operators": self.operators.total(),
            "unrepeatable": sorted(self.unrepeatable),
            "by_function": dict(Counter(event.place.function for event in self.operators.elements()).most_common()),
            "waits": [event_json(event, count) for event, count in sorted(self.waits.items())],
            "copies": [
                event_json(event, count) | {"bytes": self.copied[event]} for event, count in sorted(self.copies.items())
            ],
        }


def event_json(event: Event, count: int) -> dict[str, Any]:
    """Return an event as JSON."""
    return {"what": event.what, "function": event.place.function, "line": event.place.line, "count": count}


@cache
def function_of(code: CodeType) -> str | None:
    """Return file and function of code of the project, and None for any other code."""
    if not code.co_filename.startswith(CAUSES):
        return None
    function = code.co_qualname.partition(".<locals>")[0]  # some versions of Python inline comprehensions
    return f"{Path(code.co_filename).relative_to(PROJECT)} {function}"


def cause() -> Place:
    """Return the innermost line of the project that runs now in this thread.

    In the backward pass of PyTorch's own operators there is none; then the name of autograd's node stands for it.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if function := function_of(frame.f_code):
            return Place(function, frame.f_lineno)
        frame = frame.f_back
    node = torch._C._current_autograd_node()
    return Place(f"autograd {node.name()}" if node else "unknown", 0)
