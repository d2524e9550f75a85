"""Domains, and knobs that refer to fields through the config's classes: a wrong field fails at import."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from fr_core.config import Config
from fr_core.config.recipes import parse_config
from fr_core.config.reference import held_sections, kind_of
from fr_core.config.sections import Section
from fr_core.errors import UserError


@dataclass(frozen=True)
class Uniform:
    """Numbers of equal probability between two ends."""

    low: float
    high: float


@dataclass(frozen=True)
class LogUniform:
    """Numbers whose logarithms have equal probability between two ends."""

    low: float
    high: float


@dataclass(frozen=True)
class Integers:
    """Whole numbers between two ends, both included."""

    low: int
    high: int


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class StepShare:
    """Shares of the run's steps; :func:`at_steps` turns them into steps once the data is known."""

    low: float
    high: float


Domain = Uniform | LogUniform | Integers | Choice | StepShare


@dataclass(frozen=True)
class Knob:
    """A field of the config that a search varies."""

    name: str
    """Name in tables and in ``--only``."""
    section: type[Section]
    """Section that the recipe must have at ``place``."""
    place: str
    """Dotted name of the section; "" is the config itself."""
    path: str
    """Dotted name of the field."""
    domain: Domain
    """Values to search."""


def knob(section: type[Section], field: str, domain: Domain, name: str | None = None) -> Knob:
    """Return the knob of a field.

    Args:
        section: a section's class, or a base class; it must occur at exactly one place of the config.
        field: name of the field, dotted if it lies deeper, such as ``margin.m2`` of AttFC.
        domain: values to search.
        name: name in tables and ``--only``; None: the field's name.

    Raises:
        LookupError: no such field, or the section occurs at no place or at several.
    """
    places = set(_places(section, Config, ""))
    if len(places) != 1:
        raise LookupError(f"{section.__name__} occurs at {sorted(places) or 'no place'} of the config, not at one")
    held: list[type[BaseModel]] = [section]
    *parents, last = field.split(".")
    for parent in parents:
        held = [part for model in held if parent in model.model_fields for part in _parts(model, parent)]
    if not any(last in model.model_fields for model in held):
        raise LookupError(f"{section.__name__} has no field {field}")
    place = places.pop()
    return Knob(name or last, section, place, f"{place}.{field}", domain)


def ends(domain: Domain) -> Sequence[Any]:
    """Return both ends of a domain, or all values of a choice."""
    return domain.values if isinstance(domain, Choice) else (domain.low, domain.high)


def grid(domain: Domain) -> Sequence[Any]:
    """Return a choice's values, or both ends and their middle."""
    match domain:
        case Choice(values):
            return values
        case LogUniform(low, high):
            return (low, (low * high) ** 0.5, high)
        case Uniform(low, high) | StepShare(low, high):
            return (low, (low + high) / 2, high)
        case Integers(low, high):
            return sorted({low, (low + high) // 2, high})


def at_steps(knobs: Sequence[Knob], steps: int) -> list[Knob]:
    """Return the knobs with shares of the steps turned into numbers of steps."""

    def in_steps(domain: Domain) -> Domain:
        if isinstance(domain, StepShare):
            return Integers(max(1, round(domain.low * steps)), round(domain.high * steps))
        return domain

    return [replace(knob, domain=in_steps(knob.domain)) for knob in knobs]


def with_values(config: Config, knobs: Sequence[Knob], values: Mapping[str, Any]) -> Config:
    """Return the config with knobs set to values, validated as a whole.

    Args:
        config: config to start from.
        knobs: knobs to set.
        values: values by the knobs' names.

    Raises:
        UserError: the config refuses a value.
    """
    tree = config.model_dump()
    for knob in knobs:
        *parents, last = knob.path.split(".")
        section = tree
        for parent in parents:
            section = section[parent]
        section[last] = values[knob.name]
    return parse_config(tree, ", ".join(f"{name} = {value}" for name, value in values.items()))


def check_knobs(config: Config, knobs: Sequence[Knob]) -> Iterator[Config]:
    """Yield the config with one knob at one of its ends, for all knobs and ends.

    Raises:
        UserError: the config lacks a knob's section, or refuses an end.
    """
    for knob in knobs:
        found: Any = config
        for part in knob.place.split("."):
            found = getattr(found, part, None)
        if not isinstance(found, knob.section):
            raise UserError(f"{knob.name} is a knob of {_section_mend(knob, found)}, or leave it out with --only")
        for value in ends(knob.domain):
            yield with_values(config, [knob], {knob.name: value})


def _section_mend(knob: Knob, found: Any) -> str:
    """Return the section of a knob and how to give it to the recipe."""
    kind = kind_of(knob.section)
    if kind is None:
        named = getattr(knob.section, "named", f"{knob.place}.FIELD")
        return f"{knob.place}, which this recipe lacks: give {named}=REF"
    here = f"this recipe has {found.kind}" if found is not None else "this recipe lacks it"
    return f"{knob.place}.kind = {kind}, and {here}: give {knob.place}.kind={kind}"


def _places(section: type[Section], model: type[BaseModel], place: str) -> Iterator[str]:
    """Yield the dotted names at which a section can occur below a model."""
    if issubclass(model, section):
        yield place
    for name in model.model_fields:
        for part in _parts(model, name):
            yield from _places(section, part, f"{place}.{name}".removeprefix("."))


def _parts(model: type[BaseModel], name: str) -> list[type[Section]]:
    """Return the sections that a field can hold."""
    return held_sections(model.model_fields[name].annotation)
