"""Reads lists of pairs in the forms that the field writes (docs/verification.md).

- CSV with a header, columns in any order: ``image_a,image_b,same[,fold]`` and other names of these.
- LFW's ``pairs.txt``, with or without its first line: ``name i j`` and ``name i name j``. Also with commas.
- ``path path 0``, ``path path 1`` or ``path path -1`` on each line, or the flag first.
- ``.bin``, which holds the images.
"""

import re
from pathlib import Path, PurePosixPath

import numpy as np

from fr_core.data.photos import SUFFIXES
from fr_core.data.text_tables import Table, names_image, read_table
from fr_core.errors import UserError
from fr_core.verify.bins import read_bin
from fr_core.verify.pairs import FOLDS, Pairs

LEFT, RIGHT = (
    (side, *(stem + end for stem in ("image", "img", "path", "file") for end in ends))
    for side, ends in (("left", ("_a", "_1", "1")), ("right", ("_b", "_2", "2")))
)
SAME = ("same", "is_same", "issame", "label", "match", "is_match", "target", "genuine")
FOLD = ("fold", "fold_id", "split")
NAME = ("name", "name1", "name_1")  # begins the header of LFW's lists as CSV
MEANING = {
    **dict.fromkeys(("1", "1.0", "true", "t", "yes", "y", "same", "genuine", "positive", "pos", "match"), True),
    **dict.fromkeys(("0", "0.0", "-1", "-1.0", "false", "f", "no", "n", "different", "diff"), False),
    **dict.fromkeys(("impostor", "imposter", "negative", "neg", "mismatch", "nonmatch"), False),
}
NO_FOLD = -1
_SUFFIX = "|".join(re.escape(suffix) for suffix in sorted(SUFFIXES, key=len, reverse=True))
_TRIPLE = re.compile(rf"(.+?(?:{_SUFFIX}))\s+(.+?(?:{_SUFFIX}))\s+(\S+)", re.IGNORECASE)  # paths may hold blanks
_FLAG_FIRST = re.compile(rf"(\S+)\s+(.+?(?:{_SUFFIX}))\s+(.+?(?:{_SUFFIX}))", re.IGNORECASE)
_COUNT = re.compile(r"\d{1,9}")
_ONE = re.compile(r"(.+?)\s+(\d+)\s+(\d+)")
_TWO = re.compile(r"(.+?)\s+(\d+)\s+(.+?)\s+(\d+)")

Row = tuple[str, str, bool, int]  # two paths, whether they show one person, fold


def read_pairs(path: str | Path) -> Pairs:
    """Read a list of pairs; image i of a person in LFW's form is ``name/name_000i.jpg``.

    A list without folds gets ten: same pairs and different pairs are dealt out in turn. The folds of a ``.bin`` are ten
    neighbouring parts.

    Raises:
        UserError: The list is unreadable, has another format, or has a bad line, which the message names.
    """
    path = Path(path)
    if path.suffix == ".bin":
        contents, flags = read_bin(path)
        left = np.arange(len(flags)) * 2
        fold = np.arange(len(flags)) * FOLDS // len(flags)
        names = [f"{path.name}[{i}]" for i in range(len(contents))]
        return Pairs(names, left, left + 1, np.array(flags), fold, contents)
    if path.is_dir():
        mend = f"give {path / 'pairs.csv'}" if (path / "pairs.csv").is_file() else "give a file of pairs"
        raise UserError(f"{path} is a folder, not a list of pairs: {mend}")
    if not path.exists():
        raise UserError(f"{path}: no such list of pairs: correct the path")
    table = read_table(path, {*LEFT, *RIGHT})
    rows = _by_header(table) if table.header else _by_form(table)
    if not rows:
        raise UserError(f"{path}: no pairs: add lines below the first")
    index: dict[str, int] = {}
    left = np.array([index.setdefault(row[0], len(index)) for row in rows])
    right = np.array([index.setdefault(row[1], len(index)) for row in rows])
    same = np.array([row[2] for row in rows])
    fold = np.array([row[3] for row in rows])
    if (fold == NO_FOLD).all():
        for value in (False, True):
            fold[same == value] = np.arange((same == value).sum()) % FOLDS
    elif (fold < 0).any():
        raise table.bad_line(int(np.argmax(fold < 0)), "it has no fold, but others do: give it one, or drop the column")
    pairs = Pairs(list(index), left, right, same, fold)
    _refuse_turned_flags(path, pairs)
    return pairs


def _refuse_turned_flags(path: Path, pairs: Pairs) -> None:
    """Refuse flags that mean the opposite: all pairs in one folder are of two people, and all others of one.

    Raises:
        UserError: the flags are such.
    """
    folders = np.array([PurePosixPath(name.replace("\\", "/")).parent.name for name in pairs.paths])
    in_one = folders[pairs.left] == folders[pairs.right]
    if in_one.any() and not in_one.all() and np.array_equal(in_one, ~pairs.same):
        raise UserError(
            f"{path}: pairs in one folder are flagged as two people, all others as one: 1 must mean the same person"
        )


