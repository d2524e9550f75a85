"""The reference of all knobs: the list behind ``bigface knobs`` and ``docs/knobs.md``.

A knob is a field of the config at a dotted name, as people type it: ``net.depth``. Several kinds of a choice can have
a knob of one name, such as ``method.margin.m2``. The list has an entry for each of them; tables join those that differ
in nothing but their default.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import lru_cache
from itertools import product
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from fr_core.config import Config
from fr_core.config.sections import Section
from fr_core.config.words import plain_name
from fr_core.errors import UserError

PLAIN = {bool: "true or false", int: "whole number", float: "number", str: "text", dict: "table"}
SIGNS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"), ("multiple_of", "multiple of"))
HEADER = ("knob", "takes", "default", "meaning")
PAGE = """# Knobs

Every field of a recipe. `bigface knobs --markdown docs/knobs.md` writes this page from the code.

- On the command line write `name=value`: `bigface train bigface_r50 optim.lr=0.2 net.depth=100`.
- In a recipe write the same field in its table: `[optim]`, then `lr = 0.2`.
- A table sets several knobs at once: `"schedule={kind='multistep', milestones=[10, 15]}"`. What it does not name stays.
- A knob with a kind in its heading exists only with this kind. With another kind, the recipe's values of the knobs that
  both kinds share stay ([Usage](usage.md#recipes-and-overrides)).
- Where the default is none, `name=none` on the command line takes a recipe's value away. A recipe leaves the knob out.
- In the terminal, `bigface knobs method.attfc` prints one section; a kind may follow its section's name.
"""


@dataclass(frozen=True)
class Knob:
    """A field of the config. ``choices`` are the kinds that have it, from the outside in: ``(("net", "moe"),)``."""

    name: str
    choices: tuple[tuple[str, str], ...]
    type: str
    bounds: str
    default: str
    description: str

    @property
    def section(self) -> str:
        """Return the dotted name of the section that holds the knob; "" at the top."""
        return self.name.rpartition(".")[0]

    @property
    def takes(self) -> str:
        """Return type and bounds in words."""
        return " ".join(filter(None, (self.type, self.bounds)))


@dataclass(frozen=True)
class Table:
    """Knobs of one section that the same kinds have; ``rows`` have the columns of :data:`HEADER`."""

    section: str
    title: str
    rows: list[tuple[str, str, str, str]]


@lru_cache(maxsize=1)
def all_knobs() -> tuple[Knob, ...]:
    """Return all knobs, through every member of the tagged unions, in the order of the config."""
    return tuple(_walk(Config, Config(), "", ()))


def knob_names() -> list[str]:
    """Return the dotted names of all knobs and sections, each once."""
    return list(dict.fromkeys(knob.name for knob in all_knobs()))


def fields_named(last: str, section: str) -> list[str]:
    """Return the fields with this last part of their name: first those near a section, then short names."""
    if len(last) < 3 or last == "kind":
        return []
    found = [name for name in knob_names() if name.endswith(f".{last}")]
    return sorted(found, key=lambda name: (not _lies_in(name, section), len(name)))


def select(section: str) -> list[Knob]:
    """Return the knobs of a section, of a kind such as ``method.attfc``, or of one name such as ``optim.lr``.

    Raises:
        UserError: no knob lies there; the error names the nearest section.
    """
    chosen = [knob for knob in all_knobs() if any(_lies_in(address, section) for address in _addresses(knob))]
    if chosen:
        return chosen
    parent, _, last = section.rpartition(".")
    if name := plain_name(last):
        raise UserError(f"no section or knob {section!r}: {name}")
    if elsewhere := fields_named(last, parent):
        raise UserError(f"no section or knob {section!r}: did you mean {elsewhere[0]}?")
    known = sorted({address for knob in all_knobs() for address in _sections(_addresses(knob))})
    near = get_close_matches(section, known, 1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"the sections are {', '.join(sorted(Config.model_fields))}"
    raise UserError(f"no section or knob {section!r}: {hint}")


def tables(knobs: Iterable[Knob]) -> list[Table]:
    """Return tables of the knobs, one for each section and the kinds that share it."""
    sections: dict[str, dict[tuple[str, str, str, str], list[Knob]]] = {}
    for knob in knobs:
        same = (knob.name, knob.type, knob.bounds, knob.description)
        sections.setdefault(knob.section, {}).setdefault(same, []).append(knob)
    made = []
    for section, entries in sections.items():
        by_kinds: dict[tuple[tuple[tuple[str, str], ...], ...], list[list[Knob]]] = {}
        for same_knobs in entries.values():
            by_kinds.setdefault(tuple(knob.choices for knob in same_knobs), []).append(same_knobs)
        for kinds, groups in by_kinds.items():
            rows = [(each[0].name, each[0].takes, _defaults(each), each[0].description) for each in groups]
            made.append(Table(section, _title(section, kinds), rows))
    return made


def markdown() -> str:
    """Return the page ``docs/knobs.md``."""
    lines, last = [PAGE], None
    for table in tables(all_knobs()):
        if table.section != last:
            lines.append(f"## {table.section or 'Top level'}\n")
            last = table.section
        if table.title != table.section:
            lines.append(f"### {table.title}\n")
        lines.append(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
        lines += [f"| `{name}` | {' | '.join(map(_escape, more))} |" for name, *more in table.rows]
        lines.append("")
    return "\n".join(lines)


def as_json(knobs: Iterable[Knob]) -> list[dict[str, object]]:
    """Return knobs as JSON-ready dictionaries; ``choices`` become a dictionary of dotted name → kind."""
    return [asdict(knob) | {"choices": dict(knob.choices)} for knob in knobs]


def held_sections(annotation: Any) -> list[type[Section]]:
    """Return the sections that a field of this annotation can hold."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in held_sections(part)]


def kind_of(section: type[Section]) -> str | None:
    """Return the kind that selects a section; None if it is not a member of a choice."""
    kind = section.model_fields.get("kind")
    return None if kind is None or kind.is_required() else str(kind.default)


def _walk(model: type[Section], values: Section | None, prefix: str, choices: tuple) -> Iterator[Knob]:
    """Yield the knobs of a section: first its fields, then what its subsections hold.

    Args:
        model: class of the section.
        values: the section by default; None if the default is another kind, or no section at all.
        prefix: dotted name of the section with a dot, or "" at the top.
        choices: kinds that lead here.
    """
    deeper = []
    is_member = bool(choices) and f"{choices[-1][0]}." == prefix
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        default = getattr(values, name) if values is not None else field.default
        held = held_sections(field.annotation)
        if held:
            shown = "" if isinstance(default, Section) else _show(default)
            yield Knob(path, choices, "section", "", shown, _plain(field.description))
            deeper.append((path, field, default, held))
        elif name != "kind" or not is_member:
            takes, bounds = _describe_type(field.annotation, field.metadata)
            yield Knob(path, choices, takes, bounds, _show(default), _plain(field.description))
    for path, field, default, held in deeper:
        if field.discriminator:
            kinds = {str(kind_of(member)): _plain(member.__doc__, lines=1) for member in held}
            chosen = str(kind_of(type(default))) if isinstance(default, Section) else "required"
            described = " ".join([_plain(field.description), *(f"• {kind}: {text}" for kind, text in kinds.items())])
            yield Knob(f"{path}.kind", choices, f"one of {', '.join(kinds)}", "", chosen, described)
        for member in held:
            inner = (*choices, (path, str(kind_of(member)))) if field.discriminator else choices
            yield from _walk(member, default if isinstance(default, member) else None, f"{path}.", inner)


def _describe_type(annotation: Any, metadata: Sequence[Any] = ()) -> tuple[str, str]:
    """Return the type and the bounds of a field, in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe_type(parts[0], [*metadata, *parts[1:]])
    if origin in (Union, UnionType):
        (inner,) = (part for part in parts if part is not NoneType)
        return _describe_type(inner, metadata)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}", ""
    limits = _limits(metadata)
    if origin is tuple:
        takes, bounds = _describe_type(parts[0])
        count = "" if Ellipsis in parts else len(parts)
        count = limits.get("min_length", count)
        return f"{count} {takes}s".strip(), f"each {bounds}" if bounds else ""
    return PLAIN[origin or annotation], ", ".join(
        f"{sign} {_show(limits[name])}" for name, sign in SIGNS if name in limits
    )


def _limits(metadata: Iterable[Any]) -> dict[str, Any]:
    """Return the bounds in a field's metadata, by their pydantic names."""
    found: dict[str, Any] = {}
    for item in metadata:
        if isinstance(item, FieldInfo):
            found |= _limits(item.metadata)
        for name in (*(name for name, _ in SIGNS), "min_length"):
            if getattr(item, name, None) is not None and not isinstance(item, FieldInfo):
                found[name] = getattr(item, name)
    return found


def _plain(docstring: str | None, lines: int | None = None) -> str:
    """Return the first lines of a docstring as one line of plain text."""
    text = "\n".join((docstring or "").splitlines()[:lines])
    return " ".join(text.replace("``", "`").split())


def _show(value: object) -> str:
    """Return a default as a recipe writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, tuple):
        return str(list(value))
    return str(value) if isinstance(value, int | dict) else "required"


def _addresses(knob: Knob) -> Iterator[str]:
    """Yield the names by which a knob can be selected: each kind may follow the name of its section."""
    for named in product((False, True), repeat=len(knob.choices)):
        address = knob.name
        for (path, kind), is_named in reversed(list(zip(knob.choices, named, strict=True))):
            if is_named:
                address = f"{path}.{kind}{address.removeprefix(path)}"
        yield address


def _lies_in(address: str, section: str) -> bool:
    return f"{address}.".startswith(f"{section}.")


def _sections(addresses: Iterable[str]) -> Iterator[str]:
    """Yield addresses and the sections that lead to them."""
    for address in addresses:
        parts = address.split(".")
        yield from (".".join(parts[: end + 1]) for end in range(len(parts)))


def _kinds_by_choice(kinds: Iterable[Iterable[tuple[str, str]]]) -> Mapping[str, list[str]]:
    """Return, for each choice's name, the kinds that occur."""
    found: dict[str, list[str]] = {}
    for choices in kinds:
        for path, kind in choices:
            if kind not in found.setdefault(path, []):
                found[path].append(kind)
    return found


def _title(section: str, kinds: Iterable[Iterable[tuple[str, str]]]) -> str:
    """Return a table's heading: the section, and the kinds that have it."""
    by_choice = _kinds_by_choice(kinds)
    chosen = [f"{path}.kind = {' | '.join(names)}" for path, names in by_choice.items()]
    if section in by_choice:
        return ", ".join(chosen)
    return f"{section} with {', '.join(chosen)}" if chosen else section


def _defaults(same: Sequence[Knob]) -> str:
    """Return the default of a knob; where kinds differ, the first kind's, and those of the others behind."""
    by_default: dict[str, list[str]] = {}
    for knob in same:
        by_default.setdefault(knob.default, []).append(knob.choices[-1][1] if knob.choices else "")
    first, *others = by_default
    more = "; ".join(f"{', '.join(by_default[default])}: {default}" for default in others)
    return f"{first} ({more})" if more else first


def _escape(cell: str) -> str:
    """Return a cell of a Markdown table."""
    return cell.replace("|", "\\|")
