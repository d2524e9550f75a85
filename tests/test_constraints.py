"""``constraints.txt``: every version that it names is one that ``pyproject.toml`` takes, and nothing is left open."""

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.constraints import HEADER, ROOT, asked, installed

CONSTRAINTS = (ROOT / "constraints.txt").read_text()
PINS = {pin.name: pin for pin in map(Requirement, CONSTRAINTS.removeprefix(HEADER).splitlines())}


def version(name):
    (pinned,) = PINS[name].specifier
    assert pinned.operator == "=="
    return pinned.version


def test_every_requirement_is_pinned_to_a_version_that_it_takes():
    wanted = [(canonicalize_name(one.name), one.specifier) for one in asked()]
    assert len(wanted) > 30
    wrong = [f"{name}{range}" for name, range in wanted if name not in PINS or version(name) not in range]
    assert wrong == [], "make constraints"


def test_it_holds_what_the_requirements_ask_for_in_turn():
    assert set(installed()) - set(PINS) == set(), "make constraints"
    assert all(str(pin) == f"{pin.name}=={version(pin.name)}" for pin in PINS.values())  # for any machine, any build


def test_make_installs_by_it():
    recipe = (ROOT / "Makefile").read_text().split(".installed: pyproject.toml constraints.txt")[1]
    assert "pip install" not in recipe
    assert recipe.count("$(INSTALL)") == 2
    assert "--constraint constraints.txt" in (ROOT / "Makefile").read_text().split("INSTALL :=")[1].splitlines()[0]
