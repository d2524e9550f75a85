"""Find people of a verification set in a training set, by their names and by a good net. Deletes nothing.

Legend: N identities of the training set, P people of the verification set, D embedding.
"""

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from fr_core.data.schema import open_dataset
from fr_core.data.sources import list_folder
from fr_core.data.store import AnyPath, atomic_file
from fr_core.errors import UserError
from fr_core.nets.open import Recogniser, open_net
from fr_core.verify.identities import centres, nearest_centres
from fr_core.verify.pair_lists import read_pairs
from fr_core.verify.pairs import Pairs, read_crops
from pipelines.datasets.clean import Limits, identity_centres
from pipelines.datasets.embed import embed

SAME_PERSON = 0.6  # cosine of two centres from which they are one person; docs/experiments.md has the measurement
BLOCK = 1024  # crops in memory at a time
COLUMNS = ("sample_id", "identity", "person", "cosine", "by")


@dataclass(frozen=True)
class Images:
    """Images of a verification set, by person."""

    root: Path
    paths: list[str]
    people: list[str]  # of each image
    contents: list[bytes] | None = None  # encoded images, if a .bin holds them

    @property
    def named(self) -> bool:
        """Return whether people have names, and not just numbers."""
        return self.contents is None


def overlap(
    train: AnyPath,
    verify: Path,
    model: str,
    out: Path,
    net: str | None = None,
    images: Path | None = None,
    least: float = SAME_PERSON,
    on_ray: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
    trust_code: bool = False,
) -> Mapping[str, float]:
    """List the training images of people whom a verification set shows too.

    Two identities are one person if their names have the same letters, or if the cosine of their centres is at least
    ``least``.

    Args:
        train: shards of the training set.
        verify: a folder of people, or a list of pairs, or a ``.bin``.
        model, net, trust_code: arguments of :func:`fr_core.nets.open.open_net`.
        out: folder for ``overlap.csv`` and the embeddings. A second call reuses the embeddings.
        images: folder that the pairs' paths are relative to.
        least: cosine of two centres from which they are one person.

    Returns:
        people of the verification set, identities of the training set that are among them, by name and by face, and
        their images.

    Raises:
        UserError: see :func:`pipelines.datasets.embed.embed`; or the verification set cannot be read.
    """
    dataset = open_dataset(train)
    shown = images_of(verify, images)
    embeddings = embed(
        model,
        train,
        out / "embeddings",
        net,
        on_ray=on_ray,
        own_folder=True,
        progress=progress,
        trust_code=trust_code,
    )
    centres_ND = identity_centres(embeddings, dataset.manifest.identities)
    names_P, centres_PD = people_of(shown, open_net(model, net, trust_code=trust_code))
    who_N, cosine_N = nearest_people(centres_ND, centres_PD)
    by_face_N = cosine_N >= least
    names_N = dataset.identity_names()
    by_name_N = same_names(names_N, names_P if shown.named else [])
    found_N = by_face_N | (by_name_N >= 0)
    who_N = np.where(by_face_N, who_N, by_name_N)
    listed = 0
    with atomic_file(out / "overlap.csv") as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for labels_I, ids_I, _ in embeddings.by_identity():
            for i in np.flatnonzero(found_N[labels_I]):
                label = labels_I[i]
                by = " and ".join(["name"] * bool(by_name_N[label] >= 0) + ["face"] * bool(by_face_N[label]))
                writer.writerow((ids_I[i], names_N[label], names_P[who_N[label]], f"{cosine_N[label]:.4f}", by))
                listed += 1
    return {
        "people": len(names_P),
        "identities": int(found_N.sum()),
        "by_name": int((by_name_N >= 0).sum()),
        "by_face": int(by_face_N.sum()),
        "images": listed,
    }


def images_of(verify: Path, images: Path | None) -> Images:
    """Return the images of a verification set and whom they show.

    Raises:
        UserError: the set cannot be read.
    """
    if verify.is_dir():
        listing = list_folder(verify)
        names = np.array(listing.names)[listing.labels]
        return Images(Path(listing.files[0]), listing.paths, names.tolist())
    pairs = read_pairs(verify)
    if pairs.images:
        return Images(Path(), pairs.paths, people_of_pairs(pairs), pairs.images)
    if images is None or not images.is_dir():
        raise UserError(f"{images}: no such folder" if images else "the pairs need their images' folder: give --images")
    return Images(images, pairs.paths, people_of_pairs(pairs))


def people_of_pairs(pairs: Pairs) -> list[str]:
    """Return the person of each image: its folder, if folders agree with all pairs; else same pairs join images."""
    folders = [str(PurePath(path).parent) for path in pairs.paths]
    of_left, of_right = np.array(folders)[pairs.left], np.array(folders)[pairs.right]
    if np.array_equal(of_left == of_right, pairs.same):
        return [PurePath(folder).name for folder in folders]
    first = list(range(len(pairs.paths)))  # an earlier image of the same person, or itself

    def root(i: int) -> int:
        while first[i] != i:
            first[i] = i = first[first[i]]
        return i

    for a, b in zip(pairs.left[pairs.same].tolist(), pairs.right[pairs.same].tolist(), strict=True):
        first[root(b)] = root(a)
    return [pairs.paths[root(i)] for i in range(len(first))]


def people_of(images: Images, recogniser: Recogniser) -> tuple[list[str], np.ndarray]:
    """Return the names of the people of a verification set, and their centres, float32 [P, D].

    Raises:
        UserError: no image can be read.
    """
    order = np.argsort(np.array(images.people), kind="stable")
    rows, labels = [], []
    names, numbers = np.unique(np.array(images.people)[order], return_inverse=True)
    for start in range(0, len(order), BLOCK):
        part = order[start : start + BLOCK].tolist()
        contents = [images.contents[i] for i in part] if images.contents else None
        paths = [images.paths[i] for i in part]
        crops = read_crops(images.root, paths, recogniser.net.input_size, contents)
        usable = np.array([path not in crops.failed for path in paths])
        rows.append(recogniser.embed(crops.images[usable]))
        labels.append(numbers[start : start + BLOCK][usable])
    embeddings_ID, labels_I = np.concatenate(rows), np.concatenate(labels)
    if not len(labels_I):
        raise UserError(f"none of the {len(order)} images can be read, such as {images.paths[0]}: check their folder")
    centres_PD, _ = centres(embeddings_ID, labels_I, Limits.outlier)
    return names[np.unique(labels_I)].tolist(), centres_PD


def nearest_people(centres_ND: np.ndarray, centres_PD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each identity the nearest person, int64 [N], and the cosine of their centres, float32 [N]."""
    none_N = np.full(len(centres_ND), -1)
    who, cosines = zip(*nearest_centres(centres_ND, centres_PD, none_N), strict=True)
    return np.concatenate(who), np.where(centres_ND.any(1), np.concatenate(cosines), -1)


def same_names(names_N: list[str], names_P: list[str]) -> np.ndarray:
    """Return for each identity the person whose name has the same letters, or −1; numbers are no names."""
    by_letters = {letters_of(name): number for number, name in enumerate(names_P)}
    return np.array([by_letters.get(letters_of(name), -1) if is_name(name) else -1 for name in names_N])


def letters_of(name: str) -> str:
    """Return the letters of a name in lower case."""
    return "".join(filter(str.isalpha, name.casefold()))


def is_name(name: str) -> bool:
    """Return whether a name tells people apart in all sets: it has two words of letters, as ``Ann_Lee`` has."""
    words = "".join(letter if letter.isalpha() else " " for letter in name).split()
    return sum(len(word) > 1 for word in words) > 1
