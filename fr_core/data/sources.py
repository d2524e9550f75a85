"""What people already have: identity folders, archives of them, RecordIO, lists of files; and landmark tables.

Listing a source reads names and positions, no pixels. An image's bytes are then read from where they lie
(:func:`read_image`), by any process and in any order.
"""

import csv
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fr_core.data.archives import Member, read_zip_member, tar_members, zip_members
from fr_core.data.crops import LONGEST, RejectedImage, read_file
from fr_core.data.parquet import unpack_parquet
from fr_core.data.recordio import image_of, list_records, read_record
from fr_core.data.store import AnyPath, LocalBytes, RemoteBytes, RemotePath, fetched, find, to_path
from fr_core.errors import UserError

Kind = Literal["files", "plain", "zip", "rec"]  # plain: as they are, in a tar or beside one another
SUFFIXES = {".jpg", ".jpeg", ".png"}
LISTS = {".txt", ".lst", ".list", ".csv", ".tsv"}
IDENTITY_COLUMNS = ("identity", "label", "name")  # of a CSV list
UNLABELLED = "(unlabelled)"  # name of the only identity of such a set
LONGEST_CLASS = 1000  # bytes of an identity's name
LANDMARK_COLUMNS = tuple(
    f"{point}_{axis}" for point in ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right") for axis in ("x", "y")
)
DENSE_COLUMNS = tuple(f"{axis}_{point}" for point in range(68) for axis in "xy")
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


def list_source(source: str | AnyPath, labels: str | AnyPath | None = None, scratch: Path | None = None) -> Listing:
    """The images of whatever ``source`` is.

    Args:
        source: a folder of identity folders; a ``.zip`` or ``.tar`` of them, or a folder of such archives; a ``.rec``
            or the folder around it; Parquet files or a folder of them; a list of files with their identities (``path
            identity`` a line, or CSV with these columns); local, or at a URL.
        labels: such a list for a folder whose images lie loose.
        scratch: folder that Parquet's images are unpacked to; what is there already is used.

    Raises:
        UserError: nothing there that can be read; no images; one identity, or one image per identity, only.
    """
    source = to_path(source)
    if labels is not None:
        return list_files(to_path(labels), source)
    if source.is_dir():
        inside = [entry for entry in find(source, "*") if entry.is_file()]
        records = [entry for entry in inside if entry.suffix == ".rec"]
        zips, tars = ([entry for entry in inside if entry.suffix == suffix] for suffix in (".zip", ".tar"))
        compressed = [entry for entry in inside if ".tar" in entry.suffixes[:-1] or entry.suffix == ".tgz"]
        parquets = [entry for entry in inside if entry.suffix == ".parquet"]
        if parquets and (source / "manifest.json").exists():
            raise UserError(f"{source}: a dataset already; bigface merge copies it, bigface unpack turns it to images")
        folders = [entry for entry in source.iterdir() if entry.is_dir()]
        kinds = [kind[0] for kind in (records, zips, tars, compressed, parquets) if kind]
        if len(records) > 1 or len(kinds) > 1 or (kinds and folders):
            beside = [path.name for path in (*records, *kinds, *folders)][:3]
            raise UserError(f"{source}: {', '.join(dict.fromkeys(beside))} beside each other; name one of them")
        if compressed:
            raise UserError(f"{compressed[0]}: decompress it first (images gain nothing by it)")
        if records:
            return list_rec(records[0])
        if zips or tars:
            return list_archives(source, zips or tars)
        if parquets:
            return list_parquet(source, parquets, scratch)
        return list_folder(source)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if source.suffix == ".rec":
        return list_rec(source)
    if source.suffix == ".zip" or ".tar" in source.suffixes or source.suffix == ".tgz":
        return list_archives(source, [source])
    if source.suffix == ".parquet":
        return list_parquet(source, [source], scratch)
    if source.suffix in LISTS:
        return list_files(source, source.parent)
    if source.suffix == ".bin":
        raise UserError(f"{source}: a set of pairs for verification: bigface verify NET --pairs {source}")
    lists = ", ".join(sorted(LISTS))
    raise UserError(f"{source}: no known kind of source: a folder, .zip, .tar, .rec, .parquet, or a list ({lists})")


def list_folder(root: str | AnyPath) -> Listing:
    """Images in ``root/IDENTITY/…``, any depth below; identities and images sorted by name.

    Raises:
        UserError: no such folder, one that cannot be read, no images, images without identity folders, or one image
            per identity only.
    """
    root = to_path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    if isinstance(root, RemotePath):  # one listing, not one for each identity
        found = (path.relative_to(root) for path in root.rglob("*") if is_image(path.name) and path.is_file())
        paths = sorted(str(path) for path in found if len(path.parts) > 1)
    else:
        folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
        paths = [path for folder in folders for path in sorted(_images_below(folder, root))]
    if not paths:
        loose = any(is_image(p.name) for p in root.iterdir())
        hint = "the images lie loose; give each person a folder" if loose else "expected IDENTITY/*.jpg or *.png"
        raise UserError(f"{root}: no identity folders with images in it: {hint}")
    return _listing(root, "files", [str(root.resolve())], paths, [path.partition("/")[0] for path in paths])


