"""Recipes: TOML files of the sections, with ``key.path=value`` overrides."""

import shlex
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fr_core.config import Config
from fr_core.config.mends import explain, field_names, recipe_mend
from fr_core.config.nets import Net
from fr_core.config.overrides import joined, overridden, read_overrides
from fr_core.config.sections import expand_home
from fr_core.errors import UserError

SHIPPED = Path(__file__).parent.parent / "recipes"
COMMAND_LINE = "command line"


def load_config(
    recipe: str | Path,
    overrides: Iterable[str] = (),
    setting: Iterable[str] = (),
    setting_source: str = COMMAND_LINE,
    net: Net | None = None,
) -> Config:
    """Return the config of a recipe with overrides; ``fr_core/config/overrides.py`` has their rule.

    An error names the origin of the mistake: the recipe's file, the command line or the setting.

    Args:
        recipe: a TOML file, or the name of a shipped recipe (``fr_core/recipes/NAME.toml``).
        overrides: ``key.path=value`` with values in TOML; a bare word is a string, and none is None.
        setting: further overrides, which come last.
        setting_source: origin of ``setting`` in errors.
        net: net that the recipe is taken with. None: its own.

    Raises:
        UserError: no such recipe, bad TOML, an unknown key with its nearest neighbour, or a value out of bounds.
    """
    path = _find_recipe(expand_home(str(recipe)))
    try:
        written = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML: {error}") from None
    written |= {"net": net.model_dump()} if net else {}
    shared, own = read_overrides(overrides, COMMAND_LINE), read_overrides(setting, setting_source)
    given = joined(shared, own)
    try:
        return Config.model_validate(overridden(Config, written, given))
    except ValidationError as error:
        mistake = error.errors()[0]
    if not given or _stands_in(written, mistake, given):
        raise UserError(f"{path}: {explain(mistake, in_file=True)}")
    in_shared = not own or _stands_in(overridden(Config, written, shared), mistake, own)
    raise UserError(f"{COMMAND_LINE if in_shared else setting_source}: {explain(mistake)}")


def parse_config(tree: Mapping[str, Any], source: str) -> Config:
    """Return the validated config of nested dictionaries; ``source`` names their origin in errors.

    Raises:
        UserError: an unknown key, a value out of bounds, or sections that do not fit together.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error.errors()[0])}") from None


def stored_config(tree: Mapping[str, Any], source: str) -> Config:
    """Return the config that a run stored; that of an earlier version means what it meant then.

    Raises:
        UserError: as :func:`parse_config`.
    """
    schedule, method = dict(tree["schedule"]), dict(tree["method"])
    if schedule["kind"] == "fastface" and "alpha" in schedule:  # it had the published recurrence alone
        schedule["kind"] = "fastface_recurrence"
    if "encoder_momentum" in method:  # encoders had no warm-up
        method = {"encoder_warmup": False} | method
    return parse_config({**tree, "schedule": schedule, "method": method}, source)


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


def _stands_in(tree: Mapping[str, Any], mistake: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Return whether a config makes a mistake before the overrides ``given``, at a field that none of them sets."""
    where = field_names(mistake["loc"])
    if _sets(given, where):
        return False
    try:
        Config.model_validate(tree)
    except ValidationError as error:
        return any((field_names(own["loc"]), own["msg"]) == (where, mistake["msg"]) for own in error.errors())
    return False


def _sets(given: object, where: Sequence[str]) -> bool:
    """Return whether overrides set the whole field at a place, not only a part of it."""
    for name in where:
        if not isinstance(given, Mapping):
            break
        given = given.get(name, {})
    return not isinstance(given, Mapping)
