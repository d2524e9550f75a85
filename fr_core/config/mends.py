"""Errors about recipes and overrides: one line that says what is wrong and how to write it.

People bring words from other code, such as ``learning_rate`` or ``resnet50``. An error names bigface's field for the
word; the word itself is never accepted.
"""

import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from fr_core.config.nets import Residual
from fr_core.config.reference import Knob, all_knobs, fields_named, knob_names
from fr_core.config.sections import Section
from fr_core.config.words import KINDS, MENDS

DEPTHS = get_args(Residual.model_fields["depth"].annotation)
PLACEHOLDERS = ("N", "…")
OVERRIDE = r"[a-z_]+(?:\.[a-z0-9_]+)+=(?:'[^']*'|[^\s,;)]+)"
BACKBONE = re.compile(r"(?:i?_?resnet|ir_?se|ir|r)[-_]?(\d+)", re.IGNORECASE)
# What to say of a missing field whose section cannot be given by one override.
MISSING = {
    "net.net": "net.kind = quantised needs the float net that it quantises: to quantise a trained run use "
    "bigface quantize RUN, or write \"net={kind='quantised', net={kind='iresnet', depth=50}}\"",
}
# What a value must be, by pydantic's type of the error; names in braces are of the error's context.
BOUNDS = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "finite_number": "must be a finite number",
    "literal_error": "must be {expected}",
}
# What a value is not, by the start of pydantic's type of the error.
TYPES = {
    "float": "no number",
    "int": "no whole number",
    "bool": "neither true nor false",
    "string": "no text",
    "tuple": "no list",
}


def explain(mistake: Mapping[str, Any], in_file: bool = False) -> str:
    """Return one line that says what is wrong and how to mend it.

    Args:
        mistake: an error as pydantic details it: type, loc, msg, input, ctx.
        in_file: write the mend as lines of a recipe's file, not as overrides.
    """
    text = _explain(mistake, " = " if in_file else "=")
    return _for_file(text) if in_file else text


def read_value(text: str) -> object:
    """Return the value of an override: TOML, None for the bare word none, or another bare word as a string."""
    if text == "none":
        return None
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, str | int | float | list | dict) else text  # a folder may be named like a date


def as_toml(value: object) -> str:
    """Return a value as TOML; strings take single quotes, which a shell's double quotes keep."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}={as_toml(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_toml, value))}]"
    return repr(value) if isinstance(value, str) else str(value).lower()


def _explain(mistake: Mapping[str, Any], equals: str) -> str:
    where, value = ".".join(field_names(mistake["loc"])), mistake["input"]
    match mistake["type"]:
        case "extra_forbidden":
            return _unknown_key(where, value, mistake["loc"])
        case "union_tag_invalid":
            kinds = mistake["ctx"]["expected_tags"].replace("'", "")
            return f"unknown kind {mistake['ctx']['tag']!r} of {where}{_kind_mend(mistake['ctx']['tag'], kinds)}"
        case "union_tag_not_found":
            return f"{where}.kind is missing: give {where}.kind=…"
        case "missing" | "too_short" | "too_long" if isinstance(value, list | tuple):
            name = re.sub(r"\.\d+$", "", where)
            return f"{name}{equals}{as_toml(list(value))} must be {_knob(name, mistake['loc']).takes}"
        case "missing":
            text = next((knob.description for knob in all_knobs() if knob.name == where), "")
            return MISSING.get(where) or f"{where} is missing: give {where}=… ({text})"
        case "model_type" | "model_attributes_type":
            return f"{where} is a section, not {_show(value)!r}{_section_mend(where)}"
    shown = re.sub(r"\.(\d+)$", r"[\1]", where) + equals + (repr(value) if isinstance(value, str) else as_toml(value))
    if bound := BOUNDS.get(mistake["type"]):
        context = {name: _limit(limit) for name, limit in mistake.get("ctx", {}).items()}
        return f"{shown} {bound.format(**context)}"
    typed = mistake["type"].partition("_")[0]
    if typed in TYPES and isinstance(value, Mapping):
        return f"{where} is a value, not a section: write {where}=…"
    if typed in TYPES:
        return f"{shown} is {TYPES[typed]}{_type_mend(typed, where, value, mistake['loc'])}"
    message = mistake["msg"].removeprefix("Value error, ")
    return message if not where or message.startswith(f"{where}.") else f"{where}: {message}"


def field_names(loc: Sequence[str | int]) -> tuple[str, ...]:
    """Return the fields that lead to an error, without the kinds between them."""
    return tuple(str(part) for part, is_kind in _marked(loc) if not is_kind)


def recipe_mend(name: str, recipes: Sequence[str]) -> str:
    """Return what to write instead of a recipe's name that does not exist."""
    if backbone := backbone_override(name):
        depth = backbone.rpartition("=")[2]
        near = [recipe for recipe in recipes if f"_r{depth}_" in f"{recipe}_"]
        named = f"recipes with this backbone are {', '.join(near)}; or" if near else "no recipe has this backbone:"
        return f"{named} write {backbone} after a recipe's name"
    if name.lower() in KINDS:
        return f"{KINDS[name.lower()]} after a recipe's name, such as bigface_r50"
    if near := get_close_matches(name, recipes, 1):
        return f"did you mean {near[0]!r}?"
    return "give your TOML file, or a shipped recipe such as bigface_small; bigface train --help lists them"


def backbone_override(name: object) -> str | None:
    """Return the overrides that choose a backbone by its name elsewhere, such as ``resnet50``; None: no known name."""
    if str(name).lower().replace("_", "") in ("mobilefacenet", "mbf"):
        return "net.kind=mobilefacenet"
    found = BACKBONE.fullmatch(str(name))
    if not found:
        return None
    if int(found[1]) in DEPTHS:
        return f"net.kind=iresnet net.depth={found[1]}"
    return f"net.kind=iresnet net.depth=N, where N is one of {', '.join(map(str, DEPTHS))}"


