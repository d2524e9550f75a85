"""Recipes: TOML files of the sections, with ``key.path=value`` overrides."""

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from fr_core.config import Config
from fr_core.config.sections import Section
from fr_core.errors import UserError

SHIPPED = Path(__file__).parent.parent / "recipes"


def load_config(recipe: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The config of a recipe, with ``key.path=value`` overrides (values in TOML; a bare word is a string).

    Args:
        recipe: a TOML file, or the name of a shipped recipe (``fr_core/recipes/NAME.toml``).

    Raises:
        UserError: no such recipe, bad TOML, unknown key (named with its nearest neighbour), value out of bounds.
    """
    path = _find_recipe(str(recipe))
    try:
        tree = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML: {error}") from None
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: Mapping[str, Any], source: str) -> Config:
    """A validated config from nested dictionaries; ``source`` names their origin in errors.

    Raises:
        UserError: as :func:`load_config`.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(_fields(first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = _no_such_field(where, first["loc"])
        raise UserError(f"{source}: {where or 'config'}: {message}") from None


def _no_such_field(key: str, loc: Sequence[str | int]) -> str:
    """What to say of a key that its section lacks: another kind may have it, or a key that is spelt nearly so."""
    kinds = [part for part in loc if part in _union_tags()]
    if key in field_paths() and kinds:
        section = key.rpartition(".")[0]
        return f"unknown key of kind '{kinds[-1]}'; for another kind give the whole section: {section}={{kind='…', …}}"
    return f"unknown key{_nearest(key)}"


def _fields(loc: Sequence[str | int]) -> Iterator[str]:
    """The fields on an error's way; a union's tag follows its field, and what follows a tag is a field again."""
    tag = False
    for part in loc:
        tag = not tag and part in _union_tags()
        if not tag:
            yield str(part)


def field_paths(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Dotted names of all fields, through every member of the unions."""
    paths = []
    for name, field in model.model_fields.items():
        paths.append(prefix + name)
        for member in (field.annotation, *get_args(field.annotation)):
            if isinstance(member, type) and issubclass(member, Section):
                paths += field_paths(member, f"{prefix}{name}.")
    return list(dict.fromkeys(paths))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names."""
    names: dict[str, Any] = {}
    for name, value in tree.items():
        names |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return names


def recipes() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def _find_recipe(name: str) -> Path:
    for path in (Path(name), SHIPPED / f"{name}.toml"):
        if path.is_file():
            return path
    near = difflib.get_close_matches(name, recipes(), 1)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped recipes: {', '.join(recipes())}"
    raise UserError(f"no recipe {name!r}: {hint}")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form key.path=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if not isinstance(value, str | int | float | list | dict):  # a folder may be named like a date
        value = text
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    tree[last] = value


def _union_tags(section: type[Section] = Section) -> set[str]:
    """The kinds of all sections below one."""
    kind = section.model_fields.get("kind")
    own = {kind.default} if kind and not kind.is_required() else set()
    return own.union(*(_union_tags(below) for below in section.__subclasses__()))


def _nearest(key: str) -> str:
    near = difflib.get_close_matches(key, field_paths(), 1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""
