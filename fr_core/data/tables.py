"""Lists the images of tables that other programs wrote: Parquet, and Hugging Face's ``save_to_disk``.

A table has a column of images and one of identities. The images are unpacked once (:mod:`fr_core.data.arrow`), or, if
the table only names them, read where they lie.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from fr_core.data.arrow import NOTE, unpack_table
from fr_core.data.listing import Listing, is_image, make_listing
from fr_core.data.store import AnyPath, find_paths
from fr_core.errors import UserError

SUFFIXES = {".parquet", ".arrow"}
FOLDERS = 32  # in the folder of an export, at most: a folder of more folders holds people


def find_tables(folder: AnyPath, depth: int = 2) -> list[AnyPath]:
    """Return the tables of an export, those of all its splits.

    They lie in the folder, in folders below it, or where the export's ``dataset_dict.json`` and ``state.json`` say.

    Raises:
        UserError: the tables are the shards of a dataset, or one of these two files is damaged.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = [folder / name for name in _names_in(folder / "dataset_dict.json", "splits")]
        found = [find_tables(split, depth=0) for split in splits]
        if missing := [split for split, tables in zip(splits, found, strict=True) if not tables]:
            raise UserError(
                f"{missing[0]}: no tables in it, but {folder / 'dataset_dict.json'} names it: copy it again"
            )
        return [table for tables in found for table in tables]
    if (folder / "state.json").is_file():
        if _names_in(folder / "state.json", "_indices_data_files"):
            raise UserError(f"{folder}: some of its rows are left out: save dataset.flatten_indices() instead")
        return [folder / name for name in _names_in(folder / "state.json", "_data_files")]
    entries = find_paths(folder, "*")
    tables = [path for path in entries if path.suffix.lower() in SUFFIXES and path.is_file()]
    if tables and (folder / "manifest.json").exists():
        raise UserError(f"{folder}: already a dataset; bigface merge copies it, bigface unpack turns it into images")
    if tables or not depth:
        return tables
    folders = [path for path in entries if not path.name.startswith(".") and path.is_dir()]
    if len(folders) > FOLDERS:
        return []
    return [table for below in folders for table in find_tables(below, depth - 1)]


def list_tables(root: AnyPath, files: Sequence[AnyPath], scratch: Path | None) -> Listing:
    """List the images in tables, after unpacking them to ``scratch``; files unpacked before are used again.

    Args:
        root: the source, a folder or a table. Images that a table only names lie beside the table or below the folder.
        files: the tables.
        scratch: folder for the images.

    Raises:
        UserError: a table is missing or unreadable, or has no column of images or identities, or there are no images.
    """
    if scratch is None:
        raise UserError(f"{root}: Parquet and Arrow are first unpacked beside the shards: give a local --out")
    scratch.mkdir(parents=True, exist_ok=True)
    paths: list[str] = []
    owners: list[str] = []
    places: list[tuple[int, int, int]] = []
    lost: list[tuple[str, str]] = []
    unpacked = [scratch / f"{number:05d}.images" for number in range(len(files))]
    numbers = {str(file.resolve()): number for number, file in enumerate(unpacked)}  # of the files with images
    folder = root if root.is_dir() else root.parent
    notes: dict[str, None] = {}  # each once
    for table, out in zip(files, unpacked, strict=True):
        index = unpack_table(table, out, folder)
        if note := index.schema.metadata[NOTE].decode():
            notes[note] = None
        for row in index.to_pylist():
            if row["lost"]:
                lost.append((row["path"], row["lost"]))
                continue
            paths.append(row["path"])
            owners.append(row["identity"])
            number = numbers.setdefault(row["file"] or str(out.resolve()), len(numbers))
            places.append((number, row["start"], row["length"]))
    if len(numbers) == len(files) and (other := _folder_of_images(root, files)):
        raise UserError(
            f"{root}: holds several kinds of sources, {files[0].name}, {other}; give the path of one of them"
        )
    if not paths:
        raise UserError(f"{root}: holds no images" + (f"; {lost[0][0]}: {lost[0][1]}" if lost else ""))
    return make_listing(root, "plain", list(numbers), paths, owners, places, lost, notes=list(notes))


def _names_in(path: AnyPath, key: str) -> list[str]:
    """Return the names of files or folders that a JSON file of Hugging Face's library lists."""
    try:
        told = json.loads(path.read_text()).get(key) or []
        names = [name["filename"] if isinstance(name, dict) else name for name in told]
        if not all(isinstance(name, str) and name not in ("", ".", "..") and "/" not in name for name in names):
            raise ValueError("a name with slashes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a file of Hugging Face's save_to_disk: {error}") from None
    return names


def _folder_of_images(root: AnyPath, tables: Sequence[AnyPath]) -> str | None:
    """Return the name of a folder beside those of the tables that holds images, if there is one."""
    if not root.is_dir() or any(table.parent == root for table in tables):
        return None
    folders = (folder for folder in find_paths(root, "*") if folder.is_dir())
    return next((folder.name for folder in folders if any(is_image(entry.name) for entry in folder.iterdir())), None)
