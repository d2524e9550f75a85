"""Reads pickles of plain values: lists, tuples, dicts, bytes, texts, numbers and flags.

A pickle is a program, and this reader runs none. It walks over the opcodes with the standard library's
``pickletools``. It knows only opcodes that build plain values, and refuses all others.
"""

import pickletools
from collections.abc import Callable
from typing import Any

ENCODE = object()  # stands for _codecs.encode, which protocols 0 to 2 call to build bytes
VALUES: dict[str, Callable[[], object]] = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict}
CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False, "NONE": None}
NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"}
BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8", "SHORT_BINSTRING", "BINSTRING", "STRING"}
TEXTS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
STORE, LOAD = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"GET", "BINGET", "LONG_BINGET"}
DAMAGES = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)  # of reading


def read_plain_pickle(data: bytes) -> object:
    """Read a pickle of plain values; byte strings stay bytes.

    Raises:
        DAMAGES: The pickle is damaged, or builds or calls anything else.
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
            values = stack[-2:]
            del stack[-2:]
            _fill(stack[-1], values)
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


def _fill(value: object, content: list[object]) -> None:
    """Put keys and values, which alternate, into a value that must be a dict."""
    if not isinstance(value, dict):
        raise ValueError("damaged")
    for key, item in zip(content[::2], content[1::2], strict=True):
        if not isinstance(key, str | bytes | int):  # the hash of a deeply nested tuple overflows the stack
            raise ValueError("a key that is neither text nor number")
        value[key] = item
