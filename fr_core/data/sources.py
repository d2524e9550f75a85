"""Lists the sources that people already have: folders, archives, RecordIO, TFRecord, LMDB, tables, lists of files."""

import csv
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from shlex import quote

import numpy as np

from fr_core.data.archives import Member, tar_members, zip_members
from fr_core.data.listing import UNLABELLED, Listing, is_image, list_rows, make_listing
from fr_core.data.lmdb_images import SUFFIXES as LMDBS
from fr_core.data.lmdb_images import find_lmdbs, list_lmdb
from fr_core.data.recordio import CUT_OFF, list_records
from fr_core.data.store import AnyPath, LocalBytes, RemotePath, find_paths, local_copy, to_path
from fr_core.data.tables import SUFFIXES as TABLES
from fr_core.data.tables import find_tables, list_tables
from fr_core.data.tfrecord import is_tface_list, is_tfrecord, list_tface, list_tfrecords
from fr_core.errors import UserError

LISTS = {".txt", ".lst", ".list", ".csv", ".tsv"}
IDENTITY_COLUMNS = ("identity", "label", "name")  # columns of a CSV list that may name the identity
LONGEST_CLASS = 1000  # bytes read of a .cls file


def list_source(source: str | AnyPath, labels: str | AnyPath | None = None, scratch: Path | None = None) -> Listing:
    """List the images of a source of any known kind, local or at a URL.

    Args:
        source: a folder of identity folders, a ``.zip`` or ``.tar`` of them, a ``.rec``, a Parquet or Arrow file, an
            LMDB, or a TFRecord file. Also a folder that holds files of one of these kinds. Or a list of files with
            their identities: ``path identity`` on each line, a CSV with these columns, or TFace's list of records.
        labels: such a list, for a folder of loose images or of TFace's sets.
        scratch: folder for the unpacked images of Parquet and Arrow files; files unpacked before are used again.

    Raises:
        UserError: there is no readable source, no image, only one identity, or only one image per identity.
    """
    source = to_path(source)
    if labels is not None:
        table = to_path(labels)
        return list_tface(table, source) if is_tface_list(table) else list_files(table, source)
    if source.is_dir():
        inside = [entry for entry in find_paths(source, "*") if entry.is_file()]
        records = [entry for entry in inside if entry.suffix == ".rec"]
        zips, tars = ([entry for entry in inside if entry.suffix == suffix] for suffix in (".zip", ".tar"))
        compressed = [entry for entry in inside if ".tar" in entry.suffixes[:-1] or entry.suffix == ".tgz"]
        tfrecords = [entry for entry in inside if is_tfrecord(entry)]
        lmdbs, tables = find_lmdbs(source), find_tables(source)
        tables_here = [table for table in tables if table.parent == source]
        folders = [entry for entry in source.iterdir() if entry.is_dir() and entry.suffix not in LMDBS]
        kinds = [kind[0] for kind in (records, zips, tars, compressed, lmdbs, tfrecords, tables_here) if kind]
        if len(records) > 1 or len(lmdbs) > 1 or len(kinds) > 1 or (kinds and folders):
            beside = [path.name for path in (*records, *lmdbs, *kinds, *folders)][:3]
            names = ", ".join(dict.fromkeys(beside))
            raise UserError(f"{source}: holds several kinds of sources, {names}; give the path of one of them")
        if compressed:
            raise UserError(f"{compressed[0]}: decompress it first, since images do not compress further")
        if records:
            return list_rec(records[0])
        if zips or tars:
            return list_archives(source, zips or tars)
        if lmdbs:
            return list_lmdb(lmdbs[0])
        if tfrecords:
            return list_tfrecords(source, tfrecords)
        if tables:
            return list_tables(source, tables, scratch)
        return list_folder(source)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if source.suffix == ".rec":
        return list_rec(source)
    if source.suffix == ".zip" or ".tar" in source.suffixes or source.suffix == ".tgz":
        return list_archives(source, [source])
    if source.suffix in LMDBS:
        return list_lmdb(source)
    if is_tfrecord(source):
        return list_tfrecords(source, [source])
    if source.suffix in TABLES:
        return list_tables(source, [source], scratch)
    if source.suffix in LISTS and is_tface_list(source):
        return list_tface(source, source.parent)
    if source.suffix in LISTS:
        return list_files(source, source.parent)
    if source.suffix == ".bin":
        command = f"bigface verify NET --pairs {quote(str(source))}"
        raise UserError(f"{source}: a set of pairs for verification; verify a net with: {command}")
    lists = ", ".join(sorted(LISTS))
    raise UserError(
        f"{source}: unknown kind of source; give a folder, .zip, .tar, .rec, .parquet, .arrow, .lmdb, .tfrecord, "
        f"or a list ({lists})"
    )


