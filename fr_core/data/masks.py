"""Synthetic face masks on aligned crops, by two complementary tools. All textures are drawn here.

*Warped*: a homography of six points lays a drawn mask on the lower face. It offers many shapes and patterns but looks a
little unnatural. *Rendered*: the mask lies on an ellipsoid with a nose, turned like the face. One ray per pixel finds
the cloth, which is shaded and casts a shadow below. It looks natural but offers few kinds. The tools are explained in
docs/methods/bigface.md.

Both tools match the tone of the photo. The caller gives the numbers for all random choices.

Legend: H W pixels of the image, T a mask's texture. Colours are RGB, alphas are 0 to 1. Coordinates of the head are
those of the 112×112 template: x to the right, y down, z towards the viewer.
"""

import bisect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import cv2
import numpy as np

from fr_core import rng
from fr_core.config import Config
from fr_core.config.sections import Masks
from fr_core.data.crops import TEMPLATE, TEMPLATE_SIZE, similarities

Mask = Callable[[np.ndarray], np.ndarray]  # uint8 [H, W, 3] → a copy with a mask
KINDS = ("surgical", "kn95", "cloth", "dark")
PER_KIND = 16  # textures of a kind
TEXTURE = (96, 128)  # height and width of a texture, pixels
DRAWS = 24  # uniform numbers per mask
# Six anchors of a texture (ears, nose bridge, jaw, chin) in its pixels, and their targets in template pixels.
ANCHORS = np.array([(4, 14), (64, 2), (124, 14), (106, 78), (64, 94), (22, 78)], np.float32)
TARGETS = np.array([(20, 66), (56, 60), (92, 66), (84, 98), (56, 111), (28, 98)], np.float32)
JITTER = 3.0  # largest random move of a target, template pixels
EARS = np.array([(3, 56), (109, 56), (7, 84), (105, 84)], np.float32)  # ends of the straps
STRAP_ENDS = [(0, 6), (2, 7), (5, 8), (3, 9)]  # an anchor and an ear, by their places in _anchors
SYSTEM = np.zeros((12, 8))  # the constant part of the direct linear transform's system
SYSTEM[0::2, :2] = SYSTEM[1::2, 3:5] = ANCHORS
SYSTEM[0::2, 2] = SYSTEM[1::2, 5] = 1
# The head is an ellipsoid about CENTRE. Angles are in radians, heights are shares of the vertical semi-axis.
CENTRE, AXES = np.array([56.0, 66.0]), np.array([43.0, 60.0, 48.0])
REACH = 1.15  # half the angle that a mask spans
TOP = (-0.1, 0.13)  # height of the upper edge in the middle, and its fall to the sides
BOTTOM = (0.74, 0.36)  # height of the lower edge in the middle and at the sides
STRAPS = ((0.02, -0.12), (0.3, -0.35))  # height of each strap at the mask, and its slope
LIGHT = np.array([0.1, -0.46, 0.88])  # direction to the light
NOSE = np.array([22.0, 30.0])  # pixels that the tip moves against the other points, per sine of yaw and of pitch
NOSE_MOVES = np.array([-0.25, -0.25, 1, -0.25, -0.25], np.float32)
_PLANE = np.array([1, 1j])  # makes a complex number of a point
STEP = np.deg2rad(6)  # between rendered turns
GROWN, MOVED = 0.05, 1.5  # largest random change of a rendered mask's size (share) and height (template pixels)
MAX_OFFSET = 34  # pixels of the template; points farther from their places belong to no face
NARROWEST = 4  # pixels of the template between the eyes of a turned head
UNTOUCHED = 0.4  # share of the image, from its top, that no mask touches
EYE_MARGIN = 7.7  # pixels of the template below the line of the eyes that no mask enters
# Corners of the area that stays clear, seen from the left eye: along and across the line of the eyes, in EYE_MARGIN.
CLEARED = np.array([(-20, 1), (25, 1), (25, -9), (-20, -9)])
ROOM = 8  # pixels of the template around a rendered mask, more than its shadow needs
STRAPPED = 0.8  # share of the warped masks with straps
COLOURED = 12  # mean difference of red and blue from which a photo counts as coloured


