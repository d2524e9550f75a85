"""Lists the images of zip and tar archives, each a tree of identity folders or a WebDataset."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fr_core.data.archives import tar_members, zip_members
from fr_core.data.folders import LOOSE, images_of, is_split, most_of, owners_of
from fr_core.data.listing import Listing, make_listing
from fr_core.data.store import AnyPath, local_copy
from fr_core.data.webdataset import labels_beside, refuse_other_labels
from fr_core.errors import UserError

REPLACED = "files that a later one of the same name replaces"


@dataclass
class _Archive:
    """The images of one archive."""

    names: list[str]  # of the images
    places: list[tuple[int, int]]  # start and length of each
    owners: list[str | None]  # identity of each, None if nothing names it
    passed: Counter[str]  # reason → other files
    notes: list[str] = field(default_factory=list)


def list_archives(
    root: AnyPath, archives: Sequence[AnyPath], level: int | None = None, names_in: str | None = None
) -> Listing:
    """List the images in archives, all zip or all tar, each a tree of identity folders.

    Folders count as in a folder of photos. In archives without folders, each archive is an identity. In a WebDataset
    tar, files beside the images name the identities (:mod:`fr_core.data.webdataset`). Archives may share identities, by
    name.

    Raises:
        UserError: an image lacks its label while others have one, or folders and labels contradict each other. Also
            if the archives may be shards or people, and as :func:`fr_core.data.sources.list_folder`.
    """
    found, nameless = [], []
    zipped = archives[0].suffix.lower() == ".zip"
    for path in archives:
        with local_copy(path) as file:
            archive = _read(path, file, zipped, len(archives) == 1, level, names_in)
        if archive.names and not any(archive.owners) and level is None:
            nameless.append(path.stem)
            archive.owners = [path.stem] * len(archive.names)
        found.append(archive)
    passed = sum((archive.passed for archive in found), Counter())
    _refuse_nameless(root, nameless, passed, zipped, len(archives) == 1)
    owners = [owner for archive in found for owner in archive.owners]
    if loose := owners.count(None):
        passed[LOOSE] = loose
    kept = [i for i, owner in enumerate(owners) if owner]
    if not kept:
        seen = f", but {most_of(passed)}" if passed else ""
        wanted = (
            f"folders {level} deep, or a lower --level" if level else "PERSON/photo.jpg; archives inside are not read"
        )
        raise UserError(f"{root}: holds no images of people{seen}: expected {wanted}")
    prefixes = [f"{path.name}/" if len(archives) > 1 else "" for path in archives]
    paths = [prefix + name for prefix, archive in zip(prefixes, found, strict=True) for name in archive.names]
    places = [(number, *place) for number, archive in enumerate(found) for place in archive.places]
    return make_listing(
        root,
        "zip" if zipped else "plain",
        [str(path.resolve()) for path in archives],
        [paths[i] for i in kept],
        [str(owners[i]) for i in kept],
        [places[i] for i in kept],
        passed=passed,
        notes=found[0].notes if len(found) == 1 else [],
    )


def _read(path: AnyPath, file: Path, zipped: bool, alone: bool, level: int | None, names_in: str | None) -> _Archive:
    """Read which images an archive holds, and whom they show.

    Args:
        path: the archive, for messages.
        file: a local copy of it.
        alone: there is no other archive, so images in one folder are not those of one person.
        level, names_in: as :func:`fr_core.data.sources.list_source` takes them.
    """
    stored = sorted(zip_members(file, names_in) if zipped else tar_members(file), key=lambda member: member.name)
    members = list({member.name: member for member in stored}.values())
    found, passed = images_of([member.name for member in members])
    images = [members[i] for i in found]
    names = [member.name for member in images]
    owners, notes = owners_of(names, path, level)
    if not zipped:
        in_folders = all(owners) and (not alone or len(set(owners)) > 1)
        labels, used = labels_beside(file, members, images, in_folders)
        if labels is None and in_folders and level is None:
            refuse_other_labels(file, members, images, owners)
        owners = owners if labels is None else [*labels]
        passed -= images_of(sorted(used))[1]
    if len(stored) > len(members):
        passed[REPLACED] = len(stored) - len(members)
    return _Archive(names, [(member.start, member.length) for member in images], owners, passed, notes)


def _refuse_nameless(root: AnyPath, names: Sequence[str], passed: Counter[str], zipped: bool, alone: bool) -> None:
    """Refuse archives without folders and labels that are not one person each.

    Args:
        root: the source, for messages.
        names: those of the archives without folders and labels.
        passed: what else they hold.
        alone: there is one archive.

    Raises:
        UserError: there is one, or the names are those of shards or splits.
    """
    beside = f"; beside them are {most_of(passed)}, which name nobody" if passed else ""
    if names and alone:
        form = "PERSON/photo.jpg" if zipped else "PERSON/photo.jpg, or with the person in KEY.cls beside KEY.jpg"
        raise UserError(f"{root}: its images lie in no folders{beside}: pack them as {form}")
    if len(names) > 1 and (_running_numbers(names) or all(map(is_split, names))):
        raise UserError(
            f"{root}: {names[0]} and the others have neither folders nor labels{beside}: unpack each into a folder if "
            "it holds one person, or add KEY.cls files if they are shards"
        )


def _running_numbers(names: Sequence[str]) -> bool:
    """Return whether names end in numbers that run on by one, as shards have them."""
    numbers = [re.search(r"(\d+)$", name) for name in names]
    ends = sorted(int(number[1]) for number in numbers if number)
    starts = {name[: number.start()] for name, number in zip(names, numbers, strict=True) if number}
    return len(ends) == len(names) and len(starts) == 1 and ends == list(range(ends[0], ends[0] + len(ends)))
