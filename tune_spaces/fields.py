"""Domains, and knobs that refer to fields through the config's classes: one that does not exist fails at import."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel

from fr_core.config import Config
from fr_core.config.recipes import parse_config
from fr_core.config.sections import Section
from fr_core.errors import UserError


@dataclass(frozen=True)
class Uniform:
    low: float
    high: float


@dataclass(frozen=True)
class LogUniform:
    low: float
    high: float


@dataclass(frozen=True)
class Integers:
    """Both ends included."""

    low: int
    high: int


@dataclass(frozen=True)
class Choice:
    values: tuple[Any, ...]


@dataclass(frozen=True)
class StepShare:
    """Of the run's steps, whose number the data tells: :func:`at_steps`."""

    low: float
    high: float


Domain = Uniform | LogUniform | Integers | Choice | StepShare


@dataclass(frozen=True)
class Knob:
    name: str
    section: type[Section]  # that the recipe must have ...
    place: str  # ... here: "" for the config itself
    path: str  # of the field, from the config
    domain: Domain


def knob(section: type[Section], field: str, domain: Domain, name: str | None = None) -> Knob:
    """A field of ``section``, dotted where it lies deeper, such as ``margin.m2`` of AttFC.

    Args:
        section: a class that stands at one place of the config, or what such classes have in common.
        name: in tables and ``--only``; None: the field's.

    Raises:
        LookupError: no such field, or a section at no place or several.
    """
    places = set(_places(section, Config, ""))
    if len(places) != 1:
        raise LookupError(f"{section.__name__} stands at {sorted(places) or 'no place'} of the config, not at one")
    held: list[type[BaseModel]] = [section]
    *parents, last = field.split(".")
    for parent in parents:
        held = [part for model in held if parent in model.model_fields for part in _parts(model, parent)]
    if not any(last in model.model_fields for model in held):
        raise LookupError(f"{section.__name__} has no field {field}")
    place = places.pop()
    return Knob(name or last, section, place, f"{place}.{field}", domain)


def ends(domain: Domain) -> Sequence[Any]:
    """The values that bound a domain, or all of a choice."""
    return domain.values if isinstance(domain, Choice) else (domain.low, domain.high)


def grid(domain: Domain) -> Sequence[Any]:
    """A choice's values, or both ends and their middle."""
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
    """The knobs with shares of a run's steps as numbers of them."""

    def known(domain: Domain) -> Domain:
        if isinstance(domain, StepShare):
            return Integers(max(1, round(domain.low * steps)), round(domain.high * steps))
        return domain

    return [replace(knob, domain=known(knob.domain)) for knob in knobs]


def with_values(config: Config, knobs: Sequence[Knob], values: Mapping[str, Any]) -> Config:
    """The config with the knobs turned, whole and validated.

    Args:
        values: by the knobs' names.

    Raises:
        UserError: a value that the config refuses.
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
    """The config at each end of each knob, the others as they are.

    Raises:
        UserError: a knob whose section the config does not have, or an end that the config refuses.
    """
    for knob in knobs:
        found: Any = config
        for part in knob.place.split("."):
            found = getattr(found, part, None)
        if not isinstance(found, knob.section):
            raise UserError(f"{knob.name} is a knob of {_mend(knob, found)}, or leave it out by --only")
        for value in ends(knob.domain):
            yield with_values(config, [knob], {knob.name: value})


def _mend(knob: Knob, found: Any) -> str:
    kind = knob.section.model_fields.get("kind")
    if kind is None:
        named = getattr(knob.section, "named", f"{knob.place}.FIELD")
        return f"{knob.place}, which this recipe lacks: give {named}=REF"
    here = f"this recipe has {found.kind}" if found is not None else "this recipe lacks it"
    return f"{knob.place}.kind = {kind.default}, and {here}: give {knob.place}.kind={kind.default}"


def _places(section: type[Section], model: type[BaseModel], place: str) -> Iterator[str]:
    if issubclass(model, section):
        yield place
    for name in model.model_fields:
        for part in _parts(model, name):
            yield from _places(section, part, f"{place}.{name}".removeprefix("."))


def _parts(model: type[BaseModel], name: str) -> list[type[BaseModel]]:
    """The sections that a field can hold."""

    def parts(kind: Any) -> Iterator[type[BaseModel]]:
        if isinstance(kind, type) and issubclass(kind, Section):
            yield kind
        elif get_origin(kind) is Annotated:
            yield from parts(get_args(kind)[0])
        else:
            for member in get_args(kind):
                yield from parts(member)

    return list(parts(model.model_fields[name].annotation))
