"""Reads ``.bin`` verification sets (lfw.bin, agedb_30.bin …): pickles of encoded images and flags.

A pickle is a program, and this reader runs none. It walks over the opcodes with the standard library's
``pickletools``. It knows only opcodes that build lists, tuples, bytes, numbers and flags, and refuses all others.
"""

import pickletools
from pathlib import Path
from typing import Any

from fr_core.errors import UserError

ENCODE = object()  # stands for _codecs.encode, which protocols 0 to 2 call to build bytes
VALUES = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False, "NONE": None}
NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"}
BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8", "SHORT_BINSTRING", "BINSTRING", "STRING"}
TEXTS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
STORE, LOAD = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"GET", "BINGET", "LONG_BINGET"}


def read_bin(path: str | Path) -> tuple[list[bytes], list[bool]]:
    """Read the encoded images of a ``.bin`` set, two for each pair in turn, and whether each pair shows one person.

    Raises:
        UserError: The file is unreadable, damaged, no pickle of images and flags, or a program.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    try:
        content = read_plain_pickle(data)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: not a verification set: {str(error)[:200]}") from None
    if not isinstance(content, (tuple, list)) or len(content) != 2:
        raise UserError(f"{path}: not a verification set: expected images and flags")
    images, flags = content
    if not isinstance(images, list) or not all(isinstance(image, bytes) for image in images):
        raise UserError(f"{path}: not a verification set: expected a list of encoded images")
    if not isinstance(flags, list) or not all(flag in (0, 1) for flag in flags):
        raise UserError(f"{path}: not a verification set: expected a list of flags")
    if len(images) != 2 * len(flags) or not flags:
        raise UserError(f"{path}: {len(images)} images for {len(flags)} pairs: expected two images for each pair")
    return images, [bool(flag) for flag in flags]


def read_plain_pickle(data: bytes) -> object:
    """Read a pickle of plain values; byte strings stay bytes.

    Raises:
        ValueError: The pickle is damaged, or builds or calls anything else.
        IndexError, KeyError, TypeError, AttributeError: The pickle is damaged.
    """
    stack: list[object] = []
    marks: list[int] = []  # positions on the stack where open lists and tuples begin
    memo: dict[int, object] = {}
    argument: Any  # its type depends on the opcode
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name == "MARK":
            marks.append(len(stack))
        elif name in VALUES:
            stack.append(VALUES[name]())
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in NUMBERS:
            stack.append(argument)
        elif name in BYTES:
            stack.append(argument.encode("latin-1") if isinstance(argument, str) else bytes(argument))
        elif name in TEXTS:
            stack.append(str(argument))
        elif name in STORE:
            memo[len(memo) if name == "MEMOIZE" else int(argument)] = stack[-1]
        elif name in LOAD:
            stack.append(memo[int(argument)])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            if len(stack) < count:
                raise ValueError("damaged")
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("TUPLE", "LIST", "APPENDS"):
            mark = marks.pop()
            values = stack[mark:]
            del stack[mark:]
            if name == "APPENDS":
                _list(stack[-1]).extend(values)
            else:
                stack.append(tuple(values) if name == "TUPLE" else values)
        elif name == "APPEND":
            value = stack.pop()
            _list(stack[-1]).append(value)
        elif name == "GLOBAL" and argument == "_codecs encode":
            stack.append(ENCODE)
        elif name == "REDUCE" and stack[-2] is ENCODE:
            match stack.pop():
                case (str(text), "latin1"):
                    stack[-1] = text.encode("latin-1")
                case _:
                    raise ValueError("bytes in another encoding than latin1")
        else:
            raise ValueError(f"it would run {name} {argument if isinstance(argument, str) else ''}".strip())
    raise ValueError("truncated")


def _list(value: object) -> list[object]:
    """Return a value that must be a list."""
    if not isinstance(value, list):
        raise ValueError("damaged")
    return value
