"""The listed images of a source: names and positions, without pixels. All kinds of sources share this form.

:func:`read_image` reads an image's bytes from the source, in any process and in any order.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Literal, assert_never

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fr_core.data.archives import read_zip_member
from fr_core.data.folders import why_passed
from fr_core.data.photos import LONGEST, RejectedImage, read_file
from fr_core.data.recordio import image_of, read_record
from fr_core.data.resolve import is_below, resolve
from fr_core.data.store import AnyPath, LocalBytes, RemoteBytes, RemotePath, to_path
from fr_core.errors import UserError

Kind = Literal["files", "plain", "zip", "rec"]  # plain: uncompressed in a tar or a scratch file
UNLABELLED = "(unlabelled)"  # name of the only identity of an unlabelled set
COLUMNS = pa.schema(
    [
        ("path", pa.string()),  # name of the image in its source
        ("label", pa.int32()),
        ("file", pa.int32()),  # index into the listing's files
        ("start", pa.int64()),  # offset in that file
        ("length", pa.int64()),  # bytes
    ]
)


@dataclass(frozen=True)
class Listing:
    """The images of a source in a fixed order. An image's position in it is its sample id."""

    root: AnyPath
    kind: Kind
    names: list[str]  # identities, by label
    files: list[str]  # files that hold the images; for loose images, their folder
    images: pa.Table  # with COLUMNS
    lost: tuple[tuple[str, str], ...] = ()  # (name, reason) of images that the source names but does not hold
    passed: dict[str, int] = field(default_factory=dict)  # reason → files of the source that are no images of people
    notes: tuple[str, ...] = ()  # how the source was read, for the user

    @property
    def labels(self) -> np.ndarray:
        """Return the label of each image: int32 [images]."""
        return self.images["label"].to_numpy()

    @property
    def paths(self) -> list[str]:
        """Return the name of each image in its source."""
        return self.images["path"].to_pylist()


def is_image(name: str) -> bool:
    """Return whether a name has an image's suffix and is not hidden."""
    return why_passed(name) is None


def read_image(kind: Kind, file: str, path: str, start: int, length: int) -> bytes:
    """Read the bytes of one image of a listing.

    Raises:
        RejectedImage: the image is missing, truncated, damaged, encrypted or too large.
    """
    try:
        match kind:
            case "files":
                return read_file(to_path(file) / path)
            case "zip":
                return read_zip_member(_open_archive(file), start, length, LONGEST)
            case "rec":
                return image_of(read_record(_open_archive(file), start, LONGEST))
            case "plain":
                return _slice(_open_archive(file), start, length)
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
    lost: Sequence[tuple[str, str]] = (),
    passed: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
) -> Listing:
    """Make a listing: number the identities by name, and sort the images by identity but not within one.

    Args:
        root: the source.
        kind: how the files hold the images.
        files: files that hold the images; for loose images, the folder that ``paths`` are relative to.
        paths: name of each image.
        owners: identity of each image.
        places: for each image its file, start and length; None for loose images.
        lost: name of each image that the source names but does not hold, and the reason.
        passed: number of files that are passed over, by reason.
        notes: how the source was read, for the user.

    Raises:
        UserError: there is only one identity, or only one image per identity, or a name is not UTF-8, or two names
            look alike.
    """
    try:
        coded, named = pa.array(owners).dictionary_encode(), pa.array(paths, pa.string())
    except UnicodeEncodeError as error:
        raise UserError(f"{root}: the name {error.object!r} is not UTF-8; rename the file") from None
    order = pc.sort_indices(coded.dictionary).to_numpy()
    names = [str(name) for name in coded.dictionary.take(pa.array(order)).to_pylist()]
    labels = np.argsort(order)[coded.indices.to_numpy()]
    if len(names) == 1 and names != [UNLABELLED]:
        raise UserError(f"{root}: only one identity, {names[0]!r}; give the folder that holds one folder per person")
    if len(names) == len(paths) and names != [UNLABELLED]:
        raise UserError(f"{root}: one image per identity; training needs two or more images of a person")
    refuse_look_alikes(root, names)
    order = np.argsort(labels, kind="stable")
    where = np.zeros((len(paths), 3), np.int64) if places is None else np.asarray(places, np.int64)
    columns = [named.take(pa.array(order)), labels[order], *where[order].T]
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, COLUMNS, strict=True)], schema=COLUMNS)
    return Listing(root, kind, names, files, table, tuple(lost), dict(sorted((passed or {}).items())), tuple(notes))


def refuse_look_alikes(root: AnyPath, names: Sequence[str]) -> None:
    """Refuse names that differ in case alone, or in their Unicode form: macOS writes letter and accent apart.

    Raises:
        UserError: there are such names.
    """
    seen: dict[str, str] = {}
    for name in names:
        form = unicodedata.normalize("NFC", name)
        other = seen.setdefault(form.casefold(), name)
        if other != name:
            what = "Unicode form" if unicodedata.normalize("NFC", other) == form else "case"
            raise UserError(
                f"{root}: {other} and {name} differ in {what} alone; rename one, or put their images together"
            )


def list_rows(table: AnyPath, root: AnyPath, rows: Sequence[tuple[str, str]]) -> Listing:
    """List loose files that a table names with their identities.

    Args:
        table: the table, for error messages.
        root: folder that the images lie below; paths of another machine are found in it by their last folders.
        rows: (path, identity) of each image.

    Raises:
        UserError: there are no rows, a path leads out of ``root``, or an image has two identities; or as
            :func:`make_listing`.
    """
    if not rows:
        raise UserError(f"{table}: names no images; give a path and an identity for each")
    said: dict[str, str] = {}
    paths = [str(PurePosixPath(path)) for path, _ in rows]
    files = resolve(paths, root)
    for path, (_, identity) in zip(files, rows, strict=True):
        if not is_below(path):
            raise UserError(f"{table}: {path} leads out of {root}; give paths below this folder")
        if said.setdefault(path, identity) != identity:
            raise UserError(f"{table}: {path} is listed twice, as {said[path]} and as {identity}; remove one")
    passed = {"lines that repeat another": len(rows) - len(said)} if len(rows) > len(said) else None
    elsewhere = sum(path != file for path, file in zip(paths, files, strict=True))
    notes = [f"{elsewhere:,} paths of {table.name} were found by their ends below {root}"] if elsewhere else []
    place = [str(root.resolve())]
    return make_listing(root, "files", place, list(said), list(said.values()), passed=passed, notes=notes)


def _slice(data: LocalBytes | RemoteBytes, start: int, length: int) -> bytes:
    """Read a range of bytes."""
    if length > LONGEST:
        raise RejectedImage("too large")
    if start + length > len(data):
        raise RejectedImage("truncated archive")
    return bytes(data[start : start + length])


@lru_cache(maxsize=16)
def _open_archive(file: str) -> LocalBytes | RemoteBytes:
    """Open an archive's bytes, local or remote, to take slices of."""
    path = to_path(file)
    return RemoteBytes(path) if isinstance(path, RemotePath) else LocalBytes(path)
