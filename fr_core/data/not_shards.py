"""Says why a path is no dataset, and what to do about it."""

import itertools
from collections.abc import Iterable
from shlex import quote

from fr_core.data.embeddings import FACTS
from fr_core.data.listing import is_image
from fr_core.data.sources import PACKED
from fr_core.data.store import AnyPath

MANIFEST = "manifest.json"
FOLDERS = 20  # subfolders that are searched for photos, at most


def explain(root: AnyPath) -> str:
    """Return one line: what ``root`` is instead of a folder of shards, and the mend.

    Args:
        root: path without a manifest.
    """
    if root.is_file():
        return _explain_file(root)
    if not root.is_dir():
        return f"{root}: no such folder; correct the path, or make shards with: {_ingest('PHOTOS', root)}"
    if (root / "train" / MANIFEST).is_file():
        return f"{root} is no dataset, but {root / 'train'} is: give that path"
    names = {entry.name for entry in _entries(root)}
    if not names:
        return f"{root}: the folder is empty; correct the path, or make shards with: {_ingest('PHOTOS', root)}"
    if FACTS in names:
        return f"{root} holds embeddings: give the folder of the shards that they were made from"
    if any(name.startswith("shard-") for name in names):
        return f"{root}: no manifest.json beside the shards, so they are unfinished: run their bigface command again"
    photos = _photos(root)
    if photos is not None:
        return _explain_photos(root, photos)
    return f"{root}: no manifest.json; correct the path, or make shards with: {_ingest('PHOTOS', 'shards')}"


def _explain_file(path: AnyPath) -> str:
    """Return the line for a file in place of a folder."""
    if (path.parent / MANIFEST).is_file():
        return f"{path} is a file of a dataset: give its folder: {quote(str(path.parent))}"
    if _is_packed(path):
        return _explain_photos(path, path)
    return f"{path} is a file, but a dataset is a folder: give the folder that holds manifest.json"


def _explain_photos(root: AnyPath, photos: AnyPath) -> str:
    """Return the line for photos in place of shards."""
    return f"{root} holds photos, not shards: run {_ingest(photos, 'shards')} first, then give the folder shards"


def _photos(root: AnyPath) -> AnyPath | None:
    """Return the folder of photos to ingest: ``root``, or a folder in it whose folders hold images; None if none."""
    if _holds_images(root) or any(_is_packed(entry) for entry in _entries(root)):
        return root
    folders = _folders(root)
    if any(_holds_images(folder) for folder in folders):
        return root
    for folder in folders:
        if any(_holds_images(below) for below in _folders(folder)):
            return folder
    return None


def _holds_images(folder: AnyPath) -> bool:
    """Return whether most entries of a folder are images: a run's folder also holds a few plots."""
    entries = _entries(folder)
    return 2 * sum(is_image(entry.name) for entry in entries) > len(entries)


def _is_packed(path: AnyPath) -> bool:
    """Return whether a file is an archive, RecordIO or Parquet."""
    return not PACKED.isdisjoint(path.suffixes)


def _folders(folder: AnyPath) -> list[AnyPath]:
    """Return the first subfolders of a folder."""
    return list(itertools.islice((entry for entry in _entries(folder) if entry.is_dir()), FOLDERS))


def _entries(folder: AnyPath) -> list[AnyPath]:
    """Return the entries of a folder by name; an unreadable folder, such as ``lost+found``, counts as empty."""
    try:
        entries: Iterable[AnyPath] = folder.iterdir()
        return sorted(entries, key=str)
    except OSError:
        return []


def _ingest(photos: AnyPath | str, out: AnyPath | str) -> str:
    """Return the command that makes shards from photos."""
    return f"bigface ingest {quote(str(photos))} --out {quote(str(out))}"
