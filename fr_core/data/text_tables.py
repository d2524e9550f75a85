"""Text tables as people write them: cut by tabs, semicolons, commas or blanks, with or without a header."""

import csv
import json
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
    *("class_id", "label_id", "id", "target", "person_name", "subject_name", "identity_name", "class_name", "user_id"),
    *("celeb_id", "celebrity"),
)
COMMENT = re.compile(r"\s*#(\s|$)")
JSON_LIST = re.compile(r'\[\s*([\[{"]|$)')
_IMAGE = re.compile(rf"^.*({'|'.join(re.escape(suffix) for suffix in sorted(SUFFIXES))})$", re.IGNORECASE)


@dataclass(frozen=True)
class Table:
    """The cells of a text table, stripped; empty lines are left out."""

    path: AnyPath  # for error messages
    header: list[str] | None  # names of the columns in lower case, with _ for blanks
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

    The first line is a header if one of its cells is a ``known`` name. JSON Lines are a table whose header is the keys.
    Lines that begin with ``#`` and a blank are comments.

    Args:
        path: the file, local or at a URL.
        known: names of columns, in lower case.

    Raises:
        UserError: the file is unreadable, or no text of a known encoding.
    """
    numbered = enumerate(read_text(path).splitlines(), 1)
    lines = [(number, line) for number, line in numbered if line.strip() and not COMMENT.match(line)]
    start = lines[0][1].lstrip() if lines else ""
    if JSON_LIST.match(start):
        raise UserError(f"{path}: a JSON list; write one JSON object on each line, or a CSV")
    if start.startswith("{"):
        return _read_json_lines(path, lines)
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
    header = [_name(cell) for cell in rows[0]] if rows else []
    if set(header) & set(known):
        return Table(path, header, rows[1:], numbers[1:], delimiter)
    return Table(path, None, rows, numbers, delimiter)


def _read_json_lines(path: AnyPath, lines: Sequence[tuple[int, str]]) -> Table:
    """Read lines of JSON objects, as Hugging Face's ``metadata.jsonl`` has them; each has the keys of the first.

    Raises:
        UserError: a line is no JSON object, or lacks a key.
    """
    header: list[str] = []
    rows = []
    for number, line in lines:
        try:
            fields = json.loads(line)
            header = header or list(fields)
            rows.append([str(fields[name]).strip() for name in header])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{path}: line {number}: no JSON object with the fields of the first line") from None
    return Table(path, [_name(name) for name in header], rows, [number for number, _ in lines], ",")


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
    if b"\0" in data[:SAMPLE] and data[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: no text, or UTF-16 without its mark; save the file as UTF-8")
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def find_delimiter(lines: Sequence[str], known: Collection[str]) -> str | None:
    """Return the delimiter between the known names of a header, or that every line has; None for blanks."""
    for delimiter in DELIMITERS if lines else "":
        first = {_name(cell.strip().strip('"')) for cell in lines[0].split(delimiter)}
        if (len(first) > 1 and first & set(known)) or all(delimiter in line for line in lines):
            return delimiter
    return None


def _name(cell: str) -> str:
    """Return a column's name in lower case, with _ for blanks and hyphens."""
    return re.sub(r"[\s-]+", "_", cell.lower())


def names_image(cell: str) -> bool:
    """Return whether a cell ends in an image's suffix."""
    return _IMAGE.match(cell) is not None