def _images_below(folder: Path, root: Path) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}; its images would be missing") from None

    for below, _, names in os.walk(folder, onerror=refuse):
        yield from (str((Path(below) / name).relative_to(root)) for name in names if is_image(name))


def list_unlabelled(root: str | AnyPath) -> Listing:
    """All images below a folder, at any depth, as one identity: for distillation, which looks at no labels.

    Raises:
        UserError: no such folder, or no images in it.
    """
    place = to_path(root)
    found = [path for path in place.rglob("*") if is_image(path.name) and path.is_file()] if place.is_dir() else []
    if not found:
        raise UserError(f"{root}: no images in it" if place.is_dir() else f"{root}: no such folder")
    paths = sorted("/".join(path.parts[len(place.parts) :]) for path in found)
    return _listing(place, "files", [str(place.resolve())], paths, [UNLABELLED] * len(paths))


def list_archives(root: AnyPath, archives: Sequence[AnyPath]) -> Listing:
    """Images in archives, all zip or all tar, each a tree of identity folders.

    The identity is the first folder below those that all images of an archive share, and in an archive without folders
    the archive itself. In WebDataset's tars it is what ``KEY.cls`` beside ``KEY.jpg`` says. Archives may share
    identities, by name.

    Raises:
        UserError: an image without ``.cls`` beside others with one, or as :func:`list_folder`.
    """
    zipped = archives[0].suffix == ".zip"
    paths: list[str] = []
    owners: list[str] = []
    places: list[tuple[int, int, int]] = []
    for number, path in enumerate(archives):
        with fetched(path) as file:
            found = sorted((zip_members if zipped else tar_members)(file), key=lambda member: member.name)
            members = [member for member in found if is_image(member.name)]
            classes = [member for member in found if member.name.endswith(".cls") and not zipped]
            owners += _classes(file, members, classes) if classes else _owners(members, path.stem)
        paths += [member.name if len(archives) == 1 else f"{path.name}/{member.name}" for member in members]
        places += [(number, member.start, member.length) for member in members]
    if not paths:
        raise UserError(f"{root}: no JPEG or PNG files in it")
    files = [str(path.resolve()) for path in archives]
    return _listing(root, "zip" if zipped else "plain", files, paths, owners, places)


def list_rec(path: AnyPath) -> Listing:
    """Images of an MXNet RecordIO file; an identity is called by its label."""
    with fetched(path) as file:
        records = list_records(file)
    places = np.zeros((len(records.keys_I), 3), np.int64)
    places[:, 1] = records.starts_I
    return _listing(path, "rec", [str(path.resolve())], records.keys_I.astype(str).tolist(), records.labels_I, places)


def list_parquet(root: AnyPath, files: Sequence[AnyPath], scratch: Path | None) -> Listing:
    """Images in Parquet files, unpacked to ``scratch`` (:mod:`fr_core.data.parquet`)."""
    if scratch is None:
        raise UserError(f"{root}: Parquet is unpacked beside the shards first, so they need a local --out")
    scratch.mkdir(parents=True, exist_ok=True)
    paths: list[str] = []
    owners: list[str] = []
    places: list[np.ndarray] = []
    unpacked = [scratch / f"{number:05d}.images" for number in range(len(files))]
    for number, (file, to) in enumerate(zip(files, unpacked, strict=True)):
        called, names, extents = unpack_parquet(file, to)
        paths += called
        owners += names
        places.append(np.column_stack([np.full(len(called), number), extents]))
    if not paths:
        raise UserError(f"{root}: no images in it")
    return _listing(root, "plain", [str(file.resolve()) for file in unpacked], paths, owners, np.concatenate(places))


