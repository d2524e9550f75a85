"""Text tables as people write them: cut by tabs, semicolons, commas or blanks, with or without a header."""

import csv
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fr_core.data.photos import SUFFIXES
from fr_core.data.store import AnyPath, local_copy
from fr_core.errors import UserError

DELIMITERS = "\t;,|"  # in the order in which they are tried; else cells are cut at blanks
SAMPLE = 100  # lines that tell the delimiter
PATH_COLUMNS = (
    *("path", "file_name", "filename", "file", "image", "img", "image_path", "img_path", "filepath", "file_path"),
    *("image_name", "image_id", "name_of_image"),
)
IDENTITY_COLUMNS = (
    *("identity", "label", "name", "class", "cls", "person", "subject", "identity_id", "person_id", "subject_id"),
    *("class_id", "label_id", "id", "target"),
)
_IMAGE = re.compile(rf"^.*({'|'.join(re.escape(suffix) for suffix in sorted(SUFFIXES))})$", re.IGNORECASE)


@dataclass(frozen=True)
class Table:
    """The cells of a text table, stripped; empty lines are left out."""

    path: AnyPath  # for error messages
    header: list[str] | None  # names of the columns in lower case
    rows: list[list[str]]
    lines: list[int]  # number of each row's line in the file, from 1
    delimiter: str | None  # None: blanks

    def column(self, known: Sequence[str]) -> int | None:
        """Return the position of the first known column, or None."""
        return next((self.header.index(name) for name in known if name in self.header), None) if self.header else None

    def bad_line(self, row: int, why: str) -> UserError:
        """Return the error of a row."""
        return UserError(f"{self.path}: line {self.lines[row]}: {why}")


def read_table(path: AnyPath, known: Collection[str]) -> Table:
    """Read a text table in UTF-8, or in UTF-16 with a byte-order mark.

    The first line is a header if one of its cells is a ``known`` name.

    Args:
        path: the file, local or at a URL.
        known: names of columns, in lower case.

    Raises:
        UserError: the file is unreadable, or no text of a known encoding.
    """
    lines = [(number, line) for number, line in enumerate(read_text(path).splitlines(), 1) if line.strip()]
    delimiter = find_delimiter([line for _, line in lines[:SAMPLE]], known)
    try:
        if delimiter:
            cut = csv.reader((line for _, line in lines), delimiter=delimiter, skipinitialspace=True)
            rows = [[cell.strip() for cell in row] for row in cut]
        else:
            rows = [line.split() for _, line in lines]
    except csv.Error as error:
        raise UserError(f"{path}: {error}") from None
    if len(rows) != len(lines):
        raise UserError(f"{path}: a quoted cell runs over several lines; write each row on one line")
    numbers = [number for number, _ in lines]
    header = [cell.lower() for cell in rows[0]] if rows else []
    if set(header) & set(known):
        return Table(path, header, rows[1:], numbers[1:], delimiter)
    return Table(path, None, rows, numbers, delimiter)


def read_text(path: AnyPath) -> str:
    """Read a text file.

    Raises:
        UserError: the file is unreadable, or neither UTF-8 nor marked as UTF-16.
    """
    try:
        with local_copy(path) as local:
            data = local.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def find_delimiter(lines: Sequence[str], known: Collection[str]) -> str | None:
    """Return the delimiter between the known names of a header, or that every line has; None for blanks."""
    for delimiter in DELIMITERS if lines else "":
        first = {cell.strip().strip('"').lower() for cell in lines[0].split(delimiter)}
        if (len(first) > 1 and first & set(known)) or all(delimiter in line for line in lines):
            return delimiter
    return None


def names_image(cell: str) -> bool:
    """Return whether a cell ends in an image's suffix."""
    return _IMAGE.match(cell) is not None
