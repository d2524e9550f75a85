"""Which files of a source are images, and whom they show: by their folders (docs/data.md)."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from fr_core.data.photos import SUFFIXES
from fr_core.data.store import AnyPath, RemotePath
from fr_core.errors import UserError

SPLIT = re.compile(
    r"(train|training|val|valid|validation|dev|test|testing|eval|gallery|probe|query|holdout|seen|unseen|extra)"
    r"([-_ ]?(set|split|images|data|faces))?",
    re.IGNORECASE,
)
WITH_SPLIT = re.compile(r"(.*[^a-z])?(train|training|val|valid|validation|test|testing)([^a-z].*)?", re.IGNORECASE)
NUMBERED = re.compile(
    r"(fold|part|batch|shard|chunk|split|subset|set|train|val|valid|validation|dev|test)[-_ ]?\d+", re.IGNORECASE
)
SYSTEM = {  # folders that a computer or a program makes
    *("__macosx", "#recycle", "#snapshot", "$recycle.bin", "lost+found", "system volume information", "trash"),
    *("__pycache__", "node_modules", "thumbnails", "thumbs"),
}
HIDDEN = "files in hidden, @ and trash folders"
LOOSE = "photos in no person's folder"
SHOWN_SPLITS = 6  # named in a note, at most
GROUPS, IN_A_GROUP = 20, 20  # at most so many folders of at least so many folders may be groups of people


def why_passed(path: str) -> str | None:
    """Return why a file of a source is passed over, or None for an image."""
    parts = path.split("/")
    if any((part[:1] in (".", "@") and part not in (".", "..")) or part.casefold() in SYSTEM for part in parts):
        return HIDDEN
    suffix = PurePosixPath(path).suffix.lower()
    return None if suffix in SUFFIXES else f"{suffix} files" if suffix else "files without suffix"


def images_of(paths: Sequence[str]) -> tuple[list[int], Counter[str]]:
    """Return the positions of the images, and how many of the other files are passed over by reason."""
    reasons = [why_passed(path) for path in paths]
    images = [i for i, reason in enumerate(reasons) if reason is None]
    return images, Counter(reason for reason in reasons if reason is not None)


def most_of(passed: Mapping[str, int]) -> str:
    """Return the most frequent reasons for which files are passed over, and their numbers."""
    most = sorted(passed.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{reason} ({count:,})" for reason, count in most)


def find_files(root: AnyPath) -> Iterator[str]:
    """Yield the paths of all files below a folder, relative to it. Links are followed, except into a folder above.

    Raises:
        UserError: a folder is unreadable, so its images would be missing.
    """
    if isinstance(root, RemotePath):
        yield from (str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        return
    yield from _walk(root, "", ())


def _walk(folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Yield the files below a folder, with ``prefix`` before their paths.

    Args:
        above: device and inode of the folders that lead here.
    """
    try:
        status = folder.stat()
        here = status.st_dev, status.st_ino
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name) if here not in above else []
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror}; make the folder readable, or its images would be missing"
        ) from None
    for entry in entries:
        if _is_folder(entry):
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", (*above, here))
        else:
            yield f"{prefix}{entry.name}"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder; a link that leads to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def owners_of(paths: Sequence[str], source: object, level: int | None = None) -> tuple[list[str | None], list[str]]:
    """Return the identity of each image, and notes for the user.

    The identity is the first folder below the folders that all images share. Folders of splits, such as ``train`` and
    ``val``, are looked through: a name in both is one person. So are numbered ones, such as ``fold0`` and ``fold1``,
    if they hold folders alone.

    Args:
        paths: images relative to the source.
        source: the source, for messages.
        level: which folder is the person, counted from 1; None finds it.

    Returns:
        Identities, None for an image without such a folder; notes.

    Raises:
        UserError: the first folders may be people or groups of people.
    """
    folders = [[part for part in path.split("/")[:-1] if part not in ("", ".")] for path in paths]
    if level is not None:
        return [parts[level - 1] if len(parts) >= level else None for parts in folders], []
    shared = _around_people(folders)
    notes = [f"people are the folders of {'/'.join(shared)}"] if shared else []
    below = [parts[len(shared) :] for parts in folders]
    splits = 0
    while _are_splits([parts[splits:] for parts in below]):
        splits += 1
    level = len(shared) + splits + 1
    if splits:
        shared = _around_people([parts[splits:] for parts in below])
        notes.append(_note_of_splits(below, splits, splits + len(shared)))
        notes += [f"people are the folders of {'/'.join(shared)} in each"] if shared else []
        below = [parts[splits + len(shared) :] for parts in below]
        level += len(shared)
    else:
        _refuse_mixture(below, source, level)
    notes += _note_of_groups(below, source, level)
    return [parts[0] if parts else None for parts in below], notes


