"""Lists of images and their identities, in the forms that the field writes (docs/data.md).

A header may name the columns. Without one, the column whose cells end in an image's suffix holds the paths. Of the
others, the identity is the one that is neither constant nor a running number:

- ``path identity`` and ``identity path``;
- ``index label path``, MXNet's ``.lst``;
- ``aligned path label``, insightface's ``.lst``;
- ``path 0 label 0``, MagFace's list.

Lists of the records of a ``.rec`` have numbers in place of paths.
"""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from fr_core.data.photos import SUFFIXES
from fr_core.data.store import AnyPath
from fr_core.data.text_tables import IDENTITY_COLUMNS, PATH_COLUMNS, Table, names_image, read_table
from fr_core.errors import UserError

WHOLE_NUMBER = re.compile(r"[-+]?\d+(\.0*)?")
RECORD_NUMBER = re.compile(r"[0-9]{1,18}")
_SUFFIX = "|".join(re.escape(suffix) for suffix in sorted(SUFFIXES, key=len, reverse=True))
# Numbers, a path that may hold blanks, the rest: how a line cut at blanks is read.
_LINE = re.compile(rf"(?P<before>(?:[-+.\d]+\s+)*)(?P<path>\S.*?(?:{_SUFFIX}))(?P<after>(?:\s.*)?)", re.IGNORECASE)


def read_labels(path: AnyPath) -> list[tuple[str, str]]:
    """Read a list of images: the path and the identity of each.

    Raises:
        UserError: the list is unreadable or empty, a line has no path or no identity, or two columns could be either.
    """
    table = read_table(path, {*PATH_COLUMNS, *IDENTITY_COLUMNS})
    if not table.rows:
        raise UserError(f"{path}: names no images; give a path and an identity for each")
    if table.header:
        return _by_header(table, table.header)
    rows = table.rows if table.delimiter else _rows_with_blanks(table)
    width = len(rows[0])
    for number, row in enumerate(rows):
        if len(row) != width or width < 2:
            raise table.bad_line(number, "expected a path and an identity")
    columns = list(zip(*rows, strict=True))
    paths = _path_column(path, columns)
    if len(rows) > 2 and not names_image(columns[paths][0]) and all(map(names_image, columns[paths][1:])):
        columns = [column[1:] for column in columns]  # a header of other names
    identity = _identity_column(path, columns, [i for i in range(width) if i != paths], "give the file a header line")
    return _pairs(table, columns[paths], columns[identity])


def read_record_labels(path: AnyPath) -> dict[int, str]:
    """Read a list of the records of a ``.rec``: the number and the identity of each.

    A line is a number and an identity. Or it is a number and a path whose folder is the identity, as DCFace has it. Or
    it is a number, a label and a path, as MXNet's ``.lst`` has it.

    Raises:
        UserError: the list is unreadable or empty, a line has another form, or a number occurs twice.
    """
    table = read_table(path, ())
    rows = table.rows
    if not table.delimiter and {len(row) for row in rows} not in ({2}, {3}):  # names hold blanks
        rows = [[row[0], " ".join(row[1:])] for row in rows]
    if not rows:
        raise UserError(f"{path}: names no records; give a number and an identity for each")
    for number, row in enumerate(rows):
        if len(row) != len(rows[0]) or len(row) < 2 or not RECORD_NUMBER.fullmatch(row[0]):
            raise table.bad_line(number, "expected the number of a record, and an identity or PERSON/NAME.jpg")
    numbers, *others = zip(*rows, strict=True)
    if len(others) == 1 and all(names_image(cell) for cell in others[0]):
        identities: Sequence[str] = [PurePosixPath(cell.replace("\\", "/")).parent.name for cell in others[0]]
    else:
        candidates = [i for i, column in enumerate(others) if not all(map(names_image, column))]
        if not candidates:
            raise UserError(f"{path}: several columns name images; keep the number and one of them")
        places = [str(i) for i in range(2, len(others) + 2)]
        identities = others[_identity_column(path, others, candidates, "keep one of them", places)]
    found: dict[int, str] = {}
    for number, (_, identity) in enumerate(_pairs(table, numbers, identities)):
        if found.setdefault(int(numbers[number]), identity) != identity:
            raise table.bad_line(number, f"record {numbers[number]} has two identities; remove one")
    return found


