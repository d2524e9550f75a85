"""The committed costs of a step, ``counts.csv``, as upper bounds of what a step may cost."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("counts.csv")
SLACK = 1.1  # of operators: versions of PyTorch split them differently


class Cost(NamedTuple):
    """What a step costs a card.

    ``waits`` are answers of the card that the host reads. In a blocking copy to the card, the host waits until the
    card has done everything before it.
    """

    operators: int
    waits: int
    blocking_copies_to_card: int
    copies_to_card: int
    bytes_to_card: int
    copies_to_host: int
    bytes_to_host: int


def cost(found: dict[str, Any]) -> Cost:
    """Sum the counts of a case."""
    to_card, to_host = ([c for c in found["copies"] if c["what"].startswith(way)] for way in ("to card", "to host"))
    blocking = [copy for copy in to_card if copy["what"] == "to card"]
    return Cost(
        operators=found["operators"],
        waits=total(found["waits"]),
        blocking_copies_to_card=total(blocking),
        copies_to_card=total(to_card),
        bytes_to_card=total(to_card, "bytes"),
        copies_to_host=total(to_host),
        bytes_to_host=total(to_host, "bytes"),
    )


def total(events: list[dict[str, Any]], field: str = "count") -> int:
    """Sum a number over events."""
    return sum(event[field] for event in events)


def exceeded(found: dict[str, Any], most: Cost) -> list[str]:
    """Name what of a case costs more than it may, with all lines that do such a thing."""
    complaints = []
    for name, count, bound in zip(Cost._fields, cost(found), most, strict=True):
        if count > (bound * SLACK if name == "operators" else bound):
            events = [] if name == "operators" else found["waits" if name == "waits" else "copies"]
            way = "to host" if name.endswith("host") else "to card"
            lines = [described(event) for event in events if name == "waits" or event["what"].startswith(way)]
            complaints.append(f"{name}: {count}, the table allows {bound}" + "".join(f"\n  {line}" for line in lines))
    return complaints


def described(event: dict[str, Any]) -> str:
    """Return an event as a line."""
    file, _, function = event["function"].partition(" ")
    size = f", {event['bytes']:,} bytes" if "bytes" in event else ""
    return f"{file}:{event['line']} {function}: {event['count']} × {event['what']}{size}"


def read_table() -> dict[str, Cost]:
    """Read the bounds of all cases."""
    with FILE.open(newline="") as file:
        rows = csv.DictReader(file)
        return {row["case"]: Cost(*(int(row[name]) for name in Cost._fields)) for row in rows}


def write_table(table: dict[str, Cost], order: Iterable[str]) -> None:
    """Write the bounds of the cases, in this order."""
    with FILE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", *Cost._fields])
        writer.writerows([case, *table[case]] for case in order if case in table)
