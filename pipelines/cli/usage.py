"""Mistakes in options and arguments, as one line with its mend."""

import re
from collections.abc import Sequence

import typer

from fr_core.config.reference import knob_names
from fr_core.config.words import plain_name

# Typer exports only some of its exceptions; this is the base of those for a wrong usage.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

# What the libraries below say of a value, and how it reads behind the value.
PLAIN = (
    (r"Input should be a valid number.*|'.*' is not a valid float.*", "is no number"),
    (r"Input should be a valid integer.*|'.*' is not a valid int.*", "is no whole number"),
    (r"Input should be greater than or equal to (.*)", r"must be at least \1"),
    (r"Input should be less than or equal to (.*)", r"must be at most \1"),
    (r".* is not in the range (.*)", r"must be in the range \1"),
)


def explain_usage(error: Exception, words: Sequence[str]) -> str:
    """Return what is wrong with a command line, and how to write it.

    Args:
        error: a :data:`UsageError`.
        words: words of the command line.
    """
    option = getattr(error, "option_name", "")
    field = option.lstrip("-")
    if field in knob_names():
        return f"{option} is a field of the recipe: write {field}={_value(option, words)} without the dashes"
    context = getattr(error, "ctx", None)
    near = getattr(error, "possibilities", None)
    if option and near:
        return f"no option {option}: did you mean {sorted(near)[0]}?"
    takes_fields = context and any(param.name == "overrides" for param in context.command.params)
    if takes_fields and (name := plain_name(field)):
        return f"no option {option}: {name}"
    message = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
    if bad := re.fullmatch(r"Invalid value for '([^']*)': (.*)", message):
        name = bad[1].split(" / ")[0]
        for pattern, plain in PLAIN:
            if re.fullmatch(pattern, bad[2]):
                return f"{name} {_value(name, words)} {re.sub(f'^(?:{pattern})$', plain, bad[2])}"
        message = f"{name}: {bad[2]}"
    message = re.sub(r"^Missing (\w+) '([^']*)'", lambda found: f"missing {found[1]} {found[2].upper()}", message)
    message = message[:1].lower() + message[1:].replace("such option: ", "option ")
    hint = f": see {context.command_path} --help" if context and not message.endswith("?") else ""
    return message + hint


def _value(option: str, words: Sequence[str]) -> str:
    """Return the value that a command line gives to an option."""
    for word, following in zip(words, [*words[1:], "…"], strict=True):
        name, equals, value = word.partition("=")
        if name == option:
            return value if equals else following
    return "…"