@dataclass(frozen=True)
class Face:
    """Where a face lies in an image."""

    to_image: np.ndarray  # float64 [2, 3], template pixels to image pixels
    points: np.ndarray  # float32 [5, 2], image pixels
    clear: np.ndarray  # float64 [4, 2], corners of the area around the eyes that stays clear, image pixels
    yaw: float  # radians, positive where the face looks to the image's right
    pitch: float  # positive where it looks down


def masked(image: np.ndarray, landmarks: np.ndarray | None, u: np.ndarray, masks: Masks, seed: int = 0) -> np.ndarray:
    """Put a mask on a face.

    Args:
        image: uint8 [H, W, 3], an aligned crop.
        landmarks: float [5, 2], the face's points in pixels, or None if only the alignment is known.
        u: :data:`DRAWS` uniform numbers. The first three choose tool, kind and texture.
        masks: shares of the tools and kinds.
        seed: seed of the drawn textures.

    Returns:
        uint8 [H, W, 3], a new image.
    """
    return put_on(image, locate(landmarks, len(image)), u, masks, seed)


def put_on(image: np.ndarray, face: Face, u: np.ndarray, masks: Masks, seed: int) -> np.ndarray:
    """Put a mask on a face that is located. Args and returns are those of :func:`masked`."""
    size = len(image)
    above = int(UNTOUCHED * size)
    tool, kind = choose(u, masks)
    layer = TOOLS[tool](seed, kind, face, (size - above, size), above, u[2:])
    _clear_eyes(layer, face, above)
    out = image.copy()
    blend(out[above:], layer)
    return out


def choose(u: np.ndarray, masks: Masks) -> tuple[str, str]:
    """Return the tool and the kind of mask that the numbers of :func:`masked` choose."""
    weights = list(itertools.accumulate((masks.surgical, masks.kn95, masks.cloth, masks.dark)))
    kind = KINDS[bisect.bisect(weights, u[1] * weights[-1], hi=len(KINDS) - 1)]
    return ("rendered" if u[0] < masks.rendered else "warped"), kind


def mask_functions(config: Config, points_B52: np.ndarray, draws_BU: np.ndarray, size: int) -> list[Mask | None]:
    """Return the functions that put ``data.masks`` on the images of a batch: None for an image without a mask.

    Args:
        config: config of the run.
        points_B52: float32 [B, 5, 2], NaN where unknown.
        draws_BU: numbers from :func:`mask_draws`. An image gets a mask if its first number is below the ratio.
        size: side of the images, pixels.

    """
    masks = config.data.masks
    functions: list[Mask | None] = [None] * len(draws_BU)
    if masks.ratio == 0:
        return functions
    chosen = np.flatnonzero(draws_BU[:, 0] < masks.ratio)
    for i, face in zip(chosen.tolist(), locate_all(points_B52[chosen], size), strict=True):
        functions[i] = partial(put_on, face=face, u=draws_BU[i, 1:], masks=masks, seed=config.seed)
    return functions


def mask_draws(seed: int, epoch: int, sample_ids: np.ndarray) -> np.ndarray:
    """Draw the uniform numbers of each sample's mask: float64 [B, 1 + DRAWS]. The first is compared with the ratio."""
    return rng.uniforms(seed, "masks", epoch, sample_ids, 1 + DRAWS)


def second_view_mask_draws(seed: int, epoch: int, sample_ids: np.ndarray) -> np.ndarray:
    """Draw the numbers for the second augmented copy of each image: float64 [B, 1 + DRAWS]."""
    return rng.uniforms(seed, "masks of second view", epoch, sample_ids, 1 + DRAWS)


def class_image_mask_draws(seed: int, epoch: int, sample_ids: np.ndarray, class_images: int) -> np.ndarray:
    """Draw the numbers for the K class images of each sample: float64 [B, K, 1 + DRAWS]."""
    numbers = rng.uniforms(seed, "masks of class images", epoch, sample_ids, class_images * (1 + DRAWS))
    return numbers.reshape(-1, class_images, 1 + DRAWS)


def locate(landmarks: np.ndarray | None, size: int) -> Face:
    """Find the position and turn of a face in a crop, by its points or, without them, by the alignment alone."""
    unknown = np.full((5, 2), np.nan, np.float32)
    return locate_all(np.stack([unknown if landmarks is None else landmarks]), size)[0]


