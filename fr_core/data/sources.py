"""Lists the sources that people already have: folders, archives, RecordIO, TFRecord, LMDB, tables, lists of files."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from shlex import quote

import numpy as np

from fr_core.data.archive_images import list_archives
from fr_core.data.folders import LOOSE, find_files, images_of, most_of, owners_of, why_passed
from fr_core.data.labels import read_labels, read_record_labels
from fr_core.data.listing import UNLABELLED, Listing, list_rows, make_listing
from fr_core.data.lmdb_images import SUFFIXES as LMDBS
from fr_core.data.lmdb_images import find_lmdbs, list_lmdb
from fr_core.data.recordio import CUT_OFF, list_records
from fr_core.data.stand_ins import refuse_stand_ins
from fr_core.data.store import AnyPath, local_copy, to_path
from fr_core.data.tables import SUFFIXES as TABLES
from fr_core.data.tables import find_tables, list_tables
from fr_core.data.tfrecord import is_tface_list, is_tfrecord, list_tface, list_tfrecords
from fr_core.errors import UserError

LISTS = {".txt", ".lst", ".list", ".csv", ".tsv", ".jsonl"}
PACKED = {".rec", ".zip", ".tar", ".tgz", ".tfrecord", *LMDBS, *TABLES}
BESIDE_PACKED = "photos beside a file that packs others"
INDEXES = {".idx", ".index", ".mdb"}  # read beside a .rec and TFRecords; LMDB's lock
METADATA = ("metadata.csv", "metadata.jsonl")  # the list of an image folder of Hugging Face's datasets
NO_RECORD = "listed, but not in the file"
WRAPPERS = 3  # folders around the files of a source that are looked through


def list_source(
    source: str | AnyPath,
    labels: str | AnyPath | None = None,
    scratch: Path | None = None,
    level: int | None = None,
    names_in: str | None = None,
) -> Listing:
    """List the images of a source of any known kind, local or at a URL.

    Args:
        source: a folder of identity folders, a ``.zip`` or ``.tar`` of them, a ``.rec``, a Parquet or Arrow file, an
            LMDB, or a TFRecord file. Also a folder that holds files of one of these kinds. Or a list of files with
            their identities (:mod:`fr_core.data.labels`), or TFace's list of records.
        labels: such a list, for a folder of loose images or of TFace's sets; or a list of the records of a ``.rec``.
        scratch: folder for the unpacked images of Parquet and Arrow files; files unpacked before are used again.
        level: which folder below the source is the person, counted from 1; None finds it.
        names_in: encoding of the file names in zips that state none.

    Raises:
        UserError: there is no readable source, no image, only one identity, or only one image per identity.
    """
    source = to_path(source)
    refuse_stand_ins([source] if labels is None else [source, to_path(labels)])
    if labels is not None:
        return _list_labelled(source, to_path(labels))
    if source.is_dir():
        return _list_dir(source, scratch, level, names_in)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    suffix = source.suffix.lower()
    if suffix == ".rec":
        return list_rec(source)
    if suffix in (".zip", ".tgz") or ".tar" in source.name.lower():
        return list_archives(source, [source], level, names_in)
    if suffix in LMDBS:
        return list_lmdb(source)
    if is_tfrecord(source):
        return list_tfrecords(source, [source])
    if suffix in TABLES:
        return list_tables(source, [source], scratch)
    if suffix in LISTS:
        return list_tface(source, source.parent) if is_tface_list(source) else list_files(source, source.parent)
    if suffix == ".bin":
        command = f"bigface verify NET --pairs {quote(str(source))}"
        raise UserError(f"{source}: a set of pairs for verification; verify a net with: {command}")
    lists = ", ".join(sorted(LISTS))
    raise UserError(
        f"{source}: unknown kind of source; give a folder, .zip, .tar, .rec, .parquet, .arrow, .lmdb, .tfrecord, "
        f"or a list ({lists})"
    )


def _list_labelled(source: AnyPath, table: AnyPath) -> Listing:
    """List a source by a list: a folder of loose images or of TFace's sets, or a ``.rec`` or its folder.

    Raises:
        UserError: the list fits no such source; or as the readers of these sources.
    """
    if is_tface_list(table):
        return list_tface(table, source)
    records = [source] if source.suffix.lower() == ".rec" else []
    if source.is_dir():
        records = [path for path in source.iterdir() if path.suffix.lower() == ".rec"]
    if len(records) == 1:
        return list_rec(records[0], table)
    if not source.is_dir():
        packed = source.suffix.lower() in (".zip", ".tar")
        what = "leave --labels out" + (" if its folders are people, else unpack it first" if packed else "")
        raise UserError(f"{source}: {what if source.exists() else 'no such file or folder'}")
    return list_files(table, source)


def _list_dir(
    source: AnyPath, scratch: Path | None, level: int | None, names_in: str | None, depth: int = 0
) -> Listing:
    """List a folder: of identity folders, of files of one kind, or around such a folder."""
    visible = [entry for entry in source.iterdir() if why_passed(f"{entry.name}/x.jpg") is None]
    inside = sorted((entry for entry in visible if entry.is_file()), key=str)
    records = [entry for entry in inside if entry.suffix.lower() == ".rec"]
    zips, tars = ([entry for entry in inside if entry.suffix.lower() == suffix] for suffix in (".zip", ".tar"))
    compressed = [entry for entry in inside if re.search(r"\.tar\..|\.tgz$", entry.name, re.IGNORECASE)]
    tfrecords = [entry for entry in inside if is_tfrecord(entry)]
    lmdbs, tables = find_lmdbs(source), find_tables(source)
    tables_here = [table for table in tables if table.parent == source]
    folders = [entry for entry in visible if entry.is_dir() and entry.suffix.lower() not in LMDBS]
    kinds = [kind[0] for kind in (records, zips, tars, compressed, lmdbs, tfrecords, tables_here) if kind]
    if len(records) > 1 or len(lmdbs) > 1 or len(kinds) > 1 or (kinds and folders):
        beside = [path.name for path in (*records, *lmdbs, *kinds, *folders)][:3]
        names = ", ".join(dict.fromkeys(beside))
        mend = "give the path of one of them, or move the others"
        raise UserError(f"{source}: holds several kinds of sources, {names}; {mend}")
    refuse_stand_ins([*records, *zips, *tars, *compressed, *lmdbs, *tfrecords, *tables])
    if compressed:
        raise UserError(f"{compressed[0]}: decompress it first, since images do not compress further")
    if records:
        listing = list_rec(records[0])
    elif zips or tars:
        listing = list_archives(source, zips or tars, level, names_in)
    elif lmdbs:
        listing = list_lmdb(lmdbs[0])
    elif tfrecords:
        listing = list_tfrecords(source, tfrecords)
    elif tables:
        return list_tables(source, tables, scratch)
    elif len(folders) == 1 and depth < WRAPPERS and _holds_files(folders[0]):
        return _list_dir(folders[0], scratch, level, names_in, depth + 1)
    else:
        return list_folder(source, level)
    used = {*records, *zips, *tars, *lmdbs, *tfrecords}
    others = [entry.name for entry in inside if entry not in used and entry.suffix.lower() not in INDEXES]
    passed = Counter(listing.passed) + Counter(why_passed(name) or BESIDE_PACKED for name in others)
    return replace(listing, passed=dict(sorted(passed.items())))


def _holds_files(folder: AnyPath) -> bool:
    """Return whether a folder, or the only folder in it, holds archives, records or tables instead of images."""
    entries: list[AnyPath] = list(folder.iterdir())
    if any(PACKED & {suffix.lower() for suffix in entry.suffixes} for entry in entries):
        return True
    folders = [entry for entry in entries if entry.is_dir()]
    return len(folders) == 1 and _holds_files(folders[0])


def list_folder(root: str | AnyPath, level: int | None = None) -> Listing:
    """List the images in ``root/IDENTITY/…``, at any depth below; identities and images are sorted by name.

    Args:
        root: the folder.
        level: which folder below it is the person, counted from 1; None: :func:`fr_core.data.folders.owners_of`.

    Raises:
        UserError: the folder is missing, unreadable, without images or without identity folders, or has only one image
            per identity.
    """
    root = to_path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    files = sorted(find_files(root))
    found, passed = images_of(files)
    images = [files[i] for i in found]
    owners, notes = owners_of(images, root, level)
    paths = [path for path, owner in zip(images, owners, strict=True) if owner]
    if loose := len(images) - len(paths):
        passed[LOOSE] = loose
    if not paths:
        raise UserError(f"{root}: no identity folders with images; {_seen(passed, level)}")
    kept = [owner for owner in owners if owner]
    tables = [path for path in files if PurePosixPath(path).name in METADATA]
    if len(set(kept)) == 1 and tables:
        raise UserError(
            f"{root}: all images lie in one folder, {kept[0]}: give --labels {quote(str(root / tables[0]))}"
        )
    return make_listing(root, "files", [str(root.resolve())], paths, kept, passed=passed, notes=notes)


def _seen(passed: Mapping[str, int], level: int | None) -> str:
    """Return what a folder without images of people holds, and the mend."""
    if LOOSE in passed and level:
        return f"no photo lies {level} folders deep: give a lower --level"
    if LOOSE in passed:
        return "the images lie loose: give each person a folder, or a list by --labels"
    if not passed:
        return "it holds no files: expected IDENTITY/*.jpg"
    return f"it holds {most_of(passed)}: expected IDENTITY/*.jpg, archives, .rec or .parquet"


def list_unlabelled(root: str | AnyPath) -> Listing:
    """List all images at any depth below a folder as one identity, for distillation, which needs no labels.

    Raises:
        UserError: the folder is missing, or has no images.
    """
    place = to_path(root)
    files = sorted(find_files(place)) if place.is_dir() else []
    found, passed = images_of(files)
    if not found:
        raise UserError(f"{root}: no images in it" if place.is_dir() else f"{root}: no such folder")
    paths, owners = [files[i] for i in found], [UNLABELLED] * len(found)
    return make_listing(place, "files", [str(place.resolve())], paths, owners, passed=passed)


def list_rec(path: AnyPath, table: AnyPath | None = None) -> Listing:
    """List the images of an MXNet RecordIO file; an identity's name is its label, or stands in a list.

    Args:
        path: the file.
        table: list of the numbers of its records and their identities (:func:`read_record_labels`).

    Raises:
        UserError: a record is not in the list, all records have one label; or as :func:`read_record_labels`,
            :func:`fr_core.data.recordio.list_records` and :func:`fr_core.data.listing.make_listing`.
    """
    with local_copy(path) as file:
        records = list_records(file)
    places = np.zeros((len(records.keys_I), 3), np.int64)
    places[:, 1] = records.starts_I
    keys = records.keys_I.tolist()
    lost = [(str(key), CUT_OFF) for key in records.lost_keys]
    owners: np.ndarray | list[str] = records.labels_I
    if table is not None:
        said = read_record_labels(table)
        if absent := [key for key in keys if key not in said]:
            raise UserError(f"{table}: record {absent[0]} of {path.name} is not in it; give its list, and its .idx")
        owners = [said[key] for key in keys]
        known = {*keys, *records.lost_keys.tolist()}
        lost += [(str(key), NO_RECORD) for key in said if key not in known]
    elif len(set(records.labels_I.tolist())) == 1 and lost:
        raise UserError(f"{path}: cut off: {len(keys):,} of {len(keys) + len(lost):,} images are left; copy it again")
    elif len(set(records.labels_I.tolist())) == 1:
        mend = "give --labels LIST, with the number and the person of each record"
        raise UserError(f"{path}: all {len(keys):,} records have the label {records.labels_I[0]}: {mend}")
    return make_listing(path, "rec", [str(path.resolve())], list(map(str, keys)), owners, places, lost)


def list_files(table: AnyPath, root: AnyPath) -> Listing:
    """List the images that a file names with their identities (:mod:`fr_core.data.labels`).

    Args:
        table: the list.
        root: folder that the images lie below.

    Raises:
        UserError: as :func:`fr_core.data.labels.read_labels` and :func:`fr_core.data.listing.list_rows`.
    """
    return list_rows(table, root, read_labels(table))
