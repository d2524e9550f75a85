"""Every method trains on the pretend card, and an unlogged step costs no more than ``counts.csv`` says.

If a change makes a step cheaper, or a count has to rise, write the table anew:
``python -m tests.pretend_card --write-table CASE …``.
"""

from typing import get_args

import pytest

from fr_core.config.methods import Method
from tests.helpers.runs import run
from tests.pretend_card.cases import CASES, OFTEN, RARE
from tests.pretend_card.table import Cost, exceeded, read_table
from tests.pretend_card.train import STEPS, STOPPED_AFTER, config_of, write_files

EACH = [*OFTEN, *(pytest.param(case, marks=pytest.mark.soak) for case in RARE)]


@pytest.fixture
def found(ask, request):
    """What the pretend card counted in a case; the cases of ``make test`` share a process, and so do the others."""
    case = request.param
    if case.endswith("integers"):
        pytest.importorskip("brevitas")
    return case, ask(*(OFTEN if case in OFTEN else RARE))[case]


@pytest.mark.parametrize("found", EACH, indirect=True)
def test_it_trains_saves_resumes_and_verifies(found):
    _, result = found
    assert result["refused"] is None
    assert result["devices"] == ["cuda:0"]
    assert result["stopped_at"] == STOPPED_AFTER
    assert result["saved"] == [f"step_{step:08d}" for step in (STOPPED_AFTER, 4, STEPS)]  # train.keep = 3
    assert result["figures"]["steps"] == STEPS
    assert 0 <= result["figures"]["accuracy"] <= 1


@pytest.mark.parametrize("found", EACH, indirect=True)
def test_no_operator_lacks_a_deterministic_algorithm(found):
    """With ``train.deterministic`` a card would refuse such an operator."""
    _, result = found
    assert result["unrepeatable"] == []


@pytest.mark.parametrize("found", EACH, indirect=True)
def test_a_step_costs_no_more_than_the_table_says(found):
    case, result = found
    assert not exceeded(result, read_table()[case])


def test_the_card_learns_what_the_cpu_learns(ask, tmp_path):
    """The card's branches and the CPU's compute the same in float32."""
    write_files(tmp_path)
    there, here = ask(*OFTEN)["bigface-float32"], run(config_of("bigface-float32", tmp_path), tmp_path / "run")
    assert there["figures"]["loss"] == pytest.approx(here["loss"], rel=1e-4)


def test_every_method_and_case_is_in_the_table():
    kinds = {section.model_fields["kind"].default for section in get_args(get_args(Method)[0])}
    assert kinds <= CASES.keys()
    assert list(read_table()) == list(CASES)


def test_a_dearer_step_is_named_with_its_lines():
    item = {"what": "item", "function": "fr_core/a.py f", "line": 7, "count": 1}
    image = {"what": "to card", "function": "fr_core/b.py g", "line": 9, "count": 1, "bytes": 96}
    answer = {"what": "to host", "function": "fr_core/a.py f", "line": 8, "count": 1, "bytes": 4}
    found = {"operators": 110, "waits": [], "copies": [image, answer]}
    assert exceeded(found, Cost(100, 0, 1, 1, 96, 1, 4)) == []
    assert exceeded(found | {"operators": 111, "waits": [item]}, Cost(100, 0, 0, 1, 95, 1, 4)) == [
        "operators: 111, the table allows 100",
        "waits: 1, the table allows 0\n  fr_core/a.py:7 f: 1 × item",
        "blocking_copies_to_card: 1, the table allows 0\n  fr_core/b.py:9 g: 1 × to card, 96 bytes",
        "bytes_to_card: 96, the table allows 95\n  fr_core/b.py:9 g: 1 × to card, 96 bytes",
    ]