def list_folder(root: str | AnyPath) -> Listing:
    """List the images in ``root/IDENTITY/…``, at any depth below; identities and images are sorted by name.

    Raises:
        UserError: the folder is missing, unreadable, without images or without identity folders, or has only one image
            per identity.
    """
    root = to_path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    if isinstance(root, RemotePath):  # one listing of all, not one per identity
        found = (path.relative_to(root) for path in root.rglob("*") if is_image(path.name) and path.is_file())
        paths = sorted(str(path) for path in found if len(path.parts) > 1)
    else:
        folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
        paths = [path for folder in folders for path in sorted(_images_below(folder, root))]
    if not paths:
        loose = any(is_image(p.name) for p in root.iterdir())
        hint = "the images lie loose: give each person a folder" if loose else "expected IDENTITY/*.jpg or *.png"
        raise UserError(f"{root}: no identity folders with images; {hint}")
    return make_listing(root, "files", [str(root.resolve())], paths, [path.partition("/")[0] for path in paths])


def _images_below(folder: Path, root: Path) -> Iterator[str]:
    """Yield the images at any depth below a folder, as paths relative to ``root``."""

    def refuse(error: OSError) -> None:
        """Raise on an unreadable folder, which os.walk would skip."""
        raise UserError(
            f"{error.filename}: {error.strerror}; make the folder readable, or its images would be missing"
        ) from None

    for below, _, names in os.walk(folder, onerror=refuse):
        yield from (str((Path(below) / name).relative_to(root)) for name in names if is_image(name))


def list_unlabelled(root: str | AnyPath) -> Listing:
    """List all images at any depth below a folder as one identity, for distillation, which needs no labels.

    Raises:
        UserError: the folder is missing, or has no images.
    """
    place = to_path(root)
    found = [path for path in place.rglob("*") if is_image(path.name) and path.is_file()] if place.is_dir() else []
    if not found:
        raise UserError(f"{root}: no images in it" if place.is_dir() else f"{root}: no such folder")
    paths = sorted("/".join(path.parts[len(place.parts) :]) for path in found)
    return make_listing(place, "files", [str(place.resolve())], paths, [UNLABELLED] * len(paths))


def list_archives(root: AnyPath, archives: Sequence[AnyPath]) -> Listing:
    """List the images in archives, all zip or all tar, each a tree of identity folders.

    The identity is the first folder below the folders that all images of an archive share. In an archive without
    folders, the archive itself is the identity. In a WebDataset tar, ``KEY.cls`` beside ``KEY.jpg`` names the identity.
    Archives may share identities, by name.

    Raises:
        UserError: an image lacks its ``.cls`` while others have one, or as :func:`list_folder`.
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
            owners += _by_cls(file, members, classes) if classes else _by_folder(members, path.stem)
        paths += [member.name if len(archives) == 1 else f"{path.name}/{member.name}" for member in members]
        places += [(number, member.start, member.length) for member in members]
    if not paths:
        raise UserError(f"{root}: holds no JPEG or PNG files")
    files = [str(path.resolve()) for path in archives]
    return make_listing(root, "zip" if zipped else "plain", files, paths, owners, places)


def list_rec(path: AnyPath) -> Listing:
    """List the images of an MXNet RecordIO file; an identity's name is its label."""
    with local_copy(path) as file:
        records = list_records(file)
    places = np.zeros((len(records.keys_I), 3), np.int64)
    places[:, 1] = records.starts_I
    names = records.keys_I.astype(str).tolist()
    lost = [(str(key), CUT_OFF) for key in records.lost_keys]
    return make_listing(path, "rec", [str(path.resolve())], names, records.labels_I, places, lost)


def list_files(table: AnyPath, root: AnyPath) -> Listing:
    """List the images that a file names with their identities: ``path identity`` on each line, or CSV with a header.

    Args:
        table: the list.
        root: folder that the paths are relative to; no path may lead out of it.

    Raises:
        UserError: the list is unreadable, a line has no identity, or a path leads out of ``root`` or comes twice.
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


def _by_folder(members: list[Member], archive: str) -> list[str]:
    """Return each member's identity: its first folder below the folders that surround all identities."""
    folders = [PurePosixPath(member.name).parts[:-1] for member in members]
    around = sorted({folder[:-1] for folder in folders})
    first, last = (around[0], around[-1]) if around else ((), ())
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    return [folder[shared] if len(folder) > shared else archive for folder in folders]


def _by_cls(path: Path, members: list[Member], classes: list[Member]) -> list[str]:
    """Return each member's identity: the text of the ``.cls`` file beside it in a WebDataset tar."""
    data = LocalBytes(path)
    said = {_webdataset_key(m.name): bytes(data[m.start : m.start + min(m.length, LONGEST_CLASS)]) for m in classes}
    try:
        return [said[_webdataset_key(member.name)].decode().strip() for member in members]
    except KeyError as error:
        raise UserError(
            f"{path}: {error.args[0]} has no .cls file beside its image; add it, or remove all .cls files"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: a .cls file is not UTF-8 text; write the identity's name into it") from None


def _webdataset_key(name: str) -> str:
    """Return WebDataset's key of a member: its name without the suffix."""
    return str(PurePosixPath(name).with_suffix(""))


def _rows_of(table: AnyPath, lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, [path, identity]) of a CSV, or of lines cut at their last tab, else at their last space."""
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