def _by_header(table: Table, header: list[str]) -> list[tuple[str, str]]:
    """Read a list whose header names its columns."""
    for number, row in enumerate(table.rows):
        if len(row) != len(header):
            raise table.bad_line(number, f"{len(row)} cells, but the header has {len(header)}")
    columns = list(zip(*table.rows, strict=True))
    candidates = [header.index(name) for name in IDENTITY_COLUMNS if name in header]
    paths = table.column(PATH_COLUMNS)
    if paths is None:
        images = [i for i, column in enumerate(columns) if i not in candidates and all(map(names_image, column))]
        paths = images[0] if len(images) == 1 else None
    if paths is None or not candidates:
        what = "path" if paths is None else "identity"
        raise UserError(f"{table.path}: no column {what}; rename one of its columns {', '.join(header)}")
    identity = _identity_column(table.path, columns, [i for i in candidates if i != paths], "keep one of them", header)
    return _pairs(table, columns[paths], columns[identity])


def _rows_with_blanks(table: Table) -> list[list[str]]:
    """Cut lines at blanks, but not inside of paths: numbers, path, numbers, or path and name."""
    rows = []
    for row in table.rows:
        found = _LINE.fullmatch(" ".join(row))
        if len(row) == 2 or found is None:
            rows.append(row if len(row) == 2 else [" ".join(row[:-1]), *row[-1:]])
            continue
        after = found["after"].split()
        cells = all(WHOLE_NUMBER.fullmatch(cell) or names_image(cell) for cell in after)
        rows.append([*found["before"].split(), found["path"], *(after if cells else [" ".join(after)])])
    return rows


def _path_column(path: AnyPath, columns: Sequence[Sequence[str]]) -> int:
    """Return which column holds the paths: the only one of image names, or of two columns without any the first."""
    found = [i for i, column in enumerate(columns) if all(map(names_image, column))]
    if not found:
        counts = [sum(map(names_image, column)) for column in columns]
        found = [counts.index(max(counts))] if max(counts) else [0] if len(columns) == 2 else []
    if len(found) != 1:
        what = "several columns name" if found else "no column names"
        raise UserError(f"{path}: {what} images; give the file a header line with path and identity")
    return found[0]


def _identity_column(
    path: AnyPath,
    columns: Sequence[Sequence[str]],
    candidates: list[int],
    mend: str,
    header: Sequence[str] | None = None,
) -> int:
    """Return which of the candidate columns is the identity.

    Columns that divide the images alike mean the same; the first is taken.

    Raises:
        UserError: two columns divide the images differently.
    """
    varied = [i for i in candidates if len(set(columns[i])) > 1] or candidates
    repeated = [i for i in varied if len(set(columns[i])) < len(columns[i])] or varied
    first, *others = repeated
    for other in others:
        if len(set(zip(columns[first], columns[other], strict=True))) != len(set(columns[first])) or len(
            set(columns[first])
        ) != len(set(columns[other])):
            names = [header[i] if header else str(i + 1) for i in (first, other)]
            raise UserError(f"{path}: the identity may be column {names[0]} or {names[1]}; {mend}")
    return first


def _pairs(table: Table, paths: Sequence[str], identities: Sequence[str]) -> list[tuple[str, str]]:
    """Return the path and the identity of each row; 3.000 becomes 3."""
    for number, (name, identity) in enumerate(zip(paths, identities, strict=True)):
        if not name or not identity:
            raise table.bad_line(number, "expected a path and an identity")
    if all(WHOLE_NUMBER.fullmatch(identity) for identity in identities):
        identities = [identity.partition(".")[0] for identity in identities]
    return list(zip(paths, identities, strict=True))
