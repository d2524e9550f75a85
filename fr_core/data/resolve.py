"""Finds the files that a list means although it writes their paths for another place, system or format."""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath

from fr_core.data.folders import find_files
from fr_core.data.store import AnyPath

PROBES = 100  # paths that are looked up first; if all exist, the folder is not searched


def resolve(paths: Sequence[str], root: AnyPath | None = None, known: Sequence[str] | None = None) -> list[str]:
    """Return the files that a list of paths means; a path that fits no file stays as it is.

    A path is taken as it is, then with slashes for backslashes, then without its first folders, which may be those of
    another machine. Last, its suffix may be another, then only its letters and digits count.

    Args:
        paths: the list.
        root: folder of the files.
        known: paths of the files; None: all files below ``root``.

    Raises:
        UserError: a folder below ``root`` is unreadable.
    """
    if known is None:
        assert root is not None
        probes = paths[:: max(1, len(paths) // PROBES)]
        if all(is_below(path) and (root / path).is_file() for path in probes):
            return list(paths)
        known = list(find_files(root))
    elif set(paths) <= set(known):
        return list(paths)
    steps = [(key, _index(known, key)) for key in (str, without_suffix, letters)]
    return [_find(path, steps) or path for path in paths]


def is_below(path: str) -> bool:
    """Return whether a relative path stays below its folder."""
    return not path.startswith("/") and ".." not in path.split("/") and "\0" not in path


def without_suffix(path: str) -> str:
    """Return a path without its suffix."""
    return str(PurePosixPath(path).with_suffix("")) if path else path


def letters(path: str) -> str:
    """Return the letters and digits of a path without its suffix, in lower case, folder by folder.

    An accent may stand apart from its letter, as macOS writes it.
    """
    parts = unicodedata.normalize("NFC", without_suffix(path)).casefold().split("/")
    return "/".join("".join(filter(str.isalnum, part)) for part in parts)


def _index(files: Iterable[str], key: Callable[[str], str]) -> dict[str, str | None]:
    """Map keys to files; a key of several files maps to None."""
    index: dict[str, str | None] = {}
    for file in files:
        name = key(file)
        index[name] = None if name in index else file
    return index


def _find(path: str, steps: Sequence[tuple[Callable[[str], str], dict[str, str | None]]]) -> str | None:
    """Return the file that a path means, or None."""
    forms = [path] if "\\" not in path else [path, path.replace("\\", "/")]
    for key, index in steps:
        for form in forms:
            parts = [part for part in form.split("/") if part not in ("", ".")]
            for first in range(len(parts)):
                if found := index.get(key("/".join(parts[first:]))):
                    return found
    return None
