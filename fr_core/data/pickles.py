"""Reads pickles of plain values: lists, tuples, dicts, bytes, texts, numbers and flags, also numpy's.

A pickle is a program, and this reader runs none. It walks over the opcodes with the standard library's
``pickletools``. It knows only opcodes that build plain values, and refuses all others. What a pickle calls is replaced
by a function of :mod:`fr_core.data.pickled_calls`, or refused.
"""

import pickletools
from collections.abc import Callable
from typing import Any

from fr_core.data.pickled_calls import CALLS, Unbuilt, build, call

VALUES: dict[str, Callable[[], object]] = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict}
CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False, "NONE": None}
NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT"}
BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8", "SHORT_BINSTRING", "BINSTRING", "STRING"}
TEXTS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
STORE, LOAD = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"GET", "BINGET", "LONG_BINGET"}
DAMAGES = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)  # of reading
GROWTH = 4  # bytes that calls may build for each byte of the pickle; pickles that nobody made for harm need two


def read_plain_pickle(data: bytes) -> object:
    """Read a pickle of plain values; byte strings stay bytes, and arrays become bytes or lists.

    Raises:
        DAMAGES: The pickle is damaged, or builds or calls anything else.
    """
    stack: list[object] = []
    marks: list[int] = []  # positions on the stack where open lists and tuples begin
    memo: dict[int, object] = {}
    room = GROWTH * len(data)
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
            value = memo[int(argument)]
            stack.append(value.value if isinstance(value, Unbuilt) else value)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(_pop(stack, int(name[-1]))))
        elif name in ("TUPLE", "LIST", "APPENDS", "DICT", "SETITEMS"):
            mark = marks.pop()
            values = stack[mark:]
            del stack[mark:]
            if name == "APPENDS":
                _list(stack[-1]).extend(values)
            elif name == "SETITEMS":
                _fill(stack[-1], values)
            elif name == "DICT":
                stack.append({})
                _fill(stack[-1], values)
            else:
                stack.append(tuple(values) if name == "TUPLE" else values)
        elif name == "APPEND":
            value = stack.pop()
            _list(stack[-1]).append(value)
        elif name == "SETITEM":
            values = _pop(stack, 2)
            _fill(stack[-1], values)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            function = argument if name == "GLOBAL" else " ".join(map(_text, _pop(stack, 2)))
            if function not in CALLS:
                raise ValueError(f"it would run {function}")
            stack.append(CALLS[function])
        elif name in ("REDUCE", "BUILD"):
            target, value = _pop(stack, 2)
            stack.append((call if name == "REDUCE" else build)(target, value))
            room -= len(stack[-1]) if isinstance(stack[-1], bytes | list) else 0
            if room < 0:
                raise ValueError("it would grow without end")
        else:
            raise ValueError(f"it would run {name} {argument if isinstance(argument, str) else ''}".strip())
    raise ValueError("truncated")


def _pop(stack: list[object], count: int) -> list[object]:
    """Take the last values from a stack."""
    if len(stack) < count:
        raise ValueError("damaged")
    values = stack[-count:]
    del stack[-count:]
    return values


def _text(value: object) -> str:
    """Return a value that must be a text."""
    if not isinstance(value, str):
        raise ValueError("damaged")
    return value


def _list(value: object) -> list[object]:
    """Return a value that must be a list."""
    if not isinstance(value, list):
        raise ValueError("damaged")
    return value


def _fill(value: object, content: list[object]) -> None:
    """Put keys and values, which alternate, into a value that must be a dict."""
    if not isinstance(value, dict):
        raise ValueError("damaged")
    for key, item in zip(content[::2], content[1::2], strict=True):
        if not isinstance(key, str | bytes | int):  # the hash of a deeply nested tuple overflows the stack
            raise ValueError("a key that is neither text nor number")
        value[key] = item
