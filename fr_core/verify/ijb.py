"""Reads the lists of IJB-B and IJB-C as they are usually distributed: ``meta/`` beside a folder of loose crops.

- ``ijbX_face_tid_mid.txt``: image, template, medium.
- ``ijbX_template_pair_label.txt``: template, template, same.
- ``ijbX_name_5pts_score.txt``: image, five landmarks in its pixels, the detector's score.
- For 1:N, CSV with TEMPLATE_ID, SUBJECT_ID and FILENAME: ``ijbX_1N_gallery_G1.csv``, ``…_G2.csv``,
  ``ijbX_1N_probe_mixed.csv``.

docs/verification.md explains the protocols.

Legend: N images, P pairs, T templates.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from fr_core.errors import UserError

IMAGES = "loose_crop"


@dataclass(frozen=True)
class Faces:
    """Images of the protocol; an image has a row for every template that it belongs to."""

    names_N: list[str]
    points_N52: np.ndarray  # float32, pixels of the loose crop
    scores_N: np.ndarray  # float32, the detector's
    templates_N: np.ndarray  # int64
    media_N: np.ndarray  # int64


@dataclass(frozen=True)
class Search:
    """Lists of the 1:N protocol: templates and the people that they show."""

    galleries: dict[str, tuple[np.ndarray, np.ndarray]]  # name -> templates, people
    probes: tuple[np.ndarray, np.ndarray]


def read_faces(root: Path) -> Faces:
    """Read the images, their templates and landmarks.

    Raises:
        UserError: A list is missing or unreadable, or lacks an image, which the message names.
    """
    rows = _table(root, "*_face_tid_mid.txt", ["name", "template", "medium"])
    points = _table(root, "*_name_5pts_score.txt", ["name", *(f"p{i}" for i in range(10)), "score"])
    place = pc.index_in(rows["name"], value_set=points["name"].combine_chunks())
    if place.null_count:
        absent = rows["name"].filter(place.is_null())[0]
        raise UserError(f"{root}: {absent} has no line in the list of points and scores: add one")
    of_rows = points.take(place)
    return Faces(
        rows["name"].to_pylist(),
        np.column_stack([of_rows[f"p{i}"].to_numpy() for i in range(10)]).astype(np.float32).reshape(-1, 5, 2),
        of_rows["score"].to_numpy().astype(np.float32),
        rows["template"].to_numpy().astype(np.int64),
        rows["medium"].to_numpy().astype(np.int64),
    )


def read_template_pairs(root: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read the pairs of templates (int64 [P] twice) and whether they show one person (bool [P]).

    Raises:
        UserError: The list is missing, unreadable or has a label other than 0 and 1.
    """
    rows = _table(root, "*_template_pair_label.txt", ["left", "right", "same"])
    left, right, same = (rows[name].to_numpy().astype(np.int64) for name in ("left", "right", "same"))
    if ((same != 0) & (same != 1)).any():
        raise UserError(f"{root}: the label of a template pair is neither 0 nor 1")
    return left, right, same == 1


def read_search(root: Path) -> Search | None:
    """Read the 1:N lists; None if there are none.

    Raises:
        UserError: A list is unreadable, or not one probe list and at least one gallery are there.
    """
    files = sorted(_meta(root).glob("*_1N_*.csv"))
    lists = {file.stem.partition("_1N_")[2].lower(): _people(file) for file in files}
    probes = [name for name in lists if name.startswith("probe")]
    galleries = {name: own for name, own in lists.items() if name.startswith("gallery")}
    if len(probes) != 1 or not galleries:
        if files:
            raise UserError(f"{_meta(root)}: 1:N needs one probe list and at least one gallery; found {sorted(lists)}")
        return None
    return Search(galleries, lists[probes[0]])


def _meta(root: Path) -> Path:
    """Return the folder of the lists."""
    return root / "meta" if (root / "meta").is_dir() else root


def _table(root: Path, pattern: str, columns: list[str]) -> pa.Table:
    """Read a list with columns separated by blanks; all columns but ``name`` are numbers."""
    files = sorted(_meta(root).glob(pattern))
    if len(files) != 1:
        raise UserError(f"{_meta(root)}: expected one file {pattern}, found {len(files)}")
    numbers = {name: pa.float64() for name in columns if name != "name"} | {"name": pa.string()}
    try:
        table = csv.read_csv(
            files[0],
            csv.ReadOptions(column_names=columns),
            csv.ParseOptions(delimiter=" "),
            csv.ConvertOptions(column_types=numbers, strings_can_be_null=False),
        )
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{files[0]}: {str(error).splitlines()[0]}") from None
    for name in columns:
        if table[name].null_count or (name != "name" and not np.isfinite(table[name].to_numpy()).all()):
            raise UserError(f"{files[0]}: a line has no {name}, or one that is not a number")
    return table


def _people(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a 1:N list: its templates, each once, and the people that they show."""
    try:
        table = csv.read_csv(file, convert_options=csv.ConvertOptions(include_columns=["TEMPLATE_ID", "SUBJECT_ID"]))
        if any(column.null_count for column in table.columns):
            raise ValueError("a line has no template or no subject")
        rows = np.unique(np.column_stack([table[c].to_numpy().astype(np.int64) for c in table.column_names]), axis=0)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{file}: {str(error).splitlines()[0]}") from None
    if len(np.unique(rows[:, 0])) < len(rows):
        raise UserError(f"{file}: a template of two people: give it one subject")
    return rows[:, 0], rows[:, 1]