def list_files(table: AnyPath, root: AnyPath) -> Listing:
    """Images that a list names with their identities: ``path identity`` a line, or CSV with a header.

    Args:
        root: what the paths are relative to; none may lead out of it.

    Raises:
        UserError: unreadable, a line without identity, a path out of ``root`` or twice.
    """
    rows: list[tuple[str, str]] = []
    try:
        with fetched(table) as local, local.open(newline="") as file:
            for number, row in _list_rows(table, file):
                if len(row) != 2 or not all(row):
                    raise UserError(f"{table}: line {number}: expected a path and an identity")
                rows.append((row[0], row[1]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table}: {error}") from None
    for path, _ in rows:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise UserError(f"{table}: {path} leads out of {root}")
    paths, owners = [path for path, _ in rows], [owner for _, owner in rows]
    if not paths:
        raise UserError(f"{table}: no images")
    if len(set(paths)) < len(paths):
        raise UserError(f"{table}: {Counter(paths).most_common(1)[0][0]} is there twice")
    return _listing(root, "files", [str(root.resolve())], paths, owners)


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
        if kind == "files":
            return read_file(to_path(file) / path)
        data = _opened(file)
        if kind == "zip":
            return read_zip_member(data, start, length, LONGEST)
        if kind == "rec":
            return image_of(read_record(data, start, LONGEST))
        if length > LONGEST:
            raise RejectedImage("too large")
        if start + length > len(data):
            raise RejectedImage("truncated archive")
        return bytes(data[start : start + length])
    except OSError as error:
        raise RejectedImage(error.strerror or "unreadable") from None
    except ValueError as error:
        raise RejectedImage(str(error)) from None


def read_landmarks(path: str | AnyPath) -> dict[str, np.ndarray]:
    """Five points of every image from a CSV with columns ``path``, ``left_eye_x`` … ``mouth_right_y``.

    Or 68 points in columns ``x_0`` … ``x_67``, ``y_0`` … ``y_67``, called as OpenFace calls them, in iBUG's order.

    Returns:
        path -> float32 [5, 2], pixels of that image.

    Raises:
        UserError: unreadable, a column missing, or a cell that is no number (names the line).
    """
    table: dict[str, np.ndarray] = {}
    try:
        with fetched(to_path(path)) as local, local.open(newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)  # OpenFace writes ", "
            names = reader.fieldnames or ()
            columns = DENSE_COLUMNS if DENSE_COLUMNS[0] in names else LANDMARK_COLUMNS
            missing = {"path", *columns} - set(names)
            if missing:
                raise UserError(f"{path}: no column {sorted(missing)[0]}")
            for row in reader:
                points = np.array([float(row[column]) for column in columns], np.float32).reshape(-1, 2)
                table[row["path"]] = five_points(points) if len(points) == 68 else points
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError):
        raise UserError(f"{path}: line {reader.line_num}: not {len(columns)} numbers") from None
    return table


def five_points(points: np.ndarray) -> np.ndarray:
    """The template's five points, the left of the image first, of 68 in iBUG's order: float32 [68, 2] -> [5, 2].

    Sagonas et al., "300 Faces in-the-Wild Challenge", 2013. An eye is the mean of the six points around it.
    """
    left_eye, right_eye, (nose, mouth_left, mouth_right) = points[36:42], points[42:48], points[[30, 48, 54]]
    return np.stack([left_eye.mean(0), right_eye.mean(0), nose, mouth_left, mouth_right])


def match_landmarks(listing: Listing, table: dict[str, np.ndarray]) -> np.ndarray:
    """The points of each listed image; paths in the table may or may not start with the source folder's name.

    Returns:
        float32 [images, 5, 2], NaN where the table has none.

    Raises:
        UserError: the table names none of the images.
    """
    prefix, none = listing.root.name, np.full((5, 2), np.nan, np.float32)
    paths = listing.paths
    points = np.stack([table.get(path, table.get(f"{prefix}/{path}", none)) for path in paths])
    if np.isnan(points).all():
        raise UserError(f"the landmark table names none of the images, such as {paths[0]}")
    return points


def _listing(
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


def _owners(members: list[Member], archive: str) -> list[str]:
    """The identity of each member: its first folder below those that the folders around all identities share."""
    folders = [PurePosixPath(member.name).parts[:-1] for member in members]
    around = sorted({folder[:-1] for folder in folders})
    first, last = (around[0], around[-1]) if around else ((), ())
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    return [folder[shared] if len(folder) > shared else archive for folder in folders]


def _classes(path: Path, members: list[Member], classes: list[Member]) -> list[str]:
    """What the ``.cls`` file beside each member of a WebDataset tar says."""
    data = LocalBytes(path)
    said = {_key(m.name): bytes(data[m.start : m.start + min(m.length, LONGEST_CLASS)]) for m in classes}
    try:
        return [said[_key(member.name)].decode().strip() for member in members]
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} has no .cls file beside its image") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: a .cls file is no text") from None


def _key(name: str) -> str:
    """WebDataset's: the name without its suffix."""
    return str(PurePosixPath(name).with_suffix(""))


def _list_rows(table: AnyPath, lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """(line number, [path, identity]) of CSV with a header, or of lines cut at their last tab or else space."""
    if table.suffix == ".csv":
        reader = csv.DictReader(lines)
        identity = next((name for name in IDENTITY_COLUMNS if name in (reader.fieldnames or ())), None)
        if identity is None or "path" not in (reader.fieldnames or ()):
            raise UserError(f"{table}: expected the columns path and {' or '.join(IDENTITY_COLUMNS)}")
        for row in reader:
            yield reader.line_num, [row["path"] or "", row[identity] or ""]
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, [part.strip() for part in (line.rsplit("\t", 1) if "\t" in line else line.rsplit(None, 1))]


@lru_cache(maxsize=16)
def _opened(file: str) -> LocalBytes | RemoteBytes:
    """The bytes of an archive, to take slices of."""
    path = to_path(file)
    return RemoteBytes(path) if isinstance(path, RemotePath) else LocalBytes(path)
