"""Landmark tables: five points for every image of a source."""

from collections.abc import Mapping, Sequence

import numpy as np

from fr_core.data.crops import FARTHEST, misfits
from fr_core.data.resolve import resolve
from fr_core.data.store import AnyPath, to_path
from fr_core.data.text_tables import PATH_COLUMNS, Table, read_table
from fr_core.errors import UserError

POINTS = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")
LANDMARK_COLUMNS = tuple(f"{point}_{axis}" for point in POINTS for axis in "xy")
DENSE_COLUMNS = tuple(f"{axis}_{point}" for point in range(68) for axis in "xy")
NUMBERED_COLUMNS = tuple(f"{axis}{point}" for point in range(1, 6) for axis in "xy")
MIRRORED = [1, 0, 2, 4, 3]  # the order of points whose left is the subject's
SHARES = 2  # a table without larger numbers has no pixels
FAR_OFF = 1e6  # pixels; no image is so large
ALIKE = 0.9  # share of the images on which another reading must be better to be taken


def read_landmarks(path: str | AnyPath) -> dict[str, np.ndarray]:
    """Read five points per image.

    A header names the columns ``path``, ``left_eye_x`` … ``mouth_right_y``, left as seen in the image. Or it names 68
    points in iBUG's order: ``x_0`` … ``x_67``, ``y_0`` … ``y_67``, which OpenFace writes. Without a header, a line is a
    path and ten numbers: x and y of each point in turn, or all x and then all y.

    Returns:
        path → float32 [5, 2], pixels of that image; NaN where the table has no number of pixels.

    Raises:
        UserError: the file is unreadable, a column is missing, a cell is no number, or an image occurs twice.
    """
    table = read_table(to_path(path), PATH_COLUMNS)
    first, columns = _columns_by_name(table, table.header) if table.header else _columns_by_place(table)
    points: dict[str, np.ndarray] = {}
    for number, row in enumerate(table.rows):
        try:
            values = np.array([float(row[column]) for column in columns])
            found = np.where(np.abs(values) < FAR_OFF, values, np.nan).astype(np.float32).reshape(-1, 2)
            earlier = points.setdefault(row[first], found)
        except (IndexError, ValueError):
            raise table.bad_line(number, f"not {len(columns)} numbers; correct the line") from None
        if not np.array_equal(earlier, found, equal_nan=True):
            raise table.bad_line(number, f"{row[first]} has other points in an earlier line; keep one face of an image")
    if len(columns) == len(DENSE_COLUMNS):
        return {name: five_points(dense) for name, dense in points.items()}
    return points if table.header else _by_point(points)


def _columns_by_name(table: Table, header: Sequence[str]) -> tuple[int, list[int]]:
    """Return the columns of the paths and of the numbers; names may lack underscores, and turn mouth and side round.

    Raises:
        UserError: a column is missing.
    """
    plain = [_plain(name) for name in header]
    several = (DENSE_COLUMNS, LANDMARK_COLUMNS, NUMBERED_COLUMNS)
    names = next((names for names in several if _plain(names[0]) in plain), LANDMARK_COLUMNS)
    first = table.column(PATH_COLUMNS)
    missing = [name for name in names if _plain(name) not in plain]
    if missing or first is None:
        lacks = missing[0] if missing else "path"
        raise UserError(f"{table.path}: no column {lacks}; it needs path and {names[0]} … {names[-1]}")
    return first, [plain.index(_plain(name)) for name in names]


def _columns_by_place(table: Table) -> tuple[int, list[int]]:
    """Return the first column and the last ten; lines before the first such line, as CelebA has them, are dropped.

    Raises:
        UserError: no line has a path and ten numbers.
    """
    data = (i for i, row in enumerate(table.rows) if len(row) in (11, 12) and all(map(_is_number, row[1:])))
    begin = next(data, None)
    if begin is None:
        raise UserError(f"{table.path}: expected a path and ten numbers on each line, or a header with the column path")
    del table.rows[:begin], table.lines[:begin]
    width = len(table.rows[0])
    return 0, list(range(width - 10, width))


def _plain(name: str) -> str:
    """Return a column's name without underscores, with the mouth before its side."""
    plain = name.replace("_", "").replace(" ", "")
    return plain.replace("leftmouth", "mouthleft").replace("rightmouth", "mouthright")


def _is_number(cell: str) -> bool:
    """Return whether a cell is a number."""
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _by_point(points: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return points whose ten numbers are x and y in turn, or all x before all y: what fits faces better."""
    stacked = np.stack(list(points.values()))
    apart = stacked.reshape(-1, 2, 5).swapaxes(1, 2)
    readings = [stacked, stacked[:, MIRRORED], apart, apart[:, MIRRORED]]
    known = ~np.isnan(stacked).any((1, 2))
    best = int(np.argmin([np.median(misfits(reading[known])) for reading in readings])) if known.any() else 0
    return dict(zip(points, apart, strict=True)) if best >= 2 else points


def five_points(points: np.ndarray) -> np.ndarray:
    """Reduce 68 points in iBUG's order to the template's five, the left of the image first: float32 [68, 2] → [5, 2].

    The order is that of Sagonas et al., "300 Faces in-the-Wild Challenge", 2013. An eye is the mean of its six points.
    """
    left_eye, right_eye, (nose, mouth_left, mouth_right) = points[36:42], points[42:48], points[[30, 48, 54]]
    return np.stack([left_eye.mean(0), right_eye.mean(0), nose, mouth_left, mouth_right])


def match_landmarks(paths: Sequence[str], table: Mapping[str, np.ndarray]) -> tuple[np.ndarray, list[str]]:
    """Look up the points of each image, and look at all of them before any image is cut.

    Paths in the table may be those of another machine, as in lists (:func:`fr_core.data.resolve.resolve`). If most
    points fit a face only with left and right exchanged, they are exchanged.

    Returns:
        float32 [images, 5, 2], NaN for images that are not in the table; notes for the user.

    Raises:
        UserError: the table names none of the images, its points are no pixels, or most of them fit no upright face.
    """
    named = dict(zip(resolve(list(table), known=paths), table.values(), strict=True))
    none = np.full((5, 2), np.nan, np.float32)
    points = np.stack([named.get(path, none) for path in paths])
    known = ~np.isnan(points).any((1, 2))
    if not known.any():
        raise UserError(f"the landmark table names none of the images, such as {paths[0]}: give paths as in the source")
    if np.abs(points[known]).max() <= SHARES:
        raise UserError(
            "the landmarks are shares of the images' sides: multiply them by width and height, to be pixels"
        )
    off, off_mirrored = misfits(points[known]), misfits(points[known][:, MIRRORED])
    down = points[known, 3:].mean(1) - points[known, :2].mean(1)  # from the eyes to the mouth
    upright = np.median(down[:, 1] - np.abs(down[:, 0])) > 0
    if upright and np.mean((off > FARTHEST) & (off_mirrored <= FARTHEST)) >= ALIKE:
        note = "left and right of the landmarks are the subject's: exchanged, so that they are the image's"
        return points[:, MIRRORED], [note]
    if not upright or np.mean(off > FARTHEST) >= ALIKE:
        raise UserError(
            f"the landmarks fit no upright face: give {', '.join(POINTS)}, left as seen in the image, in its pixels"
        )
    return points, []
