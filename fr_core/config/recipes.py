"""Recipes: TOML files of the sections, with ``key.path=value`` overrides."""

import shlex
import tomllib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fr_core.config import Config
from fr_core.config.mends import explain, explain_kind, field_name, read_value, recipe_mend
from fr_core.errors import UserError

SHIPPED = Path(__file__).parent.parent / "recipes"
COMMAND_LINE = "command line"


def load_config(
    recipe: str | Path, overrides: Iterable[str] = (), setting: Iterable[str] = (), setting_source: str = COMMAND_LINE
) -> Config:
    """Return the config of a recipe with overrides.

    An error names the origin of the mistake: the recipe's file, the command line or the setting.

    Args:
        recipe: a TOML file, or the name of a shipped recipe (``fr_core/recipes/NAME.toml``).
        overrides: ``key.path=value`` with values in TOML; a bare word is a string.
        setting: further overrides, which come last.
        setting_source: origin of ``setting`` in errors.

    Raises:
        UserError: no such recipe, bad TOML, an unknown key with its nearest neighbour, or a value out of bounds.
    """
    path = _find_recipe(str(recipe))
    try:
        written = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML: {error}") from None
    shared = deepcopy(written)
    keys = [_apply_override(shared, override, COMMAND_LINE) for override in overrides]
    tree = deepcopy(shared)
    setting_keys = [_apply_override(tree, override, setting_source) for override in setting]
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        mistake = error.errors()[0]
    all_keys = [*keys, *setting_keys]
    if not all_keys or _stands_in(written, mistake, all_keys):
        raise UserError(f"{path}: {explain(mistake, in_file=True)}")
    source = COMMAND_LINE if not setting_keys or _stands_in(shared, mistake, setting_keys) else setting_source
    raise UserError(f"{source}: {explain_kind(mistake, written, tree, all_keys) or explain(mistake)}")


def parse_config(tree: Mapping[str, Any], source: str) -> Config:
    """Return the validated config of nested dictionaries; ``source`` names their origin in errors.

    Raises:
        UserError: an unknown key, a value out of bounds, or sections that do not fit together.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error.errors()[0])}") from None


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with dotted names."""
    names: dict[str, Any] = {}
    for name, value in tree.items():
        names |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return names


def recipes() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def _find_recipe(name: str) -> Path:
    for path in (Path(name), SHIPPED / f"{name}.toml"):
        if path.is_file():
            return path
    path = Path(name)
    if "=" in name:
        raise UserError(f"the recipe's name is missing: write it before {name}, such as bigface_small")
    for file in (Path(f"{name}.toml"), path / "winner.toml"):
        if file.is_file():
            raise UserError(f"no recipe {name!r}: write {shlex.quote(str(file))}")
    if path.is_dir():
        raise UserError(f"{name}: a folder, not a recipe: give the recipe first, and this folder as --out")
    if path.suffix == ".toml":
        raise UserError(f"{name}: no such file")
    raise UserError(f"no recipe {name!r}: {recipe_mend(name, recipes())}")


def _stands_in(written: Mapping[str, Any], mistake: Mapping[str, Any], keys: Iterable[str]) -> bool:
    """Return whether the recipe's file makes a mistake by itself, at a field that no override sets."""
    where = field_name(mistake["loc"])
    if any(f"{where}.".startswith(f"{key}.") for key in keys):
        return False
    try:
        Config.model_validate(written)
    except ValidationError as error:
        return any((own["loc"], own["msg"]) == (mistake["loc"], mistake["msg"]) for own in error.errors())
    return False


def _apply_override(tree: dict[str, Any], override: str, source: str) -> str:
    """Set one field of a tree, and return its key."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{source}: {override!r} is not of the form key.path=value")
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            section = ".".join(parents[: depth + 1])
            raise UserError(f"{source}: {override}: {section} is a value, not a section")
    tree[last] = read_value(text)
    return key
