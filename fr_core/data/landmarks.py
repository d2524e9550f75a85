"""Landmark tables: five points for every image of a source."""

import csv

import numpy as np

from fr_core.data.listing import Listing
from fr_core.data.store import AnyPath, local_copy, to_path
from fr_core.errors import UserError

LANDMARK_COLUMNS = tuple(
    f"{point}_{axis}" for point in ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right") for axis in ("x", "y")
)
DENSE_COLUMNS = tuple(f"{axis}_{point}" for point in range(68) for axis in "xy")


def read_landmarks(path: str | AnyPath) -> dict[str, np.ndarray]:
    """Read five points per image from a CSV with the columns ``path``, ``left_eye_x`` … ``mouth_right_y``.

    Also reads 68 points in iBUG's order, from the columns ``x_0`` … ``x_67``, ``y_0`` … ``y_67`` that OpenFace writes.

    Returns:
        path → float32 [5, 2], pixels of that image.

    Raises:
        UserError: the file is unreadable, a column is missing, or a cell is no number (names the line).
    """
    table: dict[str, np.ndarray] = {}
    try:
        with local_copy(to_path(path)) as local, local.open(newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)  # OpenFace writes ", "
            names = reader.fieldnames or ()
            columns = DENSE_COLUMNS if DENSE_COLUMNS[0] in names else LANDMARK_COLUMNS
            missing = {"path", *columns} - set(names)
            if missing:
                raise UserError(
                    f"{path}: no column {sorted(missing)[0]}; it needs path and {columns[0]} … {columns[-1]}"
                )
            for row in reader:
                points = np.array([float(row[column]) for column in columns], np.float32).reshape(-1, 2)
                table[row["path"]] = five_points(points) if len(points) == 68 else points
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError):
        raise UserError(f"{path}: line {reader.line_num}: not {len(columns)} numbers; correct the line") from None
    return table


def five_points(points: np.ndarray) -> np.ndarray:
    """Reduce 68 points in iBUG's order to the template's five, the left of the image first: float32 [68, 2] → [5, 2].

    The order is that of Sagonas et al., "300 Faces in-the-Wild Challenge", 2013. An eye is the mean of its six points.
    """
    left_eye, right_eye, (nose, mouth_left, mouth_right) = points[36:42], points[42:48], points[[30, 48, 54]]
    return np.stack([left_eye.mean(0), right_eye.mean(0), nose, mouth_left, mouth_right])


def match_landmarks(listing: Listing, table: dict[str, np.ndarray]) -> np.ndarray:
    """Look up the points of each listed image. Paths in the table may start with the source folder's name.

    Returns:
        float32 [images, 5, 2], NaN for images that are not in the table.

    Raises:
        UserError: the table names none of the images.
    """
    prefix, none = listing.root.name, np.full((5, 2), np.nan, np.float32)
    paths = listing.paths
    points = np.stack([table.get(path, table.get(f"{prefix}/{path}", none)) for path in paths])
    if np.isnan(points).all():
        raise UserError(f"the landmark table names none of the images, such as {paths[0]}: give paths as in the source")
    return points
