"""Masks put on offline: copies of a folder of faces, and of verification sets (METHODS §5, §7)."""

import csv
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath

import cv2
import numpy as np

from fr_core import rng
from fr_core.config.sections import Masks
from fr_core.data.crops import TEMPLATE_SIZE, RejectedImage, encode, make_crop, read_file, read_rgb, square
from fr_core.data.landmarks import read_landmarks
from fr_core.data.masks import DRAWS, choose, masked
from fr_core.data.sources import list_unlabelled
from fr_core.errors import UserError
from fr_core.verify.pairs import Pairs, read_pairs
from fr_core.verify.report import contact_sheet

SETS = {  # name -> the folders that the two images of a pair are taken from
    "plain": ("standard", "standard"),
    "masked_plain": ("masked", "standard"),
    "masked_masked": ("masked", "masked"),
}
PART = 256  # images in flight
SHOWN = 32  # in masks.png


def mask(
    source: Path,
    out: Path,
    masks: Masks,
    landmarks: Path | None = None,
    pairs_file: Path | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """Writes a masked copy of every face below a folder, or of every face that a list of pairs names.

    Without pairs: ``out`` is as ``source``, the share ``masks.ratio`` masked; what is no crop of 112×112 is made
    one, as at ingest. With pairs, a suite for ``bigface verify --suite``: images in ``standard/`` and, all masked,
    in ``masked/``, and the pairs three times (:data:`SETS`). ``masks.csv`` beside the masked images tells tool and
    kind of each, ``rejects.csv`` what was left out, and ``masks.png`` shows some, each behind its original.

    Args:
        source: aligned crops; other photos need landmarks, by which they are aligned.
        landmarks: CSV of 5 or 68 points per image, as ``bigface ingest`` takes it; without it the template's are used.

    Returns:
        images, masked, rejected.

    Raises:
        UserError: no images, ``out`` is not empty or lies in ``source``, or landmarks that name none of the images.
    """
    pairs = read_pairs(pairs_file) if pairs_file else None
    if pairs and pairs.images:
        raise UserError(f"{pairs_file}: a .bin cannot be masked; give pairs of image files")
    paths = sorted(pairs.paths) if pairs else list_unlabelled(source).paths
    outside = [path for path in paths if PurePath(path).is_absolute() or ".." in PurePath(path).parts]
    if outside:
        raise UserError(f"{pairs_file}: {outside[0]} leads out of {source}; pairs to mask name images below it")
    points = read_landmarks(landmarks) if landmarks else {}
    own = {path: points.get(path, points.get(f"{source.name}/{path}")) for path in paths}
    if points and all(known is None for known in own.values()):
        raise UserError(f"{landmarks}: names none of the images, such as {paths[0]}")
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{out} lies in {source}; name another folder")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty")
    worn_in = out / "masked" if pairs else out
    ratio = 1.0 if pairs else masks.ratio
    rows: list[tuple[str, str, str]] = []
    rejects: list[tuple[str, str]] = []

    def one(path: str) -> tuple[str, str] | str:
        """Tool and kind of what was put on, or why the image was left out."""
        u = rng.generator(seed, f"mask {path}").random(1 + DRAWS)
        try:
            jpeg, face, odd = make_crop(read_file(source / path), TEMPLATE_SIZE, own[path])
        except (RejectedImage, OSError) as error:
            return str(error) if isinstance(error, RejectedImage) else "missing"
        if odd:
            return "no square crop"
        worn, plain = u[0] < ratio, read_rgb(jpeg)
        if pairs:
            write(out / "standard" / path, plain, jpeg)
        write(worn_in / path, masked(plain, face, u[1:], masks, seed) if worn else plain, None if worn else jpeg)
        return choose(u[1:], masks) if worn else ("", "")

    with ThreadPoolExecutor() as threads:
        for start in range(0, len(paths), PART):
            part = paths[start : start + PART]
            for path, done in zip(part, threads.map(one, part), strict=True):
                if isinstance(done, str):
                    rejects.append((path, done))
                else:
                    rows.append((path, *done))
            progress(min(start + PART, len(paths)), len(paths))
    if not rows:
        raise UserError(f"{source}: none of the {len(paths)} images can be used, first {rejects[0]}")
    shown = [path for path, tool, _ in rows if tool][:: max(1, len(rows) // SHOWN)][:SHOWN]
    if shown:
        both = [
            [square(read_rgb((root / path).read_bytes()), TEMPLATE_SIZE) for root in (source, worn_in)]
            for path in shown
        ]
        contact_sheet(np.concatenate(both), 8, "as they were, and masked").savefig(out / "masks.png")
    write_csv(worn_in / "masks.csv", ("path", "tool", "kind"), rows)
    write_csv(out / "rejects.csv", ("path", "reason"), rejects)
    if pairs:
        for name, folders in SETS.items():
            write_csv(out / f"{name}.csv", ("image_a", "image_b", "same", "fold"), rows_of(pairs, *folders))
    return {"images": len(paths), "masked": sum(tool != "" for _, tool, _ in rows), "rejected": len(rejects)}


def rows_of(pairs: Pairs, left: str, right: str) -> Iterable[tuple[str, str, int, int]]:
    """Pairs of which one image lies in the folder ``left`` and the other in ``right``."""
    for a, b, same, fold in zip(pairs.left, pairs.right, pairs.same, pairs.fold, strict=True):
        yield f"{left}/{pairs.paths[a]}", f"{right}/{pairs.paths[b]}", int(same), int(fold)


def write(path: Path, image: np.ndarray, jpeg: bytes | None) -> None:
    """Writes an image as its suffix says, from the JPEG that it was read from if there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".png":
        path.write_bytes(cv2.imencode(".png", image[..., ::-1])[1].tobytes())
    else:
        path.write_bytes(jpeg or encode(image))


def write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
