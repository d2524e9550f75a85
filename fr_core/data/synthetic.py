"""Procedural faces: the embedded default data set, drawn by this file alone, with any number of identities.

A head is drawn frontal in face units (one template pixel; x from the mid line, y down from the eye line, z towards
the camera) as coloured skin and a relief; the relief is lit, and one warp turns and aligns it all onto the
five-point template. What an identity is comes from (seed, identity); all that must not matter also from the shot.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace as Look

import cv2
import numpy as np
import simplejpeg

TEMPLATE = np.array([(38.29, 51.70), (73.53, 51.50), (56.03, 71.74), (41.55, 92.37), (70.73, 92.20)], np.float32)
TEMPLATE_SIZE = 112
POINTS = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")
CSV_HEADER = ["path", *(f"{point}_{axis}" for point in POINTS for axis in "xy")]

CANVAS_REACH, CANVAS_CENTRE_Y = 60.0, 4.4  # face units: what is drawn around (0, centre)
SKIN_DENSITY, RELIEF_DENSITY = 1.0, 0.6  # canvas pixels per image pixel: colours are sharp, relief is smooth
LOCKS_FROM = 0.72  # of the half width of the face: where long hair hangs beside the jaw
SPREAD_LIMIT = 2.2  # traits are normal, cut at this many standard deviations
CHUNK = 8  # identities per task of a worker process

# Trait: (mean, standard deviation, shift from the average to the masculine end). Lengths in face units.
# fmt: off
IDENTITY_TRAITS = {
    "face_width": (39.0, 2.4, 0.8), "chin": (61.0, 3.36, 1.2), "jaw_power": (2.9, 0.48, 0.2),
    "jaw_round": (0.53, 0.07, -0.05), "ear": (2.2, 1.44, 0.4), "depth": (25.0, 2.4, 0.0), "chin_size": (3.0, 1.32, 0.5),
    "chin_cleft": (0.2, 0.48, 0.2), "cheekbone": (3.0, 1.56, 0.2), "cheek_hollow": (1.2, 1.8, 0.2),
    "hairline": (-33.0, 4.2, -1.0), "hairline_bow": (9.0, 4.8, 0.0),
    "eye_gap": (17.6, 1.44, 0.0), "eye_width": (7.5, 0.9, -0.2), "eye_open": (3.5, 0.72, -0.3),
    "eye_slant": (0.05, 0.11, -0.02), "eye_skew": (0.0, 0.26, 0.0), "eye_deep": (3.6, 1.56, 0.6),
    "lid_fold": (2.8, 1.08, -0.3), "eye_bag": (0.4, 0.42, 0.1), "iris": (3.5, 0.3, 0.0), "iris_hue": (1.6, 1.92, 0.0),
    "brow_rise": (9.2, 1.68, -0.8), "brow_gap": (7.0, 1.68, -0.4), "brow_length": (10.5, 1.44, 0.2),
    "brow_thick": (1.3, 0.48, 0.35), "brow_arch": (2.2, 1.32, -0.5), "brow_slant": (0.0, 0.14, 0.0),
    "brow_dark": (0.75, 0.16, 0.05), "brow_ridge": (2.0, 1.2, 0.8),
    "nose_length": (20.2, 2.04, 0.2), "nose_height": (9.5, 2.04, 0.6), "nose_width": (7.3, 1.2, 0.4),
    "nose_tip": (4.4, 0.72, 0.2), "nose_hump": (0.0, 1.32, 0.2), "nostril": (1.4, 0.42, 0.0),
    "bridge_width": (3.4, 0.72, 0.2), "bridge_height": (5.0, 1.56, 0.4),
    "mouth_y": (40.6, 1.92, 0.3), "mouth_width": (14.2, 1.8, 0.4), "lip_upper": (2.9, 0.9, -0.4),
    "lip_lower": (3.9, 1.08, -0.4), "lip_bow": (0.35, 0.24, -0.05), "lip_curve": (0.2, 1.08, -0.1),
    "lip_red": (0.5, 0.24, -0.15),
    "tone": (0.32, 0.21, 0.02), "warmth": (0.0, 7.2, 0.0), "cheek_red": (0.45, 0.36, -0.1),
    "freckles": (-0.3, 0.6, 0.0), "fold": (0.4, 0.36, 0.05), "wrinkle": (0.1, 0.36, 0.05),
}
# Angles in radians; smile, mouth_open and brow_lift in units of a full expression; light as slopes.
SHOT_TRAITS = {
    "yaw": (0.0, 0.165, 0.0), "pitch": (0.0, 0.09, 0.0), "roll": (0.0, 0.038, 0.0), "zoom": (0.0, 0.022, 0.0),
    "smile": (0.35, 0.3, 0.0), "mouth_open": (0.0, 0.262, 0.0), "brow_lift": (0.0, 0.637, 0.0),
    "squint": (0.0, 0.12, 0.0), "gaze_x": (0.0, 0.825, 0.0), "gaze_y": (0.0, 0.375, 0.0),
    "light_x": (0.0, 0.338, 0.0), "light_y": (-0.35, 0.225, 0.0), "ambient": (0.55, 0.09, 0.0), "gloss": (0.12, 0.06, 0.0),
    "exposure": (1.05, 0.098, 0.0), "gamma": (1.0, 0.09, 0.0), "cast": (0.03, 0.053, 0.0), "tint": (0.0, 0.022, 0.0),
    "hair_drop": (1.0, 4.5, -1.0), "hair_tilt": (0.0, 0.12, 0.0), "hair_bow": (2.0, 6.75, 0.0),
    "hair_bulk": (5.0, 3, 0.0), "hair_cover": (4.0, 2.25, 0.0), "lipstick": (-0.2, 0.375, -0.5),
    "beard": (-0.6, 0.525, 0.6),
}
SKIN_LIGHT, SKIN_DARK = np.array([238.0, 198.0, 174.0]), np.array([112.0, 74.0, 56.0])
LIP_RED, LIPSTICK = np.array([190.0, 88.0, 90.0]), np.array([176.0, 40.0, 58.0])
MOUTH_INSIDE, TEETH = np.array([58.0, 22.0, 24.0]), np.array([224.0, 216.0, 204.0])
EYE_WHITE, CATCHLIGHT = np.array([216.0, 208.0, 202.0]), np.array([255.0, 255.0, 255.0])
HAIR_COLOURS = np.array([(26, 22, 20), (40, 30, 25), (60, 42, 32), (96, 66, 44), (150, 112, 70), (200, 170, 120),
                         (120, 62, 38), (150, 146, 142)])
IRIS_COLOURS = np.array([(50, 30, 18), (74, 46, 26), (104, 86, 46), (92, 124, 84), (92, 128, 158), (130, 144, 150)])
# fmt: on

Array = np.ndarray
Bump = tuple[float, float, float, float, float]


def render_face(identity: int, shot: int, seed: int = 0, size: int = TEMPLATE_SIZE) -> tuple[Array, Array]:
    """Draw one aligned face: a pure function of its arguments.

    Returns (image uint8 [size, size, 3] RGB, landmarks float32 [5, 2] in pixels: eyes, nose tip and mouth corners,
    the left of the image first). Raises ValueError for a negative identity, shot or seed, or a size below 1.
    """
    _require(min(identity, shot, seed) >= 0, "identity, shot and seed must not be negative")
    _require(size > 0, f"size must be positive, got {size}")
    return _render_shot(_draw_identity(seed, identity, size), shot, size)[:2]


def write_faces(
    out: Path,
    identities: int,
    shots: int,
    seed: int = 0,
    size: int = TEMPLATE_SIZE,
    workers: int | None = None,
    first_identity: int = 0,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write out/images/id000000/000.jpg ... and out/landmarks.csv (paths relative to out/images, points in pixels).

    The bytes do not depend on `workers` (processes; default: one per core). `progress` is called with the number
    of images finished so far. Returns the number of images. Raises ValueError if a count or the size is below 1;
    an error in a worker is raised here. Workers are spawned, so a script needs its `if __name__ == "__main__"`.
    """
    workers = workers if workers is not None else os.cpu_count() or 1
    for name, value in {"identities": identities, "shots": shots, "size": size, "workers": workers}.items():
        _require(value > 0, f"{name} must be positive, got {value}")
    _require(min(seed, first_identity) >= 0, "seed and first_identity must not be negative")
    images = Path(out) / "images"
    images.mkdir(parents=True, exist_ok=True)
    last = first_identity + identities
    chunks = [range(start, min(start + CHUNK, last)) for start in range(first_identity, last, CHUNK)]
    rows: list[list[str]] = []
    job = partial(_write_chunk, images=images, shots=shots, seed=seed, size=size)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(chunks)), context, cv2.setNumThreads, (1,)) as pool:
        for chunk_rows in pool.map(job, chunks):
            rows += chunk_rows
            if progress is not None:
                progress(len(rows))
    with open(Path(out) / "landmarks.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([CSV_HEADER, *rows])
    return len(rows)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _write_chunk(identities: range, images: Path, shots: int, seed: int, size: int) -> list[list[str]]:
    """Write every shot of some identities; returns their rows of landmarks.csv."""
    rows = []
    for identity in identities:
        face = _draw_identity(seed, identity, size)
        folder = images / f"id{identity:06d}"
        folder.mkdir(exist_ok=True)
        for shot in range(shots):
            image, landmarks, quality = _render_shot(face, shot, size)
            (folder / f"{shot:03d}.jpg").write_bytes(simplejpeg.encode_jpeg(image, quality, "RGB", "420"))
            rows.append([f"{folder.name}/{shot:03d}.jpg", *(f"{value:.2f}" for value in landmarks.ravel())])
    return rows


class _Canvas:
    """A square of face units in pixels: its axes as vectors, smooth bumps, sharp polygons."""

    def __init__(self, size: int, density: float) -> None:
        self.scale = density * size / TEMPLATE_SIZE
        self.pixels = max(4, round(2 * CANVAS_REACH * self.scale))
        self.corner = np.array([-CANVAS_REACH, CANVAS_CENTRE_Y - CANVAS_REACH])
        axis = (np.arange(self.pixels)[:, None] + 0.5) / self.scale + self.corner
        self.x, self.y = axis[None, :, 0].astype(np.float32), axis[:, None, 1].astype(np.float32)

    def to_pixels(self, points: Array) -> Array:
        return (points - self.corner) * self.scale - 0.5

    def fill(self, image: Array, shapes: Array, colour: Array | float) -> None:
        cv2.fillPoly(image, list(_fixed(self.to_pixels(shapes))), _ink(colour), cv2.LINE_AA, 4)

    def stroke(self, image: Array, lines: Array, colour: Array | float, width: float) -> None:
        thickness = max(1, round(width * self.scale))
        cv2.polylines(image, list(_fixed(self.to_pixels(lines))), False, _ink(colour), thickness, cv2.LINE_AA, 4)

    def disc(self, image: Array, x: float, y: float, radius: float, colour: Array) -> None:
        centre = _fixed(self.to_pixels(np.array([x, y]))).tolist()
        cv2.circle(image, centre, round(radius * self.scale * 16), _ink(colour), -1, cv2.LINE_AA, 4)

    def bumps(self, *rows: Bump) -> Array:
        """Sum of Gaussians (height, x, y, x spread, y spread); each is separable, so one matrix product does all."""
        height, x, y, spread_x, spread_y = np.array(rows, np.float32).T[..., None]
        across, down = np.exp(-0.5 * ((self.x - x) / spread_x) ** 2), np.exp(-0.5 * ((self.y.T - y) / spread_y) ** 2)
        # Not numpy's product, which would start threads in every worker; the fourth argument counts 0 times.
        return cv2.gemm(height * down, across, 1, across, 0, flags=cv2.GEMM_1_T)

    def stretch(self, grid: Array) -> Array:
        return cv2.resize(grid, (self.pixels, self.pixels), interpolation=cv2.INTER_CUBIC)

    def blur(self, image: Array, sigma: float) -> Array:
        return cv2.GaussianBlur(image, (0, 0), sigma * self.scale)


def _fixed(points: Array) -> Array:
    return np.rint(points * 16).astype(np.int32)  # cv2's subpixel coordinates: 4 fractional bits


def _ink(colour: Array | float) -> tuple[float, ...]:
    return tuple(min(255.0, max(0.0, value)) for value in np.ravel(colour).tolist())


def _curve(x: Array, y: Array) -> Array:
    points = np.empty((len(x), 2))
    points[:, 0], points[:, 1] = x, y
    return points


def _band(x: Array, top: Array, bottom: Array) -> Array:
    return np.concatenate([_curve(x, top), _curve(x, bottom)[::-1]])


def _both(*rows: Bump) -> list[Bump]:
    return [(height, side * x, y, sx, sy) for height, x, y, sx, sy in rows for side in (-1, 1)]


def _pair(points: Array | list[tuple[float, float]], x: float = 0.0) -> Array:
    """A right-hand shape, moved by x, and its mirror image: [2, n, 2]."""
    return (np.asarray(points) + np.array([x, 0])) * np.array([[(-1, 1)], [(1, 1)]])


def _ramp(distance: Array, softness: float) -> Array:
    return np.clip(distance / softness + 0.5, 0, 1)


def _mix(image: Array, colour: Array, alpha: Array, tone: Array) -> None:
    """Lay a colour times a tone [height, width] over the rows of an image that alpha [height, width] touches."""
    touched = np.flatnonzero(alpha.max(1) > 0.004)
    if len(touched):
        rows = slice(touched[0], touched[-1] + 1)
        over = cv2.merge([np.minimum(tone[rows] * value, 255).astype(np.uint8) for value in colour.tolist()])
        image[rows] = cv2.blendLinear(image[rows], over, 1 - alpha[rows], alpha[rows])


def _draw_traits(table: dict[str, tuple[float, float, float]], rng: np.random.Generator, sex: float) -> Look:
    noise = np.clip(rng.standard_normal(len(table)), -SPREAD_LIMIT, SPREAD_LIMIT).tolist()
    rows = zip(table.items(), noise, strict=True)
    return Look(**{name: mean + spread * draw + shift * sex for (name, (mean, spread, shift)), draw in rows})


def _draw_identity(seed: int, identity: int, size: int) -> Look:
    """The traits of a person, and the bare skin that all the shots share."""
    rng = np.random.default_rng([seed, identity])
    sex = rng.uniform(-1, 1)  # feminine .. masculine
    face = _draw_traits(IDENTITY_TRAITS, rng, sex)
    face.key, face.sex = (seed, identity), sex
    face.skin = SKIN_LIGHT + max(0.0, face.tone) * (SKIN_DARK - SKIN_LIGHT) + face.warmth * np.array([1, 0, -1])
    hues = np.arange(len(IRIS_COLOURS))
    face.iris_colour = np.array([np.interp(face.iris_hue, hues, channel) for channel in IRIS_COLOURS.T])
    face.uneven = rng.standard_normal((14, 14)).astype(np.float32)
    canvas = _Canvas(size, SKIN_DENSITY)
    cheeks = (face.cheek_red, 24.0, 22.0, 9.0, 8.0), (0.5 * face.eye_bag, face.eye_gap - 2, 5.5, 6.0, 2.5)
    blush = canvas.bumps((0.5 * face.cheek_red, 0, face.nose_length, 6.0, 4.0), *_both(*cheeks))
    zone = canvas.bumps((1.0, 0, 14, 9.0, 7.0), *_both((1.0, 20, 16, 9.0, 7.0)))
    freckles = max(0.0, face.freckles) * zone * _ramp(canvas.stretch(rng.random((72, 72), np.float32)) - 0.85, 0.25)
    tone = 1 + 0.035 * canvas.stretch(rng.standard_normal((20, 20)).astype(np.float32)) - 0.3 * freckles
    paint = [face.skin[channel] * (tone + red * blush) for channel, red in enumerate((0.03, -0.13, -0.13))]
    face.bare = np.clip(np.dstack(paint), 0, 255).astype(np.uint8)
    for _ in range(rng.poisson(1.2)):
        canvas.disc(face.bare, rng.uniform(-32, 32), rng.uniform(-28, 56), rng.uniform(0.5, 1.2), face.skin * 0.5)
    return face


def _draw_look(face: Look, rng: np.random.Generator) -> Look:
    """The traits of the person and of one shot, together."""
    look = Look(**vars(face), **vars(_draw_traits(SHOT_TRAITS, rng, face.sex)))
    look.smile, look.mouth_open = max(-0.2, look.smile), max(0.0, look.mouth_open)
    look.beard, look.lipstick = min(1.0, max(0.0, look.beard)), min(0.9, max(0.0, look.lipstick))
    look.happy = max(0.0, look.smile)
    look.blink, look.glasses, bald = rng.random(3) < (0.04, 0.12, 0.05 + 0.05 * face.sex)
    look.hair = 0.0 if bald else 1.0
    look.long_hair = not bald and rng.random() < 0.45 - 0.4 * face.sex
    look.hair_colour = HAIR_COLOURS[rng.integers(len(HAIR_COLOURS))] * rng.uniform(0.7, 1.2)
    return look


def _outline(look: Look, y: Array) -> Array:
    """Half width of the head at each y."""
    top, widest, chin = -62.0, 2.0, look.chin + 6 * look.mouth_open
    above = np.clip((widest - y) / (widest - top), 0, 1) ** 2.5
    below = np.clip((y - widest) / (chin - widest), 0, 1) ** look.jaw_power
    return look.face_width * np.where(y < widest, np.sqrt(1 - above), (1 - below) ** look.jaw_round)


def _sculpt(canvas: _Canvas, look: Look) -> Array:
    """Relief [pixels, pixels] of head and features, in face units."""
    breadth = np.maximum(_outline(look, canvas.y), 0.55 * look.face_width)
    head = look.depth * (1 - np.clip(canvas.x / breadth, -1.15, 1.15) ** 2) - 9 * ((canvas.y - 10) / 55) ** 2
    tip, mouth = look.nose_length, look.mouth_y
    features = canvas.bumps(
        (look.bridge_height, 0, 0.30 * tip, look.bridge_width, 7.5),
        (0.45 * look.nose_height + look.nose_hump, 0, 0.60 * tip, look.bridge_width + 0.6, 5.0),
        (0.70 * look.nose_height, 0, tip - 1.5, look.nose_tip, 4.2),
        (-1.0, 0, mouth - 9, 1.8, 4.0),
        (2.0, 0, mouth, 11.0, 6.0),
        (look.chin_size, 0, look.chin - 9, 8.5, 6.0),
        (-look.chin_cleft, 0, look.chin - 8, 1.5, 3.5),
        (-1.8, 0, mouth + 9 * (1 + look.mouth_open), 9.0, 3.0),
        *_both(
            (-look.eye_deep, look.eye_gap - 1, -1.5, 8.0, 5.5),
            (2.6, look.eye_gap, 0.3, 5.0, 3.4),
            (look.brow_ridge, 14.0, -look.brow_rise - 0.5, 9.0, 3.5),
            (0.38 * look.nose_height, 0.75 * look.nose_width, tip + 0.3, 2.5, 2.8),
            (look.cheekbone + 1.5 * look.happy, 25.0, 17.0, 9.0, 8.0),
            (2.0 * look.happy, 19.0, 24.0, 6.0, 6.0),
            (-look.cheek_hollow, 25.0, 37.0, 8.0, 9.0),
            (-1.0, look.mouth_width + 2.5, mouth, 3.0, 3.5),
        ),
    )
    return head + features + 0.32 * canvas.stretch(look.uneven)


def _crease(canvas: _Canvas, skin: Array, look: Look) -> Array:
    """Skin darkened by nostrils, smile lines, eye bags and wrinkles: soft strokes, multiplied on."""
    soft = np.full(skin.shape[:2], 255, np.uint8)
    t = np.linspace(-1, 1, 9)
    tip, mouth, wing, corner = look.nose_length, look.mouth_y, look.nose_width, look.mouth_width + 4 + 2 * look.happy

    def stroke(lines: Array, strength: float, width: float) -> None:
        canvas.stroke(soft, lines, 255 * (1 - min(0.85, max(0.0, strength))), width)

    fold = [(wing + 1.5, tip - 2), ((wing + corner) / 2 + 2, (tip + mouth) / 2), (corner, mouth - 2)]
    stroke(_pair(fold), 0.05 + 0.2 * look.fold + 0.22 * look.happy, 2.0)
    stroke(_pair([(wing - 0.6, tip - 3), (wing + 0.6, tip), (wing - 0.4, tip + 2.4)]), 0.28, 1.2)
    stroke(_pair(_curve(0.48 * wing + 1.6 * t, tip + 2.6 - 0.9 * (1 - t**2))), 0.7, look.nostril)
    bag = _curve(look.eye_gap - 1 + look.eye_width * t, 5.5 + 2 * (1 - t**2))
    stroke(_pair(bag), 0.25 * look.eye_bag + 0.12 * look.happy, 1.4)
    stroke(_curve(7 * t, mouth + look.lip_lower + 3 + 9 * look.mouth_open - t**2)[None], 0.18, 2.0)
    wrinkles = np.stack([_curve(18 * t, -17 - 5 * row - look.brow_lift + 1.5 * t**2) for row in range(3)])
    stroke(wrinkles, 0.25 * look.wrinkle + 0.05 * look.brow_lift, 1.0)
    soft = canvas.blur(soft, 1.0)
    return cv2.multiply(skin, _rgb(soft), scale=1 / 255)


def _draw_eyes(canvas: _Canvas, skin: Array, look: Look) -> None:
    t = np.linspace(-1, 1, 15)
    bulge = 1 - t**2
    lid = look.eye_open * (0.1 if look.blink else max(0.4, 1 - abs(look.squint) - 0.15 * look.happy))
    cos, sin = np.cos(look.eye_slant), np.sin(look.eye_slant)
    turn = np.array([(cos, -sin), (sin, cos)])
    above, below = -lid * bulge**0.75 * (1 + look.eye_skew * t), 0.7 * lid * bulge * (1 - look.eye_skew * t)
    crease = -(lid + max(0.8, look.lid_fold)) * bulge**0.6
    upper, shadow, lower, fold = (
        _pair(_curve(look.eye_width * t, y + 0.3) @ turn, look.eye_gap) for y in (above, above + 0.8, below, crease)
    )
    balls, mask = skin.copy(), np.zeros(skin.shape[:2], np.uint8)
    opening = np.concatenate([upper, lower[:, ::-1]], axis=1)
    canvas.fill(mask, opening, 255)
    canvas.fill(balls, opening, EYE_WHITE)
    for side in (-1, 1):
        x, y = side * look.eye_gap + look.gaze_x, -0.2 * look.eye_open + look.gaze_y
        canvas.disc(balls, x, y, look.iris, look.iris_colour * 0.5)
        canvas.disc(balls, x, y + 0.2, look.iris * 0.8, look.iris_colour)
        canvas.disc(balls, x, y, look.iris * 0.42, look.iris_colour * 0.1)
        canvas.disc(balls, x + 1.1 * np.sign(look.light_x), y - 1.0, 0.8, CATCHLIGHT)
    canvas.stroke(balls, shadow, EYE_WHITE * 0.5, 0.8)
    cv2.copyTo(balls, mask, skin)
    canvas.stroke(skin, fold, look.skin * 0.68, 1.0)
    canvas.stroke(skin, lower, look.skin * 0.62, 0.8)
    canvas.stroke(skin, upper, look.skin * (0.28 + 0.1 * look.sex), 1.2)


def _draw_brows(canvas: _Canvas, skin: Array, look: Look, strands: Array) -> None:
    t = np.linspace(0, 1, 13)
    mask = np.zeros(skin.shape[:2], np.uint8)
    x = look.brow_gap + 2 * look.brow_length * t
    y = -look.brow_rise - 1.3 * look.brow_lift - look.brow_arch * np.sin(np.pi * t**1.2)
    y = y + 2 * look.brow_slant * look.brow_length * (t - 0.5)
    thick = max(0.5, look.brow_thick) * (0.6 + 0.5 * t) ** -0.4 * np.sqrt(1.02 - t**3)
    canvas.fill(mask, _pair(_band(x, y - thick, y + thick)), 255)
    alpha = canvas.blur(mask, 0.8) * np.float32(min(1.0, look.brow_dark) / 255)
    _mix(skin, 0.35 * look.hair_colour + 0.1 * look.skin, alpha, 1 + 0.2 * strands)


def _draw_mouth(canvas: _Canvas, skin: Array, look: Look) -> Array:
    """Lips, and teeth where the mouth opens; returns the corners [2, 2]."""
    t = np.linspace(-1, 1, 21)
    bulge = 1 - t**2
    x = (look.mouth_width + 2.6 * look.smile) * t
    seam = look.mouth_y + look.smile + look.lip_curve * (0.5 - t**2) - 4 * look.smile * t**2
    gap = (9 * look.mouth_open + 2.4 * max(0.0, look.smile - 0.4)) * bulge**0.8
    bow = look.lip_upper * bulge**0.8 * (1 - look.lip_bow * np.exp(-((t / 0.2) ** 2)))
    upper, lower = seam - 0.15 * gap, seam + 0.85 * gap
    lip = look.skin + min(0.8, max(0.1, 0.25 + 0.6 * look.lip_red)) * (LIP_RED * (1 - 0.35 * look.tone) - look.skin)
    lip = lip + look.lipstick * (LIPSTICK - lip)
    canvas.fill(skin, _band(x, upper - bow, upper)[None], lip * 0.84)
    canvas.fill(skin, _band(x, lower, lower + look.lip_lower * bulge**0.65)[None], lip)
    if gap.max() > 0.8:
        canvas.fill(skin, _band(x, upper, lower)[None], MOUTH_INSIDE)
        canvas.fill(skin, _band(x, upper, np.minimum(lower, upper + 3.6 * bulge))[None], TEETH)
    canvas.stroke(skin, _curve(x, upper)[None], lip * 0.45, 0.8)
    return _curve(x, seam)[[0, -1]]


def _grow_beard(canvas: _Canvas, skin: Array, look: Look, strands: Array) -> None:
    zone = canvas.bumps(
        (1.0, 0, look.mouth_y - 7, 9.0, 2.2),
        (1.3, 0, look.chin - 6, 16.0, 8.0),
        (-1.6, 0, look.mouth_y + 1, 9.0, 3.2),
        *_both((1.2, 27, look.mouth_y + 4, 7.0, 12.0)),
    )
    _mix(skin, look.hair_colour * 0.7, np.clip(zone, 0, 1) * np.float32(0.8 * look.beard), 1 + 0.25 * strands)


def _draw_glasses(canvas: _Canvas, skin: Array, look: Look, rng: np.random.Generator) -> None:
    half, tall, width, power, grey = rng.uniform((11, 7, 0.8, 0.4, 10), (14, 11, 2.2, 1.0, 90))
    cos, sin = np.cos(np.linspace(0, 2 * np.pi, 33)), np.sin(np.linspace(0, 2 * np.pi, 33))
    rim = _curve(half * np.sign(cos) * np.abs(cos) ** power, tall * np.sign(sin) * np.abs(sin) ** power + 1.5)
    inner, outer = look.eye_gap - half, look.eye_gap + half
    canvas.stroke(skin, _pair(rim, look.eye_gap), np.full(3, grey), width)
    canvas.stroke(skin, _pair([(outer, -1), (46, -2)]), np.full(3, grey), width)
    canvas.stroke(skin, _pair([(inner, -1), (0, -2.5)]), np.full(3, grey), width)


def _hair_over_skin(canvas: _Canvas, look: Look, strands: Array) -> Array:
    """Alpha of the hair in front of the skin: above the hair line, and at the sides, far down if it is long."""
    line = look.hairline + look.hair_drop + look.hair_tilt * canvas.x
    line = line + (look.hairline_bow + look.hair_bow) * (canvas.x / look.face_width) ** 2 + strands
    side, low = _outline(look, canvas.y) - 2, 4.0
    if look.long_hair:
        side, low = np.maximum(side + 2 - look.hair_cover, LOCKS_FROM * look.face_width), np.inf
    sides = _ramp(np.abs(canvas.x) - side - 0.7 * strands, 4) * _ramp(low - canvas.y, 8)
    return look.hair * np.maximum(_ramp(line - canvas.y, 6), sides)


def _head_alpha(canvas: _Canvas, look: Look) -> Array:
    """Where the head with its ears and hair hides what is behind."""
    aside, width, bulk = np.abs(canvas.x), _outline(look, canvas.y), look.hair * max(0.0, look.hair_bulk)
    bare = np.maximum(look.ear * np.exp(-(((canvas.y - 8) / 7) ** 4)), bulk * _ramp(-canvas.y, 20))
    alpha = _ramp(width + bare - aside, 1.6)
    if look.long_hair:
        locks = _ramp(0.95 * look.face_width + bulk - aside, 1.6) * _ramp(aside - LOCKS_FROM * look.face_width, 1.6)
        alpha = np.maximum(alpha, locks * _ramp(canvas.y + 10, 20))
    return canvas.blur(alpha, 0.9)


def _light(canvas: _Canvas, relief: Array, look: Look) -> tuple[Array, Array]:
    """Diffuse light, in the shadow that the relief casts on itself, and gloss; both [pixels, pixels] in 0..1."""
    light = np.array([look.light_x, look.light_y, 1.0]) / np.hypot(np.hypot(look.light_x, look.light_y), 1)
    half = light + np.array([0.0, 0.0, 1.0])
    half /= np.linalg.norm(half)
    slope_x = cv2.Sobel(relief, cv2.CV_32F, 1, 0, scale=canvas.scale / 8)
    slope_y = cv2.Sobel(relief, cv2.CV_32F, 0, 1, scale=canvas.scale / 8)
    steep = 1 / np.sqrt(1 + slope_x**2 + slope_y**2)
    facing, shiny = (
        np.clip((z - x * slope_x - y * slope_y) * steep, 0, 1) for x, y, z in (light.tolist(), half.tolist())
    )
    blocked = np.zeros_like(relief)
    for step in (4.0, 9.0):
        ahead = np.array([(1, 0, step * light[0] * canvas.scale), (0, 1, step * light[1] * canvas.scale)])
        square, border = (canvas.pixels, canvas.pixels), cv2.BORDER_REPLICATE
        higher = cv2.warpAffine(relief, ahead, square, flags=cv2.WARP_INVERSE_MAP, borderMode=border)
        blocked = np.maximum(blocked, higher - relief - float(step * light[2]))
    lit = canvas.blur(_ramp(1.2 - blocked, 2.5), 1.2)
    return facing * (0.4 + 0.6 * lit), np.square(np.square(np.square(shiny))) * lit


def _warp(layer: Array, map_x: Array, map_y: Array) -> Array:
    return cv2.remap(layer, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _rgb(grey: Array) -> Array:
    return cv2.merge([grey, grey, grey])


class _Pose:
    """The turned head seen from afar, aligned to the template by its own landmarks, found inexactly."""

    def __init__(self, look: Look, landmarks: Array, rng: np.random.Generator, size: int) -> None:
        self.size = size
        cos_y, sin_y, cos_p, sin_p = np.cos(look.yaw), np.sin(look.yaw), np.cos(look.pitch), np.sin(look.pitch)
        turn = np.array([(cos_y, 0, sin_y), (sin_y * sin_p, cos_p, -cos_y * sin_p)])
        found = landmarks @ turn.T + rng.normal(0, 0.8, (5, 2))
        target = TEMPLATE + rng.normal(0, 0.8, 2)
        # The least-squares similarity: as complex numbers, one factor turns and scales.
        a, b = ((points - points.mean(0)) @ np.array([1, 1j]) for points in (found, target))
        fit = np.vdot(a, b) / np.vdot(a, a).real * np.exp(look.zoom + 1j * look.roll)
        linear = np.array([(fit.real, -fit.imag), (fit.imag, fit.real)])
        self.matrix = linear @ turn * (size / TEMPLATE_SIZE)
        self.offset = (target.mean(0) - linear @ found.mean(0)) * (size / TEMPLATE_SIZE)
        self.landmarks = self.project(landmarks).astype(np.float32)

    def project(self, points: Array) -> Array:
        """Points [n, 3] in face units to pixels [n, 2]."""
        return points @ self.matrix.T + self.offset

    def unwarp(self, canvas: _Canvas, relief: Array) -> tuple[Array, Array]:
        """Canvas x and y of every output pixel: the fixed point of place = flat(pixel) - parallax * relief(place)."""
        inverse = np.linalg.inv(self.matrix[:, :2])
        across, down = (inverse * canvas.scale).T.astype(np.float32)
        slide = (inverse @ self.matrix[:, 2] * canvas.scale).astype(np.float32)
        start = canvas.to_pixels(-inverse @ self.offset).astype(np.float32)
        pixel = np.arange(self.size, dtype=np.float32)
        flat_x, flat_y = (start[i] + across[i] * pixel[None, :] + down[i] * pixel[:, None] for i in (0, 1))
        height = np.full_like(flat_x, 10)
        for _ in range(4):
            map_x, map_y = flat_x - slide[0] * height, flat_y - slide[1] * height
            height = _warp(relief, map_x, map_y)
        return map_x, map_y


def _draw_backdrop(look: Look, pose: _Pose, rng: np.random.Generator, size: int) -> Array:
    """All behind the head: a blurred scene, long hair, the neck in the shade of the chin, clothes."""
    level, contrast, colourful = rng.uniform((20, 5, 2), (230, 60, 20))
    scene = (rng.normal(level, contrast, (5, 5, 1)) + rng.normal(0, colourful, (5, 5, 3))).astype(np.float32)
    image = np.clip(cv2.resize(scene, (size, size), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)
    shade = look.ambient + 0.3 * (1.25 - look.ambient)
    neck, low = look.face_width * (0.64 + 0.08 * look.sex), rng.uniform(72, 95)

    def fill(half: list[tuple[float, float]], colour: Array, z: float) -> None:
        points = np.array([(side * x, y, z) for side in (-1, 1) for x, y in half[::side]])
        cv2.fillPoly(image, [_fixed(pose.project(points))], _ink(colour), cv2.LINE_AA, 4)

    if look.long_hair:
        fill([(40, 110), (46, 70), (47, 40), (42, -10)], look.hair_colour * shade * 0.8, -15)
    fill([(90, 150), (90, 86), (neck + 4, 74), (neck, 30)], look.skin * shade * 0.8, -8)
    fill([(95, 160), (95, 80), (neck, 70), (0, low)], rng.uniform(10, 240, 3), -8)
    return cv2.GaussianBlur(image, (0, 0), rng.uniform(0.6, 2.0) * size / TEMPLATE_SIZE).astype(np.float32)


def _photograph(image: Array, look: Look, rng: np.random.Generator) -> Array:
    """What a camera does: exposure, colour cast, grey film, blur, noise, tone curve."""
    grey, soft, shrink, grain = rng.random(4)
    if soft < 0.35:
        small = max(1, round(len(image) * (0.35 + 0.55 * shrink)))
        image = cv2.resize(cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA), image.shape[:2])
    image = image + _rgb(np.float32(0.5 + 6 * grain**2) * rng.standard_normal(image.shape[:2], np.float32))
    gain = np.array([1 + look.cast, 1 + look.tint, 1 - look.cast]) * max(0.4, look.exposure)
    tones = 255 * np.clip(np.arange(256)[:, None] / 255 * gain, 0, 1) ** look.gamma
    image = cv2.LUT(np.clip(image, 0, 255).astype(np.uint8), tones[None].astype(np.uint8))
    return image if grey > 0.1 else _rgb(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))


def _render_shot(face: Look, shot: int, size: int) -> tuple[Array, Array, int]:
    """Image, landmarks and JPEG quality of one shot."""
    rng = np.random.default_rng([*face.key, shot])
    look = _draw_look(face, rng)
    canvas, clay = _Canvas(size, SKIN_DENSITY), _Canvas(size, RELIEF_DENSITY)
    strands = canvas.stretch(rng.standard_normal((9, 70)).astype(np.float32))
    skin = _crease(canvas, face.bare, look)
    corners = _draw_mouth(canvas, skin, look)
    _draw_eyes(canvas, skin, look)
    _draw_brows(canvas, skin, look, strands)
    if look.beard > 0.05:
        _grow_beard(canvas, skin, look, strands)
    if look.glasses:
        _draw_glasses(canvas, skin, look, rng)
    _mix(skin, look.hair_colour, _hair_over_skin(canvas, look, strands), np.maximum(0.85 + 0.28 * strands, 0.3))

    relief = _sculpt(clay, look)
    plane = np.array([(-look.eye_gap, 0), (look.eye_gap, 0), (0, look.nose_length), *corners])
    column, row = np.clip(np.rint(clay.to_pixels(plane)).astype(int), 0, clay.pixels - 1).T
    pose = _Pose(look, np.column_stack([plane, relief[row, column]]), rng, size)
    map_x, map_y = pose.unwarp(clay, clay.blur(relief, 1.5))
    finer = canvas.scale / clay.scale
    layers = (*_light(clay, relief, look), _head_alpha(clay, look))
    diffuse, gloss, head = (_warp(layer, map_x, map_y) for layer in layers)
    skin = _warp(skin, (map_x + 0.5) * finer - 0.5, (map_y + 0.5) * finer - 0.5)
    image = skin * _rgb(look.ambient + (1.25 - look.ambient) * diffuse) + _rgb(255 * look.gloss * gloss)
    backdrop = _draw_backdrop(look, pose, rng, size)
    image = _photograph(cv2.blendLinear(image, backdrop, head, 1 - head), look, rng)
    return image, pose.landmarks, int(rng.integers(35, 96))
