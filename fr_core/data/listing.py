"""The images of a source, listed: names and positions without pixels, whatever the source is.

An image's bytes are read from where they lie (:func:`read_image`), by any process and in any order.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Literal, assert_never

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fr_core.data.archives import read_zip_member
from fr_core.data.crops import LONGEST, RejectedImage, read_file
from fr_core.data.recordio import image_of, read_record
from fr_core.data.store import AnyPath, LocalBytes, RemoteBytes, RemotePath, to_path
from fr_core.errors import UserError

Kind = Literal["files", "plain", "zip", "rec"]  # plain: as they are, in a tar or beside one another
SUFFIXES = {".jpg", ".jpeg", ".png"}
UNLABELLED = "(unlabelled)"  # name of the only identity of such a set
COLUMNS = pa.schema(
    [
        ("path", pa.string()),  # what the image is called in its source
        ("label", pa.int32()),
        ("file", pa.int32()),  # which of the listing's files it lies in
        ("start", pa.int64()),  # bytes into that
        ("length", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Listing:
    """The images of a source in a fixed order; the position in it is an image's sample id."""

    root: AnyPath
    kind: Kind
    names: list[str]  # of the identities, by label
    files: list[str]  # that hold the images; of loose files, the folder they lie in
    images: pa.Table  # of COLUMNS

    @property
    def labels(self) -> np.ndarray:
        """int32 [images]."""
        return self.images["label"].to_numpy()

    @property
    def paths(self) -> list[str]:
        return self.images["path"].to_pylist()


def is_image(name: str) -> bool:
    """By its suffix; what macOS leaves beside images (``__MACOSX/``, ``._1.jpg``) is none."""
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith("._") and "__MACOSX" not in path.parts


def read_image(kind: Kind, file: str, path: str, start: int, length: int) -> bytes:
    """The bytes of one image of a listing.

    Raises:
        RejectedImage: missing, truncated, damaged, encrypted or too large.
    """
    try:
        match kind:
            case "files":
                return read_file(to_path(file) / path)
            case "zip":
                return read_zip_member(_opened(file), start, length, LONGEST)
            case "rec":
                return image_of(read_record(_opened(file), start, LONGEST))
            case "plain":
                return _slice(_opened(file), start, length)
            case _ as unknown:
                assert_never(unknown)
    except OSError as error:
        raise RejectedImage(error.strerror or "unreadable") from None
    except ValueError as error:
        raise RejectedImage(str(error)) from None


def make_listing(
    root: AnyPath,
    kind: Kind,
    files: list[str],
    paths: list[str],
    owners: Sequence[str] | np.ndarray,
    places: Sequence[tuple[int, int, int]] | np.ndarray | None = None,
) -> Listing:
    """Numbers the identities by name and sorts the images by them; within one, they keep their order.

    Raises:
        UserError: one identity, or one image per identity, only; a name that is no UTF-8.
    """
    try:
        coded, named = pa.array(owners).dictionary_encode(), pa.array(paths, pa.string())
    except UnicodeEncodeError as error:
        raise UserError(f"{root}: {error.object!r} is not called in UTF-8; rename it") from None
    order = pc.sort_indices(coded.dictionary).to_numpy()
    names = [str(name) for name in coded.dictionary.take(pa.array(order)).to_pylist()]
    labels = np.argsort(order)[coded.indices.to_numpy()]
    if len(names) == 1 and names != [UNLABELLED]:
        raise UserError(f"{root}: one identity only, {names[0]!r}; name what holds one folder per person")
    if len(names) == len(paths) and names != [UNLABELLED]:
        raise UserError(f"{root}: one image per identity; recognition is learned from two or more of a person")
    order = np.argsort(labels, kind="stable")
    where = np.zeros((len(paths), 3), np.int64) if places is None else np.asarray(places, np.int64)
    columns = [named.take(pa.array(order)), labels[order], *where[order].T]
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, COLUMNS, strict=True)], schema=COLUMNS)
    return Listing(root, kind, names, files, table)


def list_rows(table: AnyPath, root: AnyPath, rows: Sequence[tuple[str, str]]) -> Listing:
    """Loose files that a table names: paths and identities.

    Args:
        root: what the paths are relative to; none may lead out of it.

    Raises:
        UserError: no rows, a path out of ``root`` or twice, or as :func:`make_listing`.
    """
    for path, _ in rows:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise UserError(f"{table}: {path} leads out of {root}")
    paths, owners = [path for path, _ in rows], [owner for _, owner in rows]
    if not paths:
        raise UserError(f"{table}: no images")
    if len(set(paths)) < len(paths):
        raise UserError(f"{table}: {Counter(paths).most_common(1)[0][0]} is there twice")
    return make_listing(root, "files", [str(root.resolve())], paths, owners)


def _slice(data: LocalBytes | RemoteBytes, start: int, length: int) -> bytes:
    if length > LONGEST:
        raise RejectedImage("too large")
    if start + length > len(data):
        raise RejectedImage("truncated archive")
    return bytes(data[start : start + length])


@lru_cache(maxsize=16)
def _opened(file: str) -> LocalBytes | RemoteBytes:
    """The bytes of an archive, to take slices of."""
    path = to_path(file)
    return RemoteBytes(path) if isinstance(path, RemotePath) else LocalBytes(path)
