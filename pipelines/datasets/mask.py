"""Put synthetic masks on faces offline: on a folder of faces, or on a verification set (docs/verification.md)."""

import csv
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath

import cv2
import numpy as np

from fr_core import rng
from fr_core.config.sections import Masks
from fr_core.data.crops import TEMPLATE_SIZE, encode, make_crop, square
from fr_core.data.landmarks import match_landmarks, read_landmarks
from fr_core.data.masks import DRAWS, choose, masked
from fr_core.data.photos import RejectedImage, read_file, read_rgb
from fr_core.data.sources import list_unlabelled
from fr_core.errors import UserError
from fr_core.verify.pair_lists import read_pairs
from fr_core.verify.pairs import Pairs
from fr_core.verify.report import contact_sheet

PAIR_SETS = {  # name → folder of the first and of the second image of a pair
    "plain": ("standard", "standard"),
    "masked_plain": ("masked", "standard"),
    "masked_masked": ("masked", "masked"),
}
IMAGES_IN_FLIGHT = 256
MAX_SHOWN = 32  # images in masks.png


def mask(
    source: Path,
    out: Path,
    masks: Masks,
    landmarks: Path | None = None,
    pairs_file: Path | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """Write a masked copy of every face below a folder, or of every face in a list of pairs.

    - Without pairs, ``out`` mirrors ``source``, with a share ``masks.ratio`` of the faces masked. Images become crops
      of 112×112, as at ingest.
    - With pairs, ``out`` is a suite for ``bigface verify --suite``. ``standard/`` holds the faces, ``masked/`` the same
      faces, all masked. Each of :data:`PAIR_SETS` lists the pairs.
    - ``masks.csv`` beside the masked images names the tool and the kind of each mask.
    - ``rejects.csv`` lists the images left out. ``masks.png`` shows some originals, then the same faces masked.

    Args:
        source: aligned crops. Other photos need landmarks to align them by.
        landmarks: CSV of 5 or 68 points per image, as for ``bigface ingest``. Without it every face is taken to have
            the template's points.

    Returns:
        images, masked, rejected.

    Raises:
        UserError: no images, ``out`` not empty or below ``source``, or landmarks that name none of the images.
    """
    pairs = read_pairs(pairs_file) if pairs_file else None
    if pairs and pairs.images:
        raise UserError(f"{pairs_file}: a .bin cannot be masked: give a list of pairs of image files")
    paths = sorted(pairs.paths) if pairs else list_unlabelled(source).paths
    outside = [path for path in paths if PurePath(path).is_absolute() or ".." in PurePath(path).parts]
    if outside:
        raise UserError(f"{pairs_file}: {outside[0]} leads out of {source}: name images below that folder")
    points_by_path: dict[str, np.ndarray | None] = dict.fromkeys(paths)
    if landmarks:
        points, _ = match_landmarks(paths, read_landmarks(landmarks))
        points_by_path |= {path: five for path, five in zip(paths, points, strict=True) if not np.isnan(five).any()}
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{out} lies in {source}: name another folder")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: name another folder, or remove this one first")
    masked_folder = out / "masked" if pairs else out
    ratio = 1.0 if pairs else masks.ratio
    rows: list[tuple[str, str, str]] = []
    rejects: list[tuple[str, str]] = []

    def mask_image(path: str) -> tuple[str, str] | str:
        """Return the tool and the kind of the mask (empty: unmasked), or why the image was left out."""
        u = rng.generator(seed, f"mask {path}").random(1 + DRAWS)
        try:
            jpeg, face, cut, _ = make_crop(read_file(source / path), TEMPLATE_SIZE, points_by_path[path])
        except (RejectedImage, OSError) as error:
            return str(error) if isinstance(error, RejectedImage) else "missing"
        if cut:
            return "no square crop"
        plain = read_rgb(jpeg)
        if pairs:
            write_image(out / "standard" / path, plain, jpeg)
        if u[0] >= ratio:
            write_image(masked_folder / path, plain, jpeg)
            return "", ""
        write_image(masked_folder / path, masked(plain, face, u[1:], masks, seed), None)
        return choose(u[1:], masks)

    with ThreadPoolExecutor() as threads:
        for start in range(0, len(paths), IMAGES_IN_FLIGHT):
            part = paths[start : start + IMAGES_IN_FLIGHT]
            for path, done in zip(part, threads.map(mask_image, part), strict=True):
                if isinstance(done, str):
                    rejects.append((path, done))
                else:
                    rows.append((path, *done))
            progress(min(start + IMAGES_IN_FLIGHT, len(paths)), len(paths))
    if not rows:
        raise UserError(f"{source}: none of the {len(paths)} images can be used: {rejects[0][0]}: {rejects[0][1]}")
    shown = [path for path, tool, _ in rows if tool][:: max(1, len(rows) // MAX_SHOWN)][:MAX_SHOWN]
    if shown:
        before_and_after = [
            [square(read_rgb((root / path).read_bytes()), TEMPLATE_SIZE) for root in (source, masked_folder)]
            for path in shown
        ]
        contact_sheet(np.concatenate(before_and_after), 8, "originals, each followed by its masked copy").savefig(
            out / "masks.png"
        )
    write_csv(masked_folder / "masks.csv", ("path", "tool", "kind"), rows)
    write_csv(out / "rejects.csv", ("path", "reason"), rejects)
    if pairs:
        for name, folders in PAIR_SETS.items():
            write_csv(out / f"{name}.csv", ("image_a", "image_b", "same", "fold"), pair_rows(pairs, *folders))
    return {"images": len(paths), "masked": sum(tool != "" for _, tool, _ in rows), "rejected": len(rejects)}


def pair_rows(pairs: Pairs, left: str, right: str) -> Iterable[tuple[str, str, int, int]]:
    """Yield the pairs with their first image in the folder ``left`` and their second in ``right``."""
    for a, b, same, fold in zip(pairs.left, pairs.right, pairs.same, pairs.fold, strict=True):
        yield f"{left}/{pairs.paths[a]}", f"{right}/{pairs.paths[b]}", int(same), int(fold)


def write_image(path: Path, image: np.ndarray, jpeg: bytes | None) -> None:
    """Write an image in the format of its suffix.

    Args:
        image: uint8 [H, W, 3], RGB.
        jpeg: the JPEG that the image was decoded from, if unchanged; written as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".png":
        path.write_bytes(cv2.imencode(".png", image[..., ::-1])[1].tobytes())
    else:
        path.write_bytes(jpeg or encode(image))


def write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> None:
    """Write a header and rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