def _unknown_key(key: str, value: object, loc: Sequence[str | int]) -> str:
    """Say what to write instead of a key that its section lacks."""
    section, _, last = key.rpartition(".")
    kinds = [str(part) for part, is_kind in _marked(loc) if is_kind]
    if kinds and key in knob_names():
        having = dict.fromkeys(choice for knob in all_knobs() if knob.name == key for choice in knob.choices[-1:])
        named, (choice, kind) = ", ".join(kind for _, kind in having), next(iter(having))
        return (
            f"unknown key {key}: kind {kinds[-1]} has no such key (kinds with it: {named}): leave it out, or write "
            f"{choice}.kind={kind}"
        )
    word = last.replace("-", "_").lower()
    if words := [word] if word in MENDS else get_close_matches(word, MENDS, 1, cutoff=0.85):
        backbone = backbone_override(value) or "net.kind=iresnet net.depth=50"
        return f"unknown key {key}: {MENDS[words[0]].format(value=_show(value), backbone=backbone)}"
    if elsewhere := fields_named(last, section):
        return f"unknown key {key}: did you mean {elsewhere[0]}? write {elsewhere[0]}={_show(value)}"
    dot = f"{section}." if section else ""
    beside = [name.removeprefix(dot) for name in knob_names() if name.rpartition(".")[0] == section]
    if near := get_close_matches(last, beside, 1):
        return f"unknown key {key}: did you mean {dot}{near[0]}?"
    if near := get_close_matches(key, knob_names(), 1, cutoff=0.75):
        return f"unknown key {key}: did you mean {near[0]}?"
    return f"unknown key {key}: see bigface knobs {section}".strip()


def _kind_mend(kind: str, kinds: str) -> str:
    """Say which kind to write instead, if one is near, and name all kinds."""
    if mend := _known_kind(kind, kinds):
        return f": {mend}"
    near = get_close_matches(str(kind), kinds.split(", "), 1, cutoff=0.5)
    hint = f", did you mean {near[0]!r}?" if near else "."
    return f"{hint} The kinds are: {kinds}"


def _known_kind(kind: str, kinds: str) -> str | None:
    """Return the mend of a kind that other code has, if it is one."""
    if "iresnet" not in kinds:
        return KINDS.get(str(kind).lower())
    backbone = backbone_override(kind)
    return backbone and f"write {backbone}"


def _section_mend(section: str) -> str:
    """Say how to write a section that was given as a value."""
    fields = [knob.name for knob in all_knobs() if knob.section == section]
    return f": write one of its fields, such as {next(iter(fields), section)}=…"


def _marked(loc: Sequence[str | int]) -> Iterator[tuple[str | int, bool]]:
    """Yield the parts of an error's place, and whether each is a kind, which follows the field of a choice."""
    after_kind = True
    for part in loc:
        is_kind = not after_kind and part in _all_kinds()
        yield part, is_kind
        after_kind = is_kind


def _all_kinds(section: type[Section] = Section) -> set[str]:
    """Return the kinds of all sections that derive from one."""
    kind = section.model_fields.get("kind")
    own = {kind.default} if kind and not kind.is_required() else set()
    return own.union(*(_all_kinds(below) for below in section.__subclasses__()))


def _show(value: object) -> str:
    """Return a value as an override writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return shlex.quote(value) if " " in value else value
    return str(value) if isinstance(value, int | float) else "…"


def _limit(value: object) -> str:
    """Return a bound, or the values that a field takes, as plain text."""
    return f"{value:g}" if isinstance(value, float) else str(value).replace("'", "")


def _knob(name: str, loc: Sequence[str | int]) -> Knob:
    """Return the knob of this name whose kinds lead to an error."""
    return next(knob for knob in all_knobs() if knob.name == name and all(kind in loc for _, kind in knob.choices))


def _type_mend(typed: str, where: str, value: object, loc: Sequence[str | int]) -> str:
    """Say how to write a value of the right type."""
    if typed == "bool":
        return f": write {where}=true or {where}=false"
    if typed == "string":
        return ": put it in double quotes, inside single quotes on the command line"
    if isinstance(value, str) and re.fullmatch(r"-?\d+,\d+", value):
        return f": write {where}={value.replace(',', '.')}"
    name = re.sub(r"\.\d+$", "", where)
    knob = _knob(name, loc)
    if typed == "tuple":
        return f": give {knob.takes} in square brackets"
    example = f", such as {name}={knob.default}" if knob.default[:1].isdigit() else ""
    return f": give {'a ' if name == where else ''}{knob.takes}{example}"


def _for_file(text: str) -> str:
    """Return an error whose overrides are written as a recipe's file has them."""
    text = re.sub(r'"([a-z_.]+)=(\{.*\})"', r"\1 = \2 above the first [section]", text)
    return re.sub(f"{OVERRIDE}(?: {OVERRIDE})*", lambda found: _lines(re.findall(OVERRIDE, found[0])), text)


def _lines(overrides: Iterable[str]) -> str:
    """Return overrides as lines of their sections."""
    by_section: dict[str, list[str]] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        section, _, name = key.rpartition(".")
        value = text if text in PLACEHOLDERS else as_toml(read_value(text)).replace("'", '"')
        by_section.setdefault(section, []).append(f"{name} = {value}")
    return ", ".join(f"{' and '.join(lines)} under [{section}]" for section, lines in by_section.items())
