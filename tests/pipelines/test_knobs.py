"""``bigface knobs`` and docs/knobs.md."""

import json
import math
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from fr_core.config import Config
from fr_core.config.reference import all_knobs, held_sections, markdown, select, tables
from fr_core.config.sections import Section
from fr_core.errors import UserError
from pipelines.cli.output import console
from tests.helpers.commands import bigface, figures

ROOT = Path(__file__).parents[2]


def section_classes(model=Config):
    """All classes of sections that a config can hold."""
    found = {model}
    for field in model.model_fields.values():
        for held in held_sections(field.annotation):
            found |= section_classes(held)
    return found


def test_the_page_is_what_the_code_says(tmp_path):
    page = tmp_path / "knobs.md"
    bigface("knobs", "--markdown", page)
    assert page.read_text() == markdown()
    assert (ROOT / "docs/knobs.md").read_text() == markdown(), "run: bigface knobs --markdown docs/knobs.md"


def test_every_field_has_a_description():
    bare = [knob.name for knob in all_knobs() if not knob.description.endswith(".")]
    assert bare == []
    assert [section.__name__ for section in section_classes() if not section.__doc__] == []


def test_every_field_is_listed():
    listed = {knob.name.rpartition(".")[2] for knob in all_knobs()}
    assert {name for section in section_classes() for name in section.model_fields} <= listed
    assert len({(knob.name, knob.choices) for knob in all_knobs()}) == len(all_knobs())


def classes_at(knob, model=Config):
    """The class that holds a knob."""
    kinds = dict(knob.choices)
    at = ""
    for part in knob.section.split(".") if knob.section else []:
        at = f"{at}.{part}".strip(".")
        held = held_sections(model.model_fields[part].annotation)
        model = next(m for m in held if at not in kinds or m.model_fields["kind"].default == kinds[at])
    return model


def accepts(model: type[Section], name: str, value: object) -> bool:
    """Whether a section takes a value for a field, whatever else it lacks."""
    try:
        model.model_validate({name: value})
    except ValidationError as error:
        return not any(mistake["loc"] and mistake["loc"][0] == name for mistake in error.errors())
    return True


def test_bounds_are_those_of_the_model():
    """Each number shown as a bound is taken or refused as its sign says, and so is the next one beyond."""
    checked = 0
    for knob in all_knobs():
        if knob.type not in ("whole number", "number") or not knob.bounds:
            continue
        model, name = classes_at(knob), knob.name.rpartition(".")[2]
        signs = {
            sign: float(number) for sign, number in re.findall(r"(≥|>|≤|<|multiple of) (\S+?)(?:,|$)", knob.bounds)
        }
        step = signs.get("multiple of", 1) if knob.type == "whole number" else 0
        typed = int if knob.type == "whole number" else float
        for sign, bound in signs.items():
            if sign == "multiple of":
                assert not accepts(model, name, int(bound) * 10 + 1), knob
                continue
            down = bound - step if step else math.nextafter(bound, -math.inf)
            up = bound + step if step else math.nextafter(bound, math.inf)
            assert accepts(model, name, typed(bound)) == (sign in "≥≤"), (knob, sign)
            assert accepts(model, name, typed(down)) == (sign in "≤<"), (knob, sign)
            assert accepts(model, name, typed(up)) == (sign in "≥>"), (knob, sign)
            checked += 1
    assert checked > 150


def test_defaults_are_those_of_the_model():
    flat = {knob.name: knob.default for knob in all_knobs() if not knob.choices}
    assert flat["train.global_batch"] == str(Config().train.global_batch)
    assert flat["net.kind"] == "iresnet"
    assert flat["data.progressive"] == "none"
    margins = {dict(knob.choices)["method"]: knob.default for knob in all_knobs() if knob.name == "method.margin.m2"}
    assert margins == {"bigface": "0", "attfc": "0.5", "dcq": "0", "f2c": "0", "virtual_fc": "0.5"}


@pytest.mark.parametrize(
    ("section", "names"),
    [
        ("optim.lr", {"optim.lr"}),
        ("net.moe", {"net.experts", "net.active", "net.balance", "net.depth"}),
        ("method.margin", {"method.margin.m1", "method.margin.scale"}),
        ("method.quantface.loss.ekd", {"method.loss.temperature", "method.loss.pool"}),
        ("optim.sgd", {"optim.nesterov", "optim.sgd.lr"}),
    ],
)
def test_a_section_or_a_kind_is_selected(section, names):
    chosen = {knob.name for knob in select(section)}
    assert names <= chosen
    assert len(chosen) < 40


def test_kinds_that_differ_in_a_default_share_a_row():
    table, other = tables(select("method.margin.m3"))
    assert other.title.endswith("method.margin.kind = ldam")  # which means another thing by it
    assert table.title == "method.kind = bigface | attfc | dcq | f2c | virtual_fc, method.margin.kind = fixed"
    ((name, takes, default, _),) = table.rows
    assert (name, takes, default) == ("method.margin.m3", "number ≥ 0, ≤ 1", "0.4 (attfc, virtual_fc: 0; dcq: 0.3)")


def test_the_command_prints_tables_and_json(tmp_path):
    file = tmp_path / "k.json"
    printed = bigface("knobs", "method.attfc", "--json", file)
    assert "size_ratio" in printed
    assert figures(file)["knobs"] == len(select("method.attfc"))
    first = json.loads(file.read_text())["knobs"][0]
    assert set(first) == {"name", "choices", "type", "bounds", "default", "description"}
    assert first["choices"] == {"method": "attfc"}
    with pytest.raises(UserError, match=r"no section or knob 'metod\.attfc': did you mean method\.attfc"):
        bigface("knobs", "metod.attfc")


def test_a_narrow_terminal_hides_nothing(monkeypatch):
    monkeypatch.setattr(console, "width", 80)
    printed = bigface("knobs")
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lr", "the learning rate is optim.lr"),
        ("learning_rate", "the learning rate is optim.lr"),
        ("train.batch", "the batch of all workers together is train.global_batch"),
        ("method.scale", "did you mean method.margin.scale?"),
    ],
)
def test_words_of_other_code_are_told_the_knob(word, message):
    with pytest.raises(UserError) as caught:
        select(word)
    assert str(caught.value) == f"no section or knob {word!r}: {message}"
