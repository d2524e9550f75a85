"""Reads LMDB without its C library, which maps the file: one that was cut off or damaged would end the process.

An LMDB is a B+ tree of pages. Two pages at the beginning describe it in turn; the one of the later transaction counts.
Branches hold the numbers of pages below them, leaves hold keys and values. A long value has pages of its own, one after
the other. So each value is one range of bytes in the file.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from fr_core.data.store import LocalBytes

HEADER = struct.Struct("<QHHHH")  # page number, -, flags, lower and upper bound of the free space
META = struct.Struct("<II16xI44x32xQQ8xQ")  # behind the header: magic, version, page size, entries, root, transaction
NODE = struct.Struct("<HHHH")  # three words whose meaning depends on the page, and the length of the key
MAGIC, VERSION = 0xBEEFC0DE, 1
BRANCH, LEAF, OVERFLOW = 1, 2, 4  # flags of pages
BIG, SUBTREE, DUPLICATES = 1, 2, 4  # flags of nodes in leaves
NO_PAGE = 2**64 - 1
PAGE_SIZES = [2**n for n in range(9, 17)]


class Entry(NamedTuple):
    """A key, and the place of its value in the file."""

    key: bytes
    start: int
    length: int  # bytes


class _Node(NamedTuple):
    """An entry of a page: its words, and where its key and what follows lie in the page."""

    low: int
    middle: int
    high: int
    key: int
    rest: int


def read_entries(data: LocalBytes) -> Iterator[Entry]:
    """Yield all entries of the unnamed database, in the order of their keys.

    Raises:
        OSError: the file is unreadable.
        ValueError: the file is no LMDB, was cut off, is damaged, or holds named databases.
    """
    page_size, root, count = _read_meta(data)
    seen: set[int] = set()
    found = size = 0
    ahead = [] if root == NO_PAGE else [root]
    while ahead:
        number = ahead.pop()
        if number in seen:
            raise _damaged(number)
        seen.add(number)
        page, flags = _read_page(data, number, page_size)
        nodes = _nodes(page, number)
        if flags & BRANCH:
            ahead += [node.low | node.middle << 16 | node.high << 32 for node in reversed(nodes)]
            continue
        if not flags & LEAF:
            raise _damaged(number)
        for node in nodes:
            if node.high & (SUBTREE | DUPLICATES):
                raise ValueError("it holds named databases, which are not read")
            length = node.low | node.middle << 16
            if node.high & BIG:
                first = int.from_bytes(page[node.rest : node.rest + 8], "little")
                _, flags = _read_page(data, first, page_size)
                start = first * page_size + HEADER.size
                if not flags & OVERFLOW:
                    raise _damaged(first)
            else:
                start = number * page_size + node.rest
                if node.rest + length > page_size:
                    raise _damaged(number)
            if start + length > len(data):
                raise ValueError("cut off inside a value; copy the file again")
            found, size = found + 1, size + length
            if size > len(data):
                raise _damaged(number)  # values overlap
            yield Entry(page[node.key : node.rest], start, length)
    if found != count:
        raise ValueError(f"damaged: {found} of {count} entries are left; copy the file again")


def _read_meta(data: LocalBytes) -> tuple[int, int, int]:
    """Return the size of a page, the number of the root page, and the number of entries."""
    newest = None
    for start in (0, *PAGE_SIZES):
        head = data[start + HEADER.size : start + HEADER.size + META.size]
        if len(head) < META.size:
            break
        magic, version, page_size, count, root, transaction = META.unpack(head)
        if magic == MAGIC and page_size in PAGE_SIZES and start in (0, page_size):
            if version != VERSION:
                raise ValueError(f"its version is {version}, not {VERSION}; copy it with mdb_copy of LMDB 0.9")
            if newest is None or transaction > newest[0]:
                newest = transaction, page_size, root, count
    if newest is None:
        raise ValueError("no LMDB, or damaged in its first page" if len(data) else "the file is empty")
    if len(data) < 2 * newest[1]:
        raise ValueError("cut off in its first pages; copy the file again")
    return newest[1:]


def _read_page(data: LocalBytes, number: int, page_size: int) -> tuple[bytes, int]:
    """Read a page and its flags."""
    if (number + 1) * page_size > len(data):
        raise ValueError(f"cut off before page {number}; copy the file again")
    page = data[number * page_size : (number + 1) * page_size]
    own, _, flags, _, _ = HEADER.unpack_from(page)
    if own != number:
        raise _damaged(number)
    return page, flags


def _nodes(page: bytes, number: int) -> list[_Node]:
    """Read the entries of a branch or leaf."""
    lower = HEADER.unpack_from(page)[3]
    if not HEADER.size <= lower <= len(page):
        raise _damaged(number)
    nodes = []
    for (at,) in struct.iter_unpack("<H", page[HEADER.size : lower - lower % 2]):
        if not lower <= at <= len(page) - NODE.size:
            raise _damaged(number)
        low, middle, high, key_length = NODE.unpack_from(page, at)
        key = at + NODE.size
        if key + key_length > len(page):
            raise _damaged(number)
        nodes.append(_Node(low, middle, high, key, key + key_length))
    return nodes


def _damaged(number: int) -> ValueError:
    """Make the error for a page that is not what its tree says."""
    return ValueError(f"damaged at page {number}; copy the file again")