def _by_header(table: Table) -> list[Row]:
    """Read the rows of a list whose header names the columns."""
    columns = [table.column(names) for names in (LEFT, RIGHT, SAME)]
    if None in columns:
        lacks = ("image_a", "image_b", "same")[columns.index(None)]
        raise UserError(f"{table.path}: no column {lacks}; it needs image_a,image_b,same[,fold]")
    a, b, same = (column for column in columns if column is not None)
    fold = table.column(FOLD)
    rows = []
    for number, row in enumerate(table.rows):
        try:
            of_fold = int(float(row[fold])) if fold is not None and row[fold] else NO_FOLD
            rows.append((row[a], row[b], MEANING[row[same].lower()], of_fold))
            if not row[a] or not row[b] or of_fold < NO_FOLD:
                raise ValueError
        except (IndexError, KeyError, ValueError, OverflowError):
            raise table.bad_line(number, "expected image_a,image_b,same(0 or 1)[,fold]") from None
    return rows


def _by_form(table: Table) -> list[Row]:
    """Read the rows of a list without a header: paths and a flag, or names and numbers as LFW has them."""
    lines = [_without_empty_end(row) if table.delimiter else [" ".join(row)] for row in table.rows]
    if lines[1:] and lines[0][0].lower() in NAME and _names(lines[1]) is not None:
        lines = lines[1:]
    counts = _lfw_counts(lines[0]) if lines else []
    body = lines[1:] if counts else lines
    first = len(table.rows) - len(body)
    triples = [_triple(row) for row in body]
    if triples and triples[0] is not None:
        return [_flagged(table, number, triple) for number, triple in enumerate(triples, first)]
    if triples[1:] and triples[1] is not None:
        raise UserError(f"{table.path}: no column image_a; it needs image_a,image_b,same[,fold]")
    if not counts and body and _names(body[0]) is None:
        raise UserError(
            f"{table.path}: neither a CSV with columns image_a,image_b,same[,fold], LFW's pairs.txt, "
            "nor lines 'a.jpg b.jpg 1': give it a header line"
        )
    return _lfw_rows(table, body, counts)


def _without_empty_end(row: list[str]) -> list[str]:
    """Return a row without the empty cells at its end."""
    return row[: max((i for i, cell in enumerate(row, 1) if cell), default=1)]


def _triple(row: list[str]) -> tuple[str, ...] | None:
    """Return two paths and a flag, or None."""
    if len(row) == 1:
        if found := _TRIPLE.fullmatch(row[0]):
            return found.groups()
        if found := _FLAG_FIRST.fullmatch(row[0]):
            return found[2], found[3], found[1]
        words = row[0].split()  # paths without suffix
        return tuple(words) if len(words) == 3 and "/" in words[0] and "/" in words[1] else None
    if len(row) != 3 or (_COUNT.fullmatch(row[1]) and _COUNT.fullmatch(row[2])):
        return None
    flag_first = names_image(row[1]) and names_image(row[2])
    is_header = not any(map(names_image, row)) and row[2].lower() in SAME
    return None if is_header else (row[1], row[2], row[0]) if flag_first else tuple(row)


def _flagged(table: Table, number: int, triple: tuple[str, ...] | None) -> Row:
    """Return the row of a line 'path path flag'."""
    if triple is None or not triple[0] or not triple[1] or triple[2].lower() not in MEANING:
        raise table.bad_line(number, "expected 'path path 0', 'path path 1' or 'path path -1'")
    return triple[0], triple[1], MEANING[triple[2].lower()], NO_FOLD


def _lfw_counts(row: list[str]) -> list[int]:
    """Return the numbers of LFW's first line: folds and pairs of each kind in a fold, or the latter alone."""
    words = row[0].split() if len(row) == 1 else row
    return [int(word) for word in words] if len(words) in (1, 2) and all(map(_COUNT.fullmatch, words)) else []


def _names(row: list[str]) -> tuple[str, int, str, int] | None:
    """Return two names and the numbers of their images, or None."""
    if names_image(row[0]) or (len(row) == 1 and any(map(names_image, row[0].split()))):
        return None
    if len(row) == 1:
        one, two = _ONE.fullmatch(row[0]), _TWO.fullmatch(row[0])
        found = one or two
        row = list(found.groups()) if found else row
    if len(row) == 3 and _COUNT.fullmatch(row[1]) and _COUNT.fullmatch(row[2]):
        return row[0], int(row[1]), row[0], int(row[2])
    if len(row) == 4 and _COUNT.fullmatch(row[1]) and _COUNT.fullmatch(row[3]):
        return row[0], int(row[1]), row[2], int(row[3])
    return None


def _lfw_rows(table: Table, lines: list[list[str]], counts: list[int]) -> list[Row]:
    """Read the lines of LFW's form."""
    per_fold = counts[1] if len(counts) == 2 else None
    rows: list[Row] = []
    for number, line in enumerate(lines, len(table.rows) - len(lines)):
        names = _names(line)
        if names is None:
            raise table.bad_line(number, "expected 'name i j' or 'name i name j'")
        a, i, b, j = names
        fold = len(rows) // (2 * per_fold) if per_fold else NO_FOLD
        rows.append((f"{a}/{a}_{i:04d}.jpg", f"{b}/{b}_{j:04d}.jpg", a == b, fold))
    if per_fold and len(rows) != counts[0] * 2 * per_fold:
        raise UserError(
            f"{table.path}: {len(rows)} pairs, but its first line says {counts[0]} folds of {2 * per_fold}: "
            "get the whole file"
        )
    return rows