def is_split(name: str) -> bool:
    """Return whether a folder's name is that of a part of a set, such as ``train`` or ``fold0``."""
    return any(form.fullmatch(name) for form in (SPLIT, NUMBERED, WITH_SPLIT))


def _are_splits(folders: Sequence[Sequence[str]]) -> bool:
    """Return whether the first folders of all images are splits of one set, by their names and what they hold."""
    firsts = {parts[0] for parts in folders if parts}
    if not all(map(is_split, firsts)):
        return False
    with_photos = {parts[0] for parts in folders if len(parts) == 1}
    return any(len(parts) > 1 for parts in folders) and not any(map(NUMBERED.fullmatch, with_photos))


def _note_of_splits(folders: Sequence[Sequence[str]], depth: int, person: int) -> str:
    """Return a note that names the splits of a set, and tells how many names are in several of them.

    Args:
        folders: those that each image lies in.
        depth: how many of them are splits.
        person: how many of them lie around a person.
    """
    people: dict[str, set[str]] = {}
    for parts in folders:
        if len(parts) >= depth:
            people.setdefault("/".join(parts[:depth]), set()).update(parts[person : person + 1])
    counts = {split: f"{len(names):,} {'person' if len(names) == 1 else 'people'}" for split, names in people.items()}
    splits = [f"{split} ({count})" for split, count in sorted(counts.items())]
    if len(splits) > SHOWN_SPLITS:
        splits[SHOWN_SPLITS - 1 : -1] = ["…"]
    note = f"{', '.join(splits)} are splits of one set"
    several = sum(count > 1 for count in Counter(itertools.chain(*people.values())).values())
    if not several:
        return note
    return f"{note}; names in several are one person each: {several:,} (else ingest each alone, then bigface merge)"


def _around_people(folders: Sequence[Sequence[str]]) -> list[str]:
    """Return the folders around the people: those that all images share, but not a folder that holds all images."""
    deep = [list(parts) for parts in folders if parts] or [[]]
    shared = _common(min(deep), max(deep))
    return shared[:-1] if all(len(parts) <= len(shared) for parts in folders) else shared


def _refuse_mixture(folders: Sequence[Sequence[str]], source: object, level: int) -> None:
    """Refuse first folders of which some are splits of several folders, such as ``train``, and some are not.

    Args:
        folders, source, level: as :func:`_note_of_groups` takes them.

    Raises:
        UserError: there are such.
    """
    firsts = {parts[0] for parts in folders if parts}
    inside = Counter(first for first, _ in {(parts[0], parts[1]) for parts in folders if len(parts) > 1})
    splits = sorted(first for first, count in inside.items() if count > 1 and SPLIT.fullmatch(first))
    others = sorted(first for first in firsts if not is_split(first))
    if splits and others:
        raise UserError(
            f"{source}: {splits[0]} looks like a part of a set, {others[0]} does not: move one away, or give --level "
            f"{level} if both are people"
        )


def _common(first: Sequence[str], last: Sequence[str]) -> list[str]:
    """Return the folders that two paths share at their beginning."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return [folder for folder, _ in pairs]


def _note_of_groups(folders: Sequence[Sequence[str]], source: object, level: int) -> list[str]:
    """Return a note if first folders may be groups of people: a few, each of folders and without photos of its own.

    Args:
        folders: those that each image lies in.
        source: the source, for messages.
        level: which folder below the source the first is, counted from 1.

    Raises:
        UserError: they may well be, since each holds many folders.
    """
    inside: dict[str, set[str]] = {}
    for parts in folders:
        if len(parts) == 1:
            return []  # a photo lies in a first folder itself, so this is a person
        if parts:
            inside.setdefault(parts[0], set()).add(parts[1])
    fewest = min(map(len, inside.values()), default=0)
    if not 2 <= len(inside) <= GROUPS or fewest < 2:
        return []
    first, deeper = min(inside.items())
    if fewest < IN_A_GROUP:
        return [f"{first}, which holds {len(deeper)} folders, is a person; give --level {level + 1} if each of them is"]
    raise UserError(
        f"{source}: {first} holds {len(deeper):,} folders of photos: give --level {level} if {first} is a person, or "
        f"--level {level + 1} if each of them is"
    )
