"""Virtual identities: new people made from real ones by changing their faces' proportions.

Each variant of an identity is a class. All its images are warped by one smooth, left-right symmetric displacement.
So few people become many, who differ in the shape of the face. A net trained on them generalises better to unseen
people (figures: docs/experiments.md). Speaker recognition changes the speed of speech in the same way (Yamamoto et
al., "Speaker Augmentation and Bandwidth Extension for Deep Speaker Embedding", Interspeech 2019).

Legend: B images, P control points, F side of the displacement field, V variants of an identity.
"""

from functools import lru_cache

import numpy as np

from fr_core import rng
from fr_core.data.crops import TEMPLATE, TEMPLATE_SIZE

MAX_VARIANTS = 64  # variants of an identity
FIELD = 28  # side of a displacement field, which is smooth
SMOOTH = 18.0  # pixels of the template over which control points move together
# Control points beside the template's five: brows, bridge, forehead, temples, cheeks, jaw, chin, nostrils, lips.
OUTLINE = [(56, 30), (38, 40), (74, 40), (56, 51), (22, 60), (90, 60), (28, 85), (84, 85), (38, 105), (74, 105)]
MIDDLE = [(48, 72), (64, 72), (56, 80), (56, 92), (56, 108)]
EDGE = (-8.0, 37.0, 75.0, 120.0)  # coordinates of the fixed points around the crop


def variants(seed: int, epoch: int, sample_ids: np.ndarray, count: int) -> np.ndarray:
    """Choose the variant that each sample shows in an epoch: int64 [B].

    In V epochs a sample shows each variant once. Variant 0 is the unchanged face.
    """
    first = rng.uniforms(seed, "first variant", 0, sample_ids, 1)[:, 0]
    return (np.floor(first * count).astype(np.int64) + epoch) % count


def displacements(seed: int, labels_B: np.ndarray, variant_B: np.ndarray, strength: float) -> np.ndarray:
    """Make the displacement fields of identities' variants.

    Args:
        seed: seed of the run.
        labels_B: identity of each image.
        variant_B: variant of each image.
        strength: standard deviation of a control point's displacement before smoothing, as a share of the side.

    Returns:
        float32 [B, F, F, 2]: the displacement (x, y) of each place's source, as a share of the side.
    """
    moves_PAN, spline_FP = _interpolation()
    numbers = rng.uniforms(seed, "variant", 0, labels_B * MAX_VARIANTS + variant_B, moves_PAN.shape[2]) - 0.5
    numbers *= np.where(variant_B > 0, strength * np.sqrt(12), 0.0)[:, None]  # a uniform number has the deviation 1/√12
    moved_BPA = np.einsum("pan,bn->bpa", moves_PAN, numbers)
    # A product for each image is too small for BLAS to start threads, which would spin beside the decoders.
    return (spline_FP @ moved_BPA).reshape(-1, FIELD, FIELD, 2).astype(np.float32)


@lru_cache(maxsize=1)
def _interpolation() -> tuple[np.ndarray, np.ndarray]:
    """Return how 2P numbers move P control points, float64 [P, 2, 2P], and these the field: float64 [F·F, P].

    The displacements of control points are alike for neighbours and left-right symmetric. They contain no common shift
    or scale, which the alignment by five points would undo. A thin-plate spline (Bookstein, IEEE TPAMI 1989)
    interpolates between the control points and fixed points around the crop.
    """
    moving, moves = _control_moves()
    fixed = np.array([(x, y) for x in EDGE for y in EDGE if {x, y} & {EDGE[0], EDGE[-1]}])
    return moves, _spline(np.concatenate([moving, fixed]))[:, : len(moving)].copy()


def _control_moves() -> tuple[np.ndarray, np.ndarray]:
    """Return the movable control points, float64 [P, 2], and how 2P numbers move them, float64 [P, 2, 2P]."""
    size = TEMPLATE_SIZE
    mirrored = ((size - TEMPLATE) * [1, -1] + [0, size])[[1, 0, 2, 4, 3]]
    symmetric = (TEMPLATE + mirrored) / 2
    points = np.concatenate([symmetric, OUTLINE, MIDDLE])
    count = len(points)
    # Gaussian smoothness: neighbours move alike.
    values, vectors = np.linalg.eigh(np.exp(-((points[:, None] - points) ** 2).sum(2) / (2 * SMOOTH**2)))
    smooth = vectors * np.sqrt(values.clip(0))
    # Symmetry: mirrored points share their y move and have opposite x moves.
    opposite = np.abs((points * [-1, 1] + [size, 0])[:, None] - points).sum(2).argmin(1)
    even = (smooth + smooth[opposite]) / np.sqrt(2)
    odd = (smooth - smooth[opposite]) / np.sqrt(2)
    moves = np.zeros((count, 2, 2 * count))
    moves[:, 0, :count] = odd
    moves[:, 1, count:] = even
    # Aligning a crop by its five points would undo their common shift and scale.
    centred = points - symmetric.mean(0)
    shift = moves[:5].mean(0)
    scale = np.einsum("pa,pan->n", centred[:5], moves[:5]) / (centred[:5] ** 2).sum()
    moves -= shift + centred[:, :, None] * scale
    return points, moves


def _spline(points: np.ndarray) -> np.ndarray:
    """Return the thin-plate spline's weights of control points at the places of a field: float64 [F·F, points]."""
    count = len(points)
    affine = np.column_stack([np.ones(count), points])
    system = np.zeros((count + 3, count + 3))
    system[:count, :count] = _kernel(points, points)
    system[:count, count:] = affine
    system[count:, :count] = affine.T
    axis = (np.arange(FIELD) + 0.5) * TEMPLATE_SIZE / FIELD - 0.5
    places = np.stack(np.meshgrid(axis, axis), 2).reshape(-1, 2)
    through = np.column_stack([_kernel(places, points), np.ones(len(places)), places])
    return np.linalg.solve(system, through.T).T[:, :count]


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the thin-plate spline's kernel U(r) = r² log r between all pairs of two sets of points."""
    distance = np.linalg.norm(a[:, None] - b, axis=2)
    return distance**2 * np.log(np.maximum(distance, 1e-9))
