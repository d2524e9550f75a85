"""What people already have, listed: identity folders, archives of them, RecordIO, Parquet, lists of files."""

import csv
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from fr_core.data.archives import Member, tar_members, zip_members
from fr_core.data.listing import UNLABELLED, Listing, is_image, list_rows, make_listing
from fr_core.data.parquet import unpack_parquet
from fr_core.data.recordio import list_records
from fr_core.data.store import AnyPath, LocalBytes, RemotePath, find_paths, local_copy, to_path
from fr_core.errors import UserError

LISTS = {".txt", ".lst", ".list", ".csv", ".tsv"}
IDENTITY_COLUMNS = ("identity", "label", "name")  # of a CSV list
LONGEST_CLASS = 1000  # bytes of an identity's name


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
        inside = [entry for entry in find_paths(source, "*") if entry.is_file()]
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
    return make_listing(root, "files", [str(root.resolve())], paths, [path.partition("/")[0] for path in paths])


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
    return make_listing(place, "files", [str(place.resolve())], paths, [UNLABELLED] * len(paths))


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
        with local_copy(path) as file:
            found = sorted((zip_members if zipped else tar_members)(file), key=lambda member: member.name)
            members = [member for member in found if is_image(member.name)]
            classes = [member for member in found if member.name.endswith(".cls") and not zipped]
            owners += _classes(file, members, classes) if classes else _owners(members, path.stem)
        paths += [member.name if len(archives) == 1 else f"{path.name}/{member.name}" for member in members]
        places += [(number, member.start, member.length) for member in members]
    if not paths:
        raise UserError(f"{root}: no JPEG or PNG files in it")
    files = [str(path.resolve()) for path in archives]
    return make_listing(root, "zip" if zipped else "plain", files, paths, owners, places)


def list_rec(path: AnyPath) -> Listing:
    """Images of an MXNet RecordIO file; an identity is called by its label."""
    with local_copy(path) as file:
        records = list_records(file)
    places = np.zeros((len(records.keys_I), 3), np.int64)
    places[:, 1] = records.starts_I
    return make_listing(
        path, "rec", [str(path.resolve())], records.keys_I.astype(str).tolist(), records.labels_I, places
    )


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
    return make_listing(
        root, "plain", [str(file.resolve()) for file in unpacked], paths, owners, np.concatenate(places)
    )


def list_files(table: AnyPath, root: AnyPath) -> Listing:
    """Images that a list names with their identities: ``path identity`` a line, or CSV with a header.

    Args:
        root: what the paths are relative to; none may lead out of it.

    Raises:
        UserError: unreadable, a line without identity, a path out of ``root`` or twice.
    """
    rows: list[tuple[str, str]] = []
    try:
        with local_copy(table) as local, local.open(newline="") as file:
            for number, row in _rows_of(table, file):
                if len(row) != 2 or not all(row):
                    raise UserError(f"{table}: line {number}: expected a path and an identity")
                rows.append((row[0], row[1]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table}: {error}") from None
    return list_rows(table, root, rows)


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


def _rows_of(table: AnyPath, lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
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
