"""List the images of a dataset that carry a wrong label, show no face of their identity, or repeat. Deletes nothing.

Legend: I images, N identities, D embedding.
"""

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fr_core import rng
from fr_core.data.embeddings import Embeddings
from fr_core.data.schema import open_dataset
from fr_core.data.store import AnyPath, atomic_file
from fr_core.verify.identities import centres, copies, nearest_centres
from pipelines.datasets.embed import embed

COLUMNS = ("sample_id", "identity", "finding", "own", "other", "other_identity", "copy_of")
FINDINGS = ("flip", "outlier", "copy")
MAX_SHOWN = 200_000  # images in the picture


@dataclass(frozen=True)
class Limits:
    """Thresholds, as cosines. docs/experiments.md tells what the defaults find on real faces with a MobileFaceNet."""

    outlier: float = 0.2  # an image below this cosine to the rest of its identity is an outlier
    flip: float = 0.4  # an image at this cosine or more to another identity's centre can be a flip
    copy: float = 0.98  # an image at this cosine or more to an earlier image of its identity is a copy


def clean(
    shards: AnyPath,
    model: str,
    out: Path,
    net: str | None = None,
    limits: Limits | None = None,
    on_ray: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
    trust_code: bool = False,
) -> Mapping[str, float]:
    """List flipped labels, outliers and near-duplicates, judged by the embeddings of a good net.

    - A *flip* is nearer to another identity's centre than to the rest of its own identity, and near enough.
    - An *outlier* is far from the rest of its own identity, and no flip.
    - A *copy* looks the same as an earlier image of its identity, if that image is neither flip nor outlier.

    Args:
        model, net, trust_code: arguments of :func:`fr_core.nets.open.open_net`.
        out: folder for ``clean.csv``, ``clean.png`` and the embeddings. A second call reuses the embeddings.

    Returns:
        images, flips, outliers, copies.

    Raises:
        UserError: see :func:`pipelines.datasets.embed.embed`.
    """
    limits = limits or Limits()
    dataset = open_dataset(shards)
    embeddings = embed(
        model,
        shards,
        out / "embeddings",
        net,
        on_ray=on_ray,
        own_folder=True,
        progress=progress,
        trust_code=trust_code,
    )
    centres_ND = identity_centres(embeddings, dataset.manifest.identities, limits.outlier)
    names, random = dataset.identity_names(), rng.generator(0, "clean")
    counts = dict.fromkeys(FINDINGS, 0)
    shown_share = min(1.0, MAX_SHOWN / embeddings.facts.images)
    shown: list[np.ndarray] = []
    with atomic_file(out / "clean.csv") as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for labels_I, ids_I, embeddings_ID in embeddings.by_identity():
            _, own_I = centres(embeddings_ID, labels_I, limits.outlier)
            nearest = nearest_centres(embeddings_ID, centres_ND, labels_I)
            other_I, cosine_I = (np.concatenate(parts) for parts in zip(*nearest, strict=True))
            flip_I = (cosine_I >= limits.flip) & ~(own_I >= cosine_I)
            outlier_I = (own_I < limits.outlier) & ~flip_I
            earlier_I = copies(embeddings_ID, labels_I, limits.copy, ~(flip_I | outlier_I))
            shown.append(np.stack([own_I, cosine_I])[:, random.random(len(own_I)) < shown_share])
            for finding, is_finding_I in zip(FINDINGS, (flip_I, outlier_I, earlier_I >= 0), strict=True):
                counts[finding] += int(is_finding_I.sum())
                for i in np.flatnonzero(is_finding_I):
                    cosines = f"{own_I[i]:.4f}", f"{cosine_I[i]:.4f}"
                    other = names[other_I[i]] if other_I[i] >= 0 else ""
                    original = ids_I[earlier_I[i]] if finding == "copy" else ""
                    writer.writerow((ids_I[i], names[labels_I[i]], finding, *cosines, other, original))
    _limits_figure(np.concatenate(shown, 1), limits).savefig(out / "clean.png")
    return {
        "images": embeddings.facts.images,
        "flips": counts["flip"],
        "outliers": counts["outlier"],
        "copies": counts["copy"],
    }


def identity_centres(embeddings: Embeddings, identities: int, least: float = Limits.outlier) -> np.ndarray:
    """Return the centres of a dataset's identities: float32 [N, D], zeros for an identity without images.

    Args:
        least: cosine; a centre leaves out images that are farther from the rest of their identity.
    """
    centres_ND = np.zeros((identities, embeddings.facts.embedding), np.float32)
    for labels_I, _, embeddings_ID in embeddings.by_identity():
        centres_ND[np.unique(labels_I)], _ = centres(embeddings_ID, labels_I, least)
    return centres_ND


def _limits_figure(cosines_2I: np.ndarray, limits: Limits) -> Figure:
    """Draw each image by its cosine to its own identity and to the nearest other one, with the limits."""
    figure = Figure(figsize=(5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(cosines_2I[0], cosines_2I[1], s=2, alpha=0.3, linewidths=0)
    low = min(-0.2, float(np.nanmin(cosines_2I)))
    axes.plot([limits.flip, 1], [limits.flip, 1], "r", lw=1)
    axes.plot([low, limits.flip], [limits.flip, limits.flip], "r", lw=1, label="flips above")
    axes.plot([limits.outlier] * 2, [low, limits.flip], "k--", lw=1, label="outliers on the left")
    axes.set(xlim=(low, 1), ylim=(low, 1), xlabel="cosine to the rest of its identity")
    axes.set_ylabel("cosine to the nearest other identity")
    axes.legend(loc="lower right")
    return figure