def locate_all(points_N52: np.ndarray, size: int) -> list[Face]:
    """Find the position and turn of N faces in crops of side ``size``.

    Points that are missing (NaN), coincide or lie too far from the template are replaced by the template's.
    """
    points_52 = TEMPLATE * (size / TEMPLATE_SIZE)
    points_M52 = np.concatenate([points_N52, points_52[None]]).astype(np.float32)  # the template's are the last
    to_template_M23 = similarities(points_M52, TEMPLATE_SIZE)
    offsets_M52 = points_M52 @ to_template_M23[:, :, :2].swapaxes(1, 2) + to_template_M23[:, None, :, 2] - TEMPLATE
    usable_N = _may_be_faces(points_M52, offsets_M52, size)[:-1]
    taken_N = np.where(usable_N, np.arange(len(points_N52)), -1)
    points_N52, to_template_N23, offsets_N52 = (all_M[taken_N] for all_M in (points_M52, to_template_M23, offsets_M52))
    turns_N2 = np.arcsin((NOSE_MOVES @ offsets_N52 / NOSE).clip(-0.8, 0.8))
    eyes_N2 = points_N52[:, :2] @ _PLANE
    along_N = eyes_N2[:, 1] - eyes_N2[:, 0]
    along_N *= EYE_MARGIN * size / TEMPLATE_SIZE / np.abs(along_N)
    clear_N4 = eyes_N2[:, :1] + along_N[:, None] * (CLEARED @ _PLANE)
    clear_N42 = np.stack([clear_N4.real, clear_N4.imag], 2)
    to_images = map(cv2.invertAffineTransform, to_template_N23.astype(np.float64))
    return list(map(Face, to_images, points_N52, clear_N42, *turns_N2.T.tolist()))


def _may_be_faces(points_N52: np.ndarray, offsets_N52: np.ndarray, size: int) -> np.ndarray:
    """Return which points a face in a crop of side ``size`` may have, by their offsets from the template: bool [N]."""
    near_N = np.abs(offsets_N52).max((1, 2)) <= MAX_OFFSET  # never true of NaN
    inside_N = np.abs(points_N52).max((1, 2)) <= 2 * size
    eyes_apart_N = (offsets_N52 + TEMPLATE)[:, :2, 0] @ [-1, 1]  # negative for a mirrored face
    return near_N & inside_N & (eyes_apart_N >= NARROWEST)


def warp_mask(seed: int, kind: str, face: Face, shape: tuple[int, int], above: int, u: np.ndarray) -> np.ndarray:
    """Make the layer of the first tool: a texture warped to the lower face, and straps to the ears.

    Args:
        seed: seed of the textures.
        kind: kind of mask.
        face: position and turn of the face.
        shape: height and width of the part of the image that the layer covers.
        above: rows of the image above the layer.
        u: uniform numbers.

    Returns:
        uint8 [shape, 4], RGB premultiplied with the alpha.
    """
    texture = textures(seed)[kind][int(u[0] * PER_KIND)]
    anchors = _anchors(round(face.yaw / STEP), round(face.pitch / STEP)).copy()
    anchors[:6] += JITTER * (2 * u[1:13].reshape(6, 2) - 1)
    points = anchors @ face.to_image[:, :2].T + face.to_image[:, 2] - (0, above)
    layer = cv2.warpPerspective(texture, homography(points[:6]), shape[::-1])
    if u[13] < STRAPPED:
        straps = np.zeros_like(layer)
        lines = (points[STRAP_ENDS] * 16).round().astype(np.int32)  # 4 fractional bits
        colour = (207, 207, 202, 230) if u[14] < 0.7 else (28, 28, 28, 230)
        cv2.polylines(straps, list(lines), False, colour, 1, cv2.LINE_AA, 4)
        layer = cv2.max(layer, straps)
    return layer


