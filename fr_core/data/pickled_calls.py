"""The calls that a pickle of plain values may hold: those by which bytes and numpy's numbers and arrays are pickled.

None of them is the call that the pickle names. Each is a function of this file, which checks its arguments and returns
plain values. Numpy's numbers become Python's, an array of bytes becomes bytes, and other arrays become lists.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

PLAIN_TYPES = re.compile(r"[?]|b1|[iu][1248]|f[248]|[SU]\d{1,9}|O[48]?")  # numpy's codes; S and U are texts
Built = Callable[[object], object]


@dataclass(frozen=True)
class Call:
    """What stands on the stack for a function of the pickle; ``make`` returns its result."""

    make: Callable[..., object]


class Unbuilt:
    """What stands on the stack for an object that a pickle makes first and fills afterwards."""

    def __init__(self, build: Built) -> None:
        self.build = build
        self.value: object = self  # until it is filled


def _encode(text: object, codec: object) -> bytes:
    """Stand for ``_codecs.encode``, by which protocols 0 to 2 write bytes."""
    if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
        raise ValueError("bytes in another encoding than latin1")
    return text.encode("latin-1")


def _bytes(content: object = b"", codec: object = "latin-1") -> bytes:
    """Stand for ``bytes`` and ``bytearray``, whose content is bytes or a text of latin-1."""
    return content if isinstance(content, bytes) else _encode(content, codec)


def _dtype(code: object, *_: object) -> Unbuilt:
    """Stand for ``numpy.dtype``, which learns its byte order afterwards."""
    name = _text(code)
    if not PLAIN_TYPES.fullmatch(name):
        raise ValueError(f"numpy values of the type {name[:20]}")

    def build(state: object) -> np.dtype:
        match state:
            case (int(), order, None, None, None, *_) if _text(order) in ("<", ">", "|", "="):
                return np.dtype(_text(order) + name)
        raise ValueError("numpy values that are no plain numbers")

    return Unbuilt(build)


def _scalar(dtype: object, content: object) -> object:
    """Stand for numpy's ``scalar``, a number from its bytes."""
    if not isinstance(dtype, np.dtype) or not isinstance(content, bytes) or len(content) != dtype.itemsize:
        raise ValueError("damaged")
    return np.frombuffer(content, dtype)[0].item()


def _reconstruct(*_: object) -> Unbuilt:
    """Stand for numpy's ``_reconstruct``, an empty array that is filled afterwards."""

    def build(state: object) -> object:
        match state:
            case (int(), tuple() as shape, np.dtype() as dtype, _, content):
                return _array(content, dtype, shape)
        raise ValueError("damaged")

    return Unbuilt(build)


def _from_buffer(content: object, dtype: object, shape: object, *_: object) -> object:
    """Stand for numpy's ``_frombuffer``, by which protocol 5 writes arrays."""
    if not isinstance(dtype, np.dtype) or not isinstance(shape, tuple):
        raise ValueError("damaged")
    return _array(content, dtype, shape)


def _array(content: object, dtype: np.dtype, shape: tuple[object, ...]) -> object:
    """Return the values of an array: its only value, bytes, or a list."""
    if len(shape) > 1:
        raise ValueError(f"a numpy array of {len(shape)} dimensions")
    values: list[object] | bytes
    if isinstance(content, list) and dtype.hasobject:
        values = content
    elif isinstance(content, bytes) and not dtype.hasobject:
        values = content if dtype == np.uint8 else np.frombuffer(content, dtype).tolist()
    else:
        raise ValueError("damaged")
    if len(values) != (shape[0] if shape else 1):
        raise ValueError("damaged")
    return values if shape else values[0]


def _text(value: object) -> str:
    """Return a text, which Python 2 wrote as bytes."""
    if not isinstance(value, str | bytes):
        raise ValueError("damaged")
    return value if isinstance(value, str) else value.decode("latin-1")


CALLS = {
    "_codecs encode": Call(_encode),
    "numpy dtype": Call(_dtype),
    "numpy ndarray": Call(_reconstruct),  # an argument of _reconstruct
    **{f"{module} {name}": Call(_bytes) for module in ("builtins", "__builtin__") for name in ("bytes", "bytearray")},
    **{
        f"numpy.{core}.{module} {name}": Call(make)
        for core in ("core", "_core")  # before and since numpy 2
        for module, name, make in (
            ("multiarray", "scalar", _scalar),
            ("multiarray", "_reconstruct", _reconstruct),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}


def call(function: object, arguments: object) -> object:
    """Return what a call of a pickle stands for.

    Raises:
        ValueError, TypeError: the function is none of ``CALLS``, or its arguments are others than it is pickled with.
    """
    if not isinstance(function, Call) or not isinstance(arguments, tuple):
        raise ValueError("damaged")
    return function.make(*arguments)


def build(target: object, state: object) -> object:
    """Return what an object that a pickle made first is, once it is filled.

    Raises:
        ValueError, TypeError: the object is none of numpy's, or its state is another than it is pickled with.
    """
    if not isinstance(target, Unbuilt):
        raise ValueError("damaged")
    target.value = target.build(state)
    return target.value
