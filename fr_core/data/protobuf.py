"""Reads the fields of protocol buffers without their description, for TFRecord and for Caffe's LMDB.

A message is a row of fields. A field begins with its number and one of four types. A message inside a message has the
type of bytes, so the caller says which bytes to read on as fields.
"""

from collections.abc import Iterator
from typing import NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
LONGEST_VARINT = 10  # bytes


class Span(NamedTuple):
    """The place of bytes in a message: from ``start`` to before ``end``."""

    start: int
    end: int


def read_fields(data: bytes, span: Span) -> Iterator[tuple[int, int | Span]]:
    """Yield the number and the value of each field in a part of ``data``; numbers of a fixed width are skipped.

    Raises:
        ValueError: the bytes are no message.
    """
    at, end = span
    while at < end:
        key, at = read_varint(data, at, end)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = read_varint(data, at, end)
            yield number, value
        elif kind == BYTES:
            length, at = read_varint(data, at, end)
            at += length
            if at > end:
                raise ValueError("damaged")
            yield number, Span(at - length, at)
        elif kind in (FIXED64, FIXED32):
            at += 8 if kind == FIXED64 else 4
        else:
            raise ValueError("damaged")
    if at != end:
        raise ValueError("damaged")


def read_varint(data: bytes, start: int, end: int) -> tuple[int, int]:
    """Read a number of a varying width that ends before ``end``; return it and the position behind it.

    Raises:
        ValueError: the number does not end there, or has more than ten bytes.
    """
    value = shift = 0
    for at in range(start, end):
        byte = data[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
        shift += 7
        if shift == 7 * LONGEST_VARINT:
            break
    raise ValueError("damaged")


def signed(value: int) -> int:
    """Return the int64 that a number of a varying width stands for."""
    return (value + 2**63) % 2**64 - 2**63