def render_mask(seed: int, kind: str, face: Face, shape: tuple[int, int], above: int, u: np.ndarray) -> np.ndarray:
    """Make the layer of the second tool: a texture on a head that is turned like the face, to the nearest :data:`STEP`.

    Args and returns as :func:`warp_mask`.
    """
    texture = textures(seed)[kind][int(u[0] * PER_KIND)]
    view = _view(round(face.yaw / STEP), round(face.pitch / STEP))
    cloth = cv2.remap(texture, *view.where, cv2.INTER_LINEAR)
    layer = cv2.max(cv2.multiply(cloth, view.tone, scale=1 / 255), view.straps)
    alpha = cv2.extractChannel(layer, 3)
    lowered = cv2.copyMakeBorder(alpha[:-2], 2, 0, 0, 0, cv2.BORDER_REPLICATE)
    shadow = cv2.blur(lowered, (7, 7))
    shadowed = cv2.addWeighted(alpha, 0.6, cv2.max(alpha, shadow), 0.4, 0)
    cv2.insertChannel(shadowed, layer, 3)
    grown = 1 + GROWN * (2 * u[1] - 1)
    moved = MOVED * (2 * u[2] - 1)
    to_layer = face.to_image.copy()
    to_layer[:, 2] += to_layer[:, :2] @ ((1 - grown) * CENTRE + (0, moved))
    to_layer[:, :2] *= grown
    to_layer[1, 2] -= above
    whole = np.zeros((TEMPLATE_SIZE, TEMPLATE_SIZE, 4), np.uint8)
    whole[view.part] = layer
    return cv2.warpAffine(whole, to_layer, shape[::-1], flags=cv2.INTER_LINEAR)


TOOLS = {"warped": warp_mask, "rendered": render_mask}


@dataclass(frozen=True)
class View:
    """A masked head, seen by one parallel ray per pixel of the template; only the part [H, W] with mask and shadow."""

    part: tuple[slice, slice]  # its rows and columns of the template
    where: tuple[np.ndarray, np.ndarray]  # texture pixel of each ray, in OpenCV's fixed-point form
    tone: np.ndarray  # uint8 [H, W, 4]: light on the cloth, and its soft edge
    straps: np.ndarray  # uint8 [H, W, 4], RGB premultiplied with the alpha


@lru_cache(maxsize=400)
def _view(yaw: int, pitch: int) -> View:
    """Render the view of a head turned by whole steps; it takes about 0.1 MB."""
    head = rotation(STEP * yaw, STEP * pitch)
    hit, surface = _cast_rays(head)
    azimuth = np.arctan2(surface[..., 0] * AXES[0], surface[..., 2] * AXES[2])
    height = surface[..., 1]
    across, down = _place_on_mask(azimuth, height)
    rows, columns = TEXTURE
    column = (columns * (0.5 + 0.46 * across)).astype(np.float32)
    row = (rows * (0.06 + 0.88 * down)).astype(np.float32)
    inside = np.minimum.reduce([1 - np.abs(across), down, 1 - down])  # distance from the mask's edge
    edge = hit * np.clip(12 * inside, 0, 1)
    strap = hit & _lies_on_strap(azimuth, height)
    light = _light(head, surface, azimuth, down)
    tone = _to_bytes(np.dstack([edge * light] * 3 + [edge]))
    straps = _to_bytes(strap[..., None] * np.dstack([0.85 * light] * 3 + [np.ones_like(light)]))
    part = _around(cv2.extractChannel(cv2.max(tone, straps), 3))
    maps = cv2.convertMaps(column[part], row[part], cv2.CV_16SC2)
    return View(part, maps, tone[part].copy(), straps[part].copy())


def _around(alpha: np.ndarray) -> tuple[slice, slice]:
    """Return the rows and columns around the part of a mask that is not transparent, with :data:`ROOM`."""
    left, top, width, height = cv2.boundingRect(alpha)
    rows = slice(max(top - ROOM, 0), top + height + ROOM)
    return rows, slice(max(left - ROOM, 0), left + width + ROOM)


