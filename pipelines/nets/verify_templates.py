"""Verification and identification of a net on templates: IJB-B and IJB-C.

A template is a set of photos and video frames of one person.

Legend: N images or faces, U distinct images, D embedding, T templates, Q probes, G gallery.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fr_core.data.crops import similarity, warped
from fr_core.data.photos import RejectedImage, read_file, read_rgb
from fr_core.errors import UserError
from fr_core.nets.open import Recogniser
from fr_core.verify.ijb import IMAGES, read_faces, read_search, read_template_pairs
from fr_core.verify.pairs import tars
from fr_core.verify.report import det_figure, far_name, roc_figure
from fr_core.verify.templates import Identification, identify, pair_cosines, pooled

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
PART = 256  # images in memory at once


@dataclass(frozen=True)
class TemplateResult:
    """Scores of a net on IJB-B or IJB-C."""

    tar_at_far: dict[float, float]  # templates pooled by media, weighted by the detector's scores
    tar_at_far_of_means: dict[float, float]  # the plain mean of a template's images
    search: dict[str, Identification]  # gallery -> 1:N scores, if the lists are there
    images: int
    pairs: int
    failed: dict[str, str]  # image -> why it could not be read
    skipped: int  # pairs with a template none of whose images could be read


def verify_templates(
    recogniser: Recogniser, root: Path, out: Path | None = None, progress: Callable[[int], None] | None = None
) -> TemplateResult:
    """Score a net by the protocols of IJB-B and IJB-C on a folder that :mod:`fr_core.verify.ijb` describes.

    Args:
        root: the folder.
        out: folder for the ROC and DET pictures.
        progress: called with the number of images after each batch.

    Raises:
        UserError: a list is missing or wrong, or no image can be read.
    """
    faces, (left, right, same), lists = read_faces(root), read_template_pairs(root), read_search(root)
    names, first_N, image_N = np.unique(faces.names_N, return_index=True, return_inverse=True)
    features_UD, failed = embed_loose(recogniser, root / IMAGES, names.tolist(), faces.points_N52[first_N], progress)
    usable_N = ~np.isin(names, list(failed))[image_N]
    if not usable_N.any():
        raise UserError(f"{root / IMAGES}: none of the {len(names)} images can be read")
    features_ND, template_N = features_UD[image_N[usable_N]], faces.templates_N[usable_N]
    numbers, pooled_TD = pooled(features_ND, template_N, faces.media_N[usable_N], faces.scores_N[usable_N])
    _, means_TD = pooled(features_ND, template_N)
    kept = np.isin(left, numbers) & np.isin(right, numbers)
    rows = np.searchsorted(numbers, left[kept]), np.searchsorted(numbers, right[kept])
    genuine = same[kept]
    if genuine.all() or not genuine.any():
        raise UserError(f"{root}: verification needs both same and different pairs of templates that can be read")
    if not np.isfinite(features_ND).all():
        raise UserError("the net's embeddings are not finite")
    scores, of_means = pair_cosines(pooled_TD, *rows), pair_cosines(means_TD, *rows)
    fars = [far for far in FARS if far * (~genuine).sum() >= 1]
    if out:
        out.mkdir(parents=True, exist_ok=True)
        curves = {"by media, weighted": (scores, genuine), "plain mean": (of_means, genuine)}
        roc_figure(curves).savefig(out / "roc.png")
        det_figure(curves).savefig(out / "det.png")
    searches: dict[str, Identification] = {}
    if lists:
        probes, people = lists.probes
        for name, (templates, owners) in lists.galleries.items():
            gallery_GD, probes_QD = (_rows(numbers, pooled_TD, wanted) for wanted in (templates, probes))
            searches[name] = identify(gallery_GD, owners, probes_QD, people)
    return TemplateResult(
        dict(zip(fars, tars(scores, genuine, fars).tolist(), strict=True)),
        dict(zip(fars, tars(of_means, genuine, fars).tolist(), strict=True)),
        searches,
        len(names),
        len(scores),
        failed,
        len(left) - len(scores),
    )


def embed_loose(
    recogniser: Recogniser,
    folder: Path,
    names: list[str],
    points_N52: np.ndarray,
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, dict[str, str]]:
    """Align loose crops by their five points and embed them, a part at a time.

    Args:
        points_N52: five points of each image, in its pixels.

    Returns:
        Embeddings float32 [N, D] with their lengths, zeros for unreadable images, and unreadable image -> reason.
    """
    features_ND = np.zeros((len(names), recogniser.net.embedding), np.float32)
    failed: dict[str, str] = {}
    size = recogniser.net.input_size
    for start in range(0, len(names), PART):
        crops, rows = [], []
        for i in range(start, min(start + PART, len(names))):
            try:
                image = read_rgb(read_file(folder / names[i]))
                crops.append(warped(image, similarity(points_N52[i], size), size))
                rows.append(i)
            except OSError:
                failed[names[i]] = "missing"
            except RejectedImage as error:
                failed[names[i]] = str(error)
        if crops:
            features_ND[rows] = recogniser.embed(np.stack(crops), progress=progress, normalise=False)
    return features_ND, failed


def template_figures(result: TemplateResult) -> dict[str, float]:
    """Return flat figures such as tar_at_far_1e-4, tar_of_means_at_far_1e-4 and gallery_g1_rank_1."""
    figures: dict[str, float] = {f"tar_at_far_{far_name(far)}": tar for far, tar in result.tar_at_far.items()}
    figures |= {f"tar_of_means_at_far_{far_name(far)}": tar for far, tar in result.tar_at_far_of_means.items()}
    for name, search in result.search.items():
        figures |= {f"{name}_rank_{rank}": share for rank, share in search.at_rank.items()}
        figures |= {f"{name}_tpir_at_fpir_{far_name(fpir)}": share for fpir, share in search.tpir_at_fpir.items()}
        figures |= {f"{name}_mated": search.mated, f"{name}_unmated": search.unmated}
    counts = {"images": result.images, "pairs": result.pairs, "missing_images": len(result.failed)}
    return figures | counts | {"skipped_pairs": result.skipped}


def _rows(numbers_T: np.ndarray, features_TD: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the features of templates; zeros for a template none of whose images could be read."""
    found = np.zeros((len(wanted), features_TD.shape[1]), np.float32)
    there = np.isin(wanted, numbers_T)
    found[there] = features_TD[np.searchsorted(numbers_T, wanted[there])]
    return found
