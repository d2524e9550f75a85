"""The pretend card refuses and counts what a card does."""

import pytest

REFUSED = {
    "mixed devices": "two devices",
    "mixed in a list": "two devices",
    "a scalar of the host in a list": "two devices",
    "a host's tensor by a card's index": "two devices",
    "numpy": "can't convert cuda:0",
    "random numbers of the host": "generator",
}
COUNTED = {  # operators, waits, copies with their bytes
    "views": (0, [], []),
    "memory": (0, [], []),
    "arithmetic": (3, [], []),
    "a scalar of the host": (1, [], []),
    "item": (1, ["item"], []),
    "a condition": (2, ["item"], []),
    "tolist": (0, ["copy to host"], [["to host", 24]]),
    "nonzero": (1, ["nonzero"], []),
    "unique": (1, ["unique"], []),
    "equal": (1, ["equal"], []),
    "repeats": (3, ["repeat_interleave"], []),
    "repeats of known sum": (3, [], []),
    "boolean index": (2, ["boolean index"], []),
    "a number by a mask": (2, [], []),
    "values by a mask": (3, ["boolean index"], []),
    "a number by indices": (3, [], [["to card", 4]]),
    "a list of indices": (1, [], [["to card", 16]]),
    "from the host": (0, [], [["to card", 24]]),
    "from pinned memory": (0, [], [["to card, pinned", 24]]),
    "from pageable memory, not blocking": (0, [], [["to card", 24]]),
    "to the host": (0, ["copy to host"], [["to host", 24]]),
    "to the host, not blocking": (0, [], [["to host, pinned", 24]]),
    "a new tensor": (0, [], [["to card", 16]]),
    "synchronize": (0, ["synchronize"], []),
}


@pytest.mark.parametrize("program", REFUSED)
def test_it_refuses(ask, program):
    assert REFUSED[program] in ask("--examples")[program]["refused"]


@pytest.mark.parametrize("program", COUNTED)
def test_it_counts(ask, program):
    operators, waits, copies = COUNTED[program]
    assert ask("--examples")[program] == {"operators": operators, "waits": waits, "copies": copies}


def test_it_trains(ask):
    """The layer's weight and bias go to the card; the optimiser moves them at once, as on a card."""
    found = ask("--examples")["training"]
    assert found["waits"] == []
    assert found["copies"] == [["to card", 16]]
    assert 0 < found["operators"] < 50