def _cast_rays(head: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intersect one parallel ray per template pixel with the turned ellipsoid.

    In head coordinates and in units of the semi-axes, a ray is q = o + z·d and the head is |q| = 1. So
    (d·d) z² + 2 (o·d) z + (o·o − 1) = 0, and the viewer sees the larger z.

    Returns:
        Whether each ray hits, bool [112, 112], and the point that it hits, float64 [112, 112, 3].
    """
    ys, xs = np.mgrid[:TEMPLATE_SIZE, :TEMPLATE_SIZE]
    pixels = np.stack([xs, ys], -1) - CENTRE - _drift(head)
    axes = head / AXES
    origins = pixels @ axes[:2]
    direction = axes[2]
    a = direction @ direction
    b = origins @ direction
    c = (origins * origins).sum(-1) - 1
    discriminant = b * b - a * c
    hit = discriminant > 0
    depth = (np.sqrt(np.maximum(discriminant, 0)) - b) / a
    return hit, origins + depth[..., None] * direction


def _place_on_mask(azimuth: np.ndarray, height: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Convert places on the head to places on the mask: −1 to 1 across, 0 to 1 down."""
    bend = (1 - np.cos(azimuth)) / (1 - np.cos(REACH))  # 0 in the middle, 1 at the sides
    top = TOP[0] + TOP[1] * bend
    bottom = BOTTOM[0] + (BOTTOM[1] - BOTTOM[0]) * bend
    return azimuth / REACH, (height - top) / (bottom - top)


def _lies_on_strap(azimuth: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Return whether places on the head lie on a strap, between the mask and the ear."""
    beyond = np.abs(azimuth) - REACH
    upper, lower = (np.abs(height - level - slope * beyond) < 0.014 for level, slope in STRAPS)
    return (upper | lower) & (beyond >= 0) & (np.abs(azimuth) < 1.6)


def _light(head: np.ndarray, surface: np.ndarray, azimuth: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Return the light on places of the head, at most 1; the nose lifts the middle of the mask's upper part."""
    normals = surface / AXES
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    facing = normals @ (head.T @ LIGHT)
    nose = np.exp(-((azimuth / 0.22) ** 2)) * np.clip(1 - 2.2 * down, 0, 1)
    light = 0.42 + 0.6 * np.clip(facing + 0.35 * nose * np.cos(3 * azimuth), 0, 1)
    return np.minimum(light, 1)


def blend(photo: np.ndarray, layer: np.ndarray) -> None:
    """Lay a layer over a photo, in the photo's brightness, saturation, light and sharpness.

    Args:
        photo: uint8 [H, W, 3], changed in place.
        layer: uint8 [H, W, 4], premultiplied.
    """
    height, width = photo.shape[:2]
    small = cv2.resize(photo, (9, 6), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)
    small_grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    mean = max(cv2.mean(small_grey)[0], 1.0)
    exposure = min(max(mean / 115, 0.35), 1.15)
    light = 128 * exposure * (small_grey / mean).clip(0.6, 1.4) ** 0.6
    gain = cv2.resize(light.astype(np.uint8), (width, height), interpolation=cv2.INTER_LINEAR)
    sharpness = cv2.norm(cv2.Laplacian(grey, cv2.CV_16S), cv2.NORM_L1) / grey.size
    sigma = min(max(0.9 - 0.035 * sharpness, 0.3), 0.9) * width / TEMPLATE_SIZE
    soft = cv2.GaussianBlur(layer, (5, 5), sigma)
    cloth = cv2.cvtColor(soft, cv2.COLOR_RGBA2RGB)
    bare = cv2.bitwise_not(cv2.extractChannel(soft, 3))
    tint = cv2.norm(cv2.extractChannel(small, 0), cv2.extractChannel(small, 2), cv2.NORM_L1) / small_grey.size
    if tint < COLOURED:  # a mask has as little colour as its photo
        plain = _grey_to_rgb(cv2.cvtColor(cloth, cv2.COLOR_RGB2GRAY))
        cloth = cv2.addWeighted(cloth, tint / COLOURED, plain, 1 - tint / COLOURED, 0)
    toned = cv2.multiply(cloth, _grey_to_rgb(gain), scale=1 / 128)
    cv2.add(cv2.multiply(photo, _grey_to_rgb(bare), scale=1 / 255), toned, photo)


def _grey_to_rgb(plane: np.ndarray) -> np.ndarray:
    """Repeat a grey plane in three channels."""
    return cv2.cvtColor(plane, cv2.COLOR_GRAY2RGB)


def _to_bytes(shares: np.ndarray) -> np.ndarray:
    """Convert 0 to 1 into uint8."""
    return (255 * np.clip(shares, 0, 1) + 0.5).astype(np.uint8)


@lru_cache(maxsize=2)
def textures(seed: int) -> dict[str, list[np.ndarray]]:
    """Return the drawn masks: :data:`PER_KIND` of every kind, uint8 [T, T, 4], RGB premultiplied with the alpha."""
    return {
        kind: [_texture(kind, rng.generator(seed, f"mask {kind}", number)) for number in range(PER_KIND)]
        for kind in KINDS
    }


def rotation(yaw: float, pitch: float) -> np.ndarray:
    """Return the rotation from head to camera: float64 [3, 3]."""
    cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    around_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    around_x = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    return around_x @ around_y


@lru_cache(maxsize=400)
def _anchors(yaw: int, pitch: int) -> np.ndarray:
    """Project targets and ears onto a head turned by whole steps: float64 [10, 2], template pixels."""
    turn = rotation(STEP * yaw, STEP * pitch)
    return _projected(np.concatenate([TARGETS, EARS]), turn) + CENTRE + _drift(turn)


def homography(points: np.ndarray) -> np.ndarray:
    """Fit the projective map that carries :data:`ANCHORS` nearest to six points: float64 [3, 3].

    The method is the direct linear transform with the last entry fixed at 1 (Hartley and Zisserman, "Multiple View
    Geometry", 2003, §4.1).
    """
    system = SYSTEM.copy()
    system[0::2, 6:] = -points[:, :1] * ANCHORS
    system[1::2, 6:] = -points[:, 1:] * ANCHORS
    _, solved = cv2.solve(system, points.reshape(12, 1), flags=cv2.DECOMP_QR)
    matrix = np.ones((3, 3))
    matrix.flat[:8] = solved
    return matrix


def _projected(points: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Place template points on the ellipsoid, turn it, and project them back."""
    flat = points - CENTRE
    depth = AXES[2] * np.sqrt(np.maximum(0, 1 - ((flat / AXES[:2]) ** 2).sum(1)))
    return (np.column_stack([flat, depth]) @ turn.T)[:, :2]


def _drift(turn: np.ndarray) -> np.ndarray:
    """Return the shift of a turned head that the alignment takes back, because it keeps the mean of the five points."""
    return (TEMPLATE - CENTRE).mean(0) - _projected(TEMPLATE.astype(np.float64), turn).mean(0)


def _clear_eyes(layer: np.ndarray, face: Face, above: int) -> None:
    """Erase the part of a layer that lies above :data:`EYE_MARGIN` below the line of the eyes."""
    corners = face.clear - (0, above)
    cv2.fillConvexPoly(layer, (corners * 16).round().astype(np.int32), (0, 0, 0, 0), cv2.LINE_AA, 4)


def _texture(kind: str, random: np.random.Generator) -> np.ndarray:
    """Draw one mask at twice its size."""
    rows, columns = 2 * TEXTURE[0], 2 * TEXTURE[1]
    ys, xs = np.mgrid[:rows, :columns].astype(np.float32)
    across, down = xs / columns, ys / rows
    base, second = _colours(kind, random)
    cloth = np.ones((rows, columns, 3), np.float32) * base
    if kind == "surgical":
        for line in np.linspace(0.25, 0.75, int(random.integers(2, 6))) + random.uniform(-0.03, 0.03):
            fold = (down - line) / 0.035
            cloth *= (1 - 0.22 * np.exp(-(fold**2)) + 0.10 * np.exp(-((fold - 1.5) ** 2)))[..., None]
    elif kind == "kn95":
        cloth *= (1 - 0.25 * np.exp(-(((across - 0.5) / 0.012) ** 2)) - 0.12 * np.abs(across - 0.5))[..., None]
        for x in (0.12, 0.88):
            cloth *= (1 - 0.15 * np.exp(-(((across - x) / 0.01) ** 2)))[..., None]
        if random.random() < 0.35:
            centre = (int(columns * random.choice([0.3, 0.7])), int(rows * 0.55))
            cv2.circle(cloth, centre, 26, tuple(map(float, 0.75 * base)), -1, cv2.LINE_AA)
            cv2.circle(cloth, centre, 26, tuple(map(float, 0.5 * base)), 2, cv2.LINE_AA)
    elif kind == "cloth":
        pattern = _pattern(across, down, random)[..., None]
        cloth = cloth * (1 - pattern) + second * pattern
    cloth *= 1 + 0.05 * cv2.GaussianBlur(random.normal(size=(rows, columns)).astype(np.float32), (0, 0), 1)[..., None]
    cloth *= (1 + 0.03 * np.sin(xs * 1.6) * np.sin(ys * 1.6))[..., None]  # weave
    shape = np.zeros((rows, columns), np.float32)
    outline = (_outline(kind, random) * 16).round().astype(np.int32)
    cv2.fillPoly(shape, [outline], 1.0, cv2.LINE_AA, 4)
    if kind != "kn95":
        piping = np.zeros_like(shape)
        cv2.polylines(piping, [outline], True, 1.0, 7, cv2.LINE_AA, 4)
        cloth *= (1 - random.uniform(0.05, 0.25) * piping)[..., None]
    drawn = np.dstack([np.clip(cloth, 0, 1) * shape[..., None], shape])
    return _to_bytes(cv2.resize(drawn, TEXTURE[::-1], interpolation=cv2.INTER_AREA))


def _colours(kind: str, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a base colour that suits the kind, and a second colour."""
    second = random.uniform(0.05, 0.95, 3).astype(np.float32)
    match kind:
        case "surgical":
            known = [(0.62, 0.80, 0.90), (0.72, 0.86, 0.93), (0.60, 0.83, 0.78), (0.93, 0.94, 0.95), (0.92, 0.75, 0.80)]
            base = np.array(known[int(random.integers(len(known)))])
        case "kn95":
            base = np.full(3, random.uniform(0.86, 0.97))
        case "dark":
            base = random.uniform(0.04, 0.16) + random.uniform(0, 0.08, 3)
        case _:
            base = random.uniform(0.1, 0.95, 3)
    return base.astype(np.float32), second


def _pattern(across: np.ndarray, down: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Draw stripes, checks, dots, blotches or nothing, 0 to 1."""
    number = random.uniform(6, 16)
    match random.integers(5):
        case 0:
            angle = random.uniform(0, np.pi)
            pattern = np.sin(2 * np.pi * number * (across * np.cos(angle) + down * np.sin(angle))) > 0
        case 1:
            pattern = (np.sin(2 * np.pi * number * across) > 0) ^ (np.sin(2 * np.pi * 0.75 * number * down) > 0)
        case 2:
            pattern = np.sin(2 * np.pi * number * across) * np.sin(2 * np.pi * 0.75 * number * down) > 0.6
        case 3:
            coarse = random.normal(size=(9, 12)).astype(np.float32)
            pattern = cv2.resize(coarse, across.shape[::-1], interpolation=cv2.INTER_CUBIC) > 0.2
        case _:
            pattern = np.zeros_like(across, bool)
    return pattern.astype(np.float32)


def _outline(kind: str, random: np.random.Generator) -> np.ndarray:
    """Draw the edge of a mask near the anchors: float32 [points, 2], in pixels of the doubled texture."""
    sag, peak = random.uniform(2, 9), random.uniform(-1, 5)
    jaw = random.uniform(-6, 4) + (8 if kind == "kn95" else 0)
    corners = np.array(
        [
            *((3, 13), (34, 9 + sag / 2), (64, 2 + peak), (94, 9 + sag / 2), (125, 13)),
            *((127, 40), (110 - jaw, 76), (64, 94), (18 + jaw, 76), (1, 40)),
        ],
        np.float32,
    )
    # A closed Catmull-Rom curve through the corners.
    t = np.linspace(0, 1, 8, endpoint=False, dtype=np.float32)[:, None]
    before, start, end, after = (np.roll(corners, shift, 0)[:, None] for shift in (1, 0, -1, -2))
    cubic = t * (3 * (start - end) + after - before)
    curve = start + 0.5 * t * (end - before + t * (2 * before - 5 * start + 4 * end - after + cubic))
    return 2 * curve.reshape(-1, 2)
