"""Overrides: fields that are given beside a recipe's file, and one rule for both of their spellings.

``schedule.kind=constant`` and ``schedule={kind='constant'}`` mean the same: an override sets the fields that it names,
and the recipe keeps the others. A new kind takes over the fields that mean the same in the old kind: one base class
declares them for both. The old kind's other fields are dropped.
"""

from collections.abc import Iterable, Mapping
from functools import reduce
from inspect import get_annotations
from typing import Any

from pydantic.fields import FieldInfo

from fr_core.config.mends import read_value
from fr_core.config.reference import held_sections, kind_of
from fr_core.config.sections import Section
from fr_core.errors import UserError


def read_overrides(overrides: Iterable[str], source: str) -> dict[str, Any]:
    """Return the fields of overrides as nested dictionaries; of one field, the last override counts.

    Args:
        overrides: ``key.path=value`` with values in TOML; a bare word is a string, and none is None.
        source: origin of the overrides in errors.

    Raises:
        UserError: an override is of another form.
    """
    return reduce(joined, (_read(override, source) for override in overrides), {})


def joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of two groups of overrides; where both set a field, the second counts."""
    return dict(first) | {name: _joined_value(first.get(name), value) for name, value in second.items()}


def overridden(section: type[Section], written: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section of a recipe with overrides, not yet validated.

    Args:
        section: class of the section.
        written: what the recipe says.
        given: fields of the overrides.
    """
    fields = section.model_fields
    return dict(written) | {
        name: _overridden_value(fields[name], written.get(name), value) if name in fields else value
        for name, value in given.items()
    }


def _read(override: str, source: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{source}: {override!r} is not of the form key.path=value")
    tree: Any = read_value(text)
    for name in reversed(key.split(".")):
        tree = {name: tree}
    return tree


def _joined_value(first: object, second: object) -> object:
    """Return two values of a field as one: tables join, and a word beside a table is the table's kind."""
    one, other = _table(first), _table(second)
    if one is None or other is None or (isinstance(first, str) and isinstance(second, str)):
        return second
    return joined(one, other)


def _overridden_value(field: FieldInfo, written: object, given: object) -> object:
    """Return a field of a recipe with overrides; a section keeps what they do not name."""
    held = held_sections(field.annotation)
    table = _table(given) if field.discriminator else given
    if not held or not isinstance(table, Mapping):
        return given
    if field.discriminator:
        return _overridden_choice(field, _table(written) or {}, table)
    return overridden(held[0], written if isinstance(written, Mapping) else {}, table)


def _overridden_choice(field: FieldInfo, written: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section of a recipe with overrides, which may change its kind."""
    default = vars(field.default)["kind"] if isinstance(field.default, Section) else None
    old = written.get("kind", default)
    kinds = {kind_of(section): section for section in held_sections(field.annotation)}
    before, after = kinds.get(str(old)), kinds.get(str(given.get("kind", old)))
    if after is None:  # validation refuses this kind
        return joined(written, given)
    kept = {
        name: value for name, value in written.items() if _declaring(before, name) in (None, _declaring(after, name))
    }
    return overridden(after, kept, given)


def _table(value: object) -> Mapping[str, Any] | None:
    """Return a table, or for a word the table of this kind; None for any other value."""
    if isinstance(value, str):
        return {"kind": value}
    return value if isinstance(value, Mapping) else None


def _declaring(section: type[Section] | None, name: str) -> type | None:
    """Return the class that declares a section's field, the section or one of its bases; None if there is none."""
    bases = section.__mro__ if section else ()
    return next((base for base in bases if name in get_annotations(base)), None)
