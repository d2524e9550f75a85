"""Readers of what people already have: identity folders and landmark tables."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fr_core.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png"}
LANDMARK_COLUMNS = tuple(
    f"{point}_{axis}" for point in ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right") for axis in ("x", "y")
)


@dataclass(frozen=True)
class Listing:
    """The images of a source in a fixed order; the position in it is an image's sample id."""

    root: Path
    names: list[str]  # of the identities, by label
    paths: list[str]  # relative to root
    labels: np.ndarray  # int32 [images]


def list_folder(root: str | Path) -> Listing:
    """Images in ``root/IDENTITY/…``, any depth below; identities and images sorted by name.

    Raises:
        UserError: no such folder, no images, images without identity folders, or one image per identity only.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    names: list[str] = []
    paths: list[str] = []
    labels: list[int] = []
    for folder in sorted(entry for entry in root.iterdir() if entry.is_dir()):
        files = sorted(str(p.relative_to(root)) for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if files:
            labels += [len(names)] * len(files)
            names.append(folder.name)
            paths += files
    if not paths:
        loose = any(p.suffix.lower() in SUFFIXES for p in root.iterdir())
        hint = "the images lie loose; give each person a folder" if loose else "expected IDENTITY/*.jpg or *.png"
        raise UserError(f"{root}: no identity folders with images in it: {hint}")
    if len(names) == 1:
        raise UserError(f"{root}: one identity only, {names[0]!r}; name the folder that holds one folder per person")
    if len(names) == len(paths):
        raise UserError(f"{root}: one image per identity; recognition is learned from two or more of a person")
    return Listing(root, names, paths, np.array(labels, np.int32))


def read_landmarks(path: str | Path) -> dict[str, np.ndarray]:
    """Five points of every image from a CSV with columns ``path``, ``left_eye_x`` … ``mouth_right_y``.

    Returns:
        path -> float32 [5, 2], pixels of that image.

    Raises:
        UserError: unreadable, a column missing, or a cell that is no number (names the line).
    """
    table: dict[str, np.ndarray] = {}
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            missing = {"path", *LANDMARK_COLUMNS} - set(reader.fieldnames or ())
            if missing:
                raise UserError(f"{path}: no column {sorted(missing)[0]}")
            for row in reader:
                points = [float(row[column]) for column in LANDMARK_COLUMNS]
                table[row["path"]] = np.array(points, np.float32).reshape(5, 2)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError):
        raise UserError(f"{path}: line {reader.line_num}: not ten numbers") from None
    return table


def match_landmarks(listing: Listing, table: dict[str, np.ndarray]) -> list[np.ndarray | None]:
    """The points of each listed image; paths in the table may or may not start with the source folder's name.

    Raises:
        UserError: the table names none of the images.
    """
    prefix = listing.root.name
    points = [table.get(path, table.get(f"{prefix}/{path}")) for path in listing.paths]
    if all(p is None for p in points):
        raise UserError(f"the landmark table names none of the images, such as {listing.paths[0]}")
    return points
