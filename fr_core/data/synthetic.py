"""Procedural faces: the built-in data set, drawn without any file, with any number of identities.

An identity's traits depend on (seed, identity). Everything that recognition must ignore also depends on the shot.
The module `portrait` draws both.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace as Look

import cv2
import numpy as np
import simplejpeg

from fr_core.data import portrait
from fr_core.data.crops import TEMPLATE_SIZE
from fr_core.data.landmarks import LANDMARK_COLUMNS
from fr_core.data.portrait import Array, Canvas

SPREAD_LIMIT = 2.2  # standard deviations at which normal traits are clipped
GRAIN_ONE, GRAIN_ROOM = 32, 64  # byte that stands for 1; pixels by which crops of the grain move
CHUNK = 8  # identities per task of a worker

# Trait: (mean, standard deviation, shift from the average to the masculine end). Lengths are in face units.
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
# Angles are in radians, light in slopes; smile, mouth_open and brow_lift are in units of a full expression.
SHOT_TRAITS = {
    "yaw": (0.0, 0.165, 0.0), "pitch": (0.0, 0.09, 0.0), "roll": (0.0, 0.038, 0.0), "zoom": (0.0, 0.022, 0.0),
    "smile": (0.35, 0.3, 0.0), "mouth_open": (0.0, 0.262, 0.0), "brow_lift": (0.0, 0.637, 0.0),
    "squint": (0.0, 0.12, 0.0), "gaze_x": (0.0, 0.825, 0.0), "gaze_y": (0.0, 0.375, 0.0),
    "light_x": (0.0, 0.338, 0.0), "light_y": (-0.35, 0.225, 0.0), "ambient": (0.55, 0.09, 0.0),
    "gloss": (0.12, 0.06, 0.0), "exposure": (1.05, 0.098, 0.0), "gamma": (1.0, 0.09, 0.0),
    "cast": (0.03, 0.053, 0.0), "tint": (0.0, 0.022, 0.0),
    "hair_drop": (1.0, 4.5, -1.0), "hair_tilt": (0.0, 0.12, 0.0), "hair_bow": (2.0, 6.75, 0.0),
    "hair_bulk": (5.0, 3, 0.0), "hair_cover": (4.0, 2.25, 0.0), "lipstick": (-0.2, 0.375, -0.5),
    "beard": (-0.6, 0.525, 0.6),
}
SKIN_LIGHT, SKIN_DARK = np.array([238.0, 198.0, 174.0]), np.array([112.0, 74.0, 56.0])
HAIR_COLOURS = np.array([(26, 22, 20), (40, 30, 25), (60, 42, 32), (96, 66, 44), (150, 112, 70), (200, 170, 120),
                         (120, 62, 38), (150, 146, 142)])
IRIS_COLOURS = np.array([(50, 30, 18), (74, 46, 26), (104, 86, 46), (92, 124, 84), (92, 128, 158), (130, 144, 150)])
# fmt: on
IDENTITY_TABLE, SHOT_TABLE = (np.array([*table.values()]).T for table in (IDENTITY_TRAITS, SHOT_TRAITS))


def render_face(identity: int, shot: int, seed: int = 0, size: int = TEMPLATE_SIZE) -> tuple[Array, Array]:
    """Draw one aligned face: a pure function of its arguments.

    Args:
        identity: number of the person.
        shot: number of the person's picture.
        seed: seed of all people.
        size: side of the image, pixels.

    Returns:
        The image, uint8 [size, size, 3] RGB, and its landmarks, float32 [5, 2] in pixels: eyes, nose tip and mouth
        corners, the left of the image first.

    Raises:
        ValueError: identity, shot or seed is negative, or the size is below 1.
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
    """Write out/images/id000000/000.jpg … and out/landmarks.csv (paths relative to out/images, points in pixels).

    The bytes do not depend on the number of workers. Workers are spawned processes, so a script needs its
    `if __name__ == "__main__"`. An error in a worker is raised in the caller.

    Args:
        out: folder of the data set.
        identities: number of people.
        shots: images of each person.
        seed: seed of all people.
        size: side of the images, pixels.
        workers: processes; by default one per core.
        first_identity: number of the first person.
        progress: is called with the number of images finished so far.

    Returns:
        The number of images.

    Raises:
        ValueError: a count or the size is below 1, or seed or first_identity is negative.
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
        csv.writer(file, lineterminator="\n").writerows([["path", *LANDMARK_COLUMNS], *rows])
    return len(rows)


def _require(condition: bool, message: str) -> None:
    """Raise ValueError unless a condition holds."""
    if not condition:
        raise ValueError(message)


def _write_chunk(identities: range, images: Path, shots: int, seed: int, size: int) -> list[list[str]]:
    """Write every shot of some identities; return their rows of landmarks.csv."""
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


def _draw_traits(names: Iterable[str], table: Array, rng: np.random.Generator, sex: float) -> dict[str, float]:
    """Draw a value for each trait of a table of (mean, spread, shift with sex)."""
    mean, spread, shift = table
    noise = rng.standard_normal(len(mean)).clip(-SPREAD_LIMIT, SPREAD_LIMIT)
    return dict(zip(names, (mean + spread * noise + shift * sex).tolist(), strict=True))


def _draw_identity(seed: int, identity: int, size: int) -> Look:
    """Draw a person's traits and what all shots share: bare skin and the relief of the features."""
    rng = np.random.default_rng([seed, identity])
    sex = rng.uniform(-1, 1)  # -1 feminine … 1 masculine
    face = Look(**_draw_traits(IDENTITY_TRAITS, IDENTITY_TABLE, rng, sex))
    face.key, face.sex = (seed, identity), sex
    face.skin = SKIN_LIGHT + max(0.0, face.tone) * (SKIN_DARK - SKIN_LIGHT) + face.warmth * np.array([1, 0, -1])
    hues = np.arange(len(IRIS_COLOURS))
    face.iris_colour = np.array([np.interp(face.iris_hue, hues, channel) for channel in IRIS_COLOURS.T])
    face.uneven = rng.standard_normal((14, 14)).astype(np.float32)
    face.bare = _draw_bare_skin(face, rng, portrait.canvas_of(size, portrait.SKIN_DENSITY))
    face.features = _sculpt_features(face, portrait.canvas_of(size, portrait.RELIEF_DENSITY))
    return face


def _draw_bare_skin(face: Look, rng: np.random.Generator, canvas: Canvas) -> Array:
    """Draw skin [pixels, pixels, 3] with blush, freckles, uneven tone and moles."""
    blush = canvas.bumps(
        (0.5 * face.cheek_red, 0, face.nose_length, 6.0, 4.0),
        (face.cheek_red, 24.0, 22.0, 9.0, 8.0),
        (0.5 * face.eye_bag, face.eye_gap - 2, 5.5, 6.0, 2.5),
    )
    grain, patches = rng.random((72, 72), np.float32), rng.standard_normal((20, 20)).astype(np.float32)
    tone = 1 + 0.035 * canvas.stretch(patches)
    if face.freckles > 0:
        zone = canvas.bumps((0.3 * face.freckles, 0, 14, 9.0, 7.0), (0.3 * face.freckles, 20, 16, 9.0, 7.0))
        tone -= zone * portrait.ramp(canvas.stretch(grain) - 0.85, 0.25) * np.float32(1 / 255)
    reds = zip(face.skin.tolist(), (0.03, -0.13, -0.13), strict=True)
    skin = cv2.merge([cv2.addWeighted(tone, value, blush, value * red, 0, dtype=cv2.CV_8U) for value, red in reds])
    for _ in range(rng.poisson(1.2)):
        mole = complex(rng.uniform(-32, 32), rng.uniform(-28, 56)) + rng.uniform(0.5, 1.2) * portrait.CIRCLE
        portrait.fill(skin, canvas.place(mole)[None], face.skin * 0.5)
    return skin


def _sculpt_features(face: Look, clay: Canvas) -> Array:
    """Sculpt the relief of a face at rest, without the head under it."""
    tip, mouth = face.nose_length, face.mouth_y
    # fmt: off
    features = clay.bumps(
        (face.bridge_height, 0, 0.30 * tip, face.bridge_width, 7.5), (-1.0, 0, mouth - 9, 1.8, 4.0),
        (0.45 * face.nose_height + face.nose_hump, 0, 0.60 * tip, face.bridge_width + 0.6, 5.0),
        (0.70 * face.nose_height, 0, tip - 1.5, face.nose_tip, 4.2), (2.0, 0, mouth, 11.0, 6.0),
        (0.38 * face.nose_height, 0.75 * face.nose_width, tip + 0.3, 2.5, 2.8), (face.cheekbone, 25.0, 17.0, 9.0, 8.0),
        (-face.eye_deep, face.eye_gap - 1, -1.5, 8.0, 5.5), (2.6, face.eye_gap, 0.3, 5.0, 3.4),
        (face.brow_ridge, 14.0, -face.brow_rise - 0.5, 9.0, 3.5), (-face.cheek_hollow, 25.0, 37.0, 8.0, 9.0),
        (-1.0, face.mouth_width + 2.5, mouth, 3.0, 3.5),
        (face.chin_size, 0, face.chin - 9, 8.5, 6.0), (-face.chin_cleft, 0, face.chin - 8, 1.5, 3.5),
    )
    # fmt: on
    return features + 0.32 * clay.stretch(face.uneven)


def _draw_look(face: Look, rng: np.random.Generator) -> Look:
    """Join a person's traits with the traits of one shot."""
    look = Look(**vars(face), **_draw_traits(SHOT_TRAITS, SHOT_TABLE, rng, face.sex))
    look.smile, look.mouth_open = max(-0.2, look.smile), max(0.0, look.mouth_open)
    look.beard, look.lipstick = min(1.0, max(0.0, look.beard)), min(0.9, max(0.0, look.lipstick))
    look.happy = max(0.0, look.smile)
    look.blink, look.glasses, bald = rng.random(3) < (0.04, 0.12, 0.05 + 0.05 * face.sex)
    look.hair = 0.0 if bald else 1.0
    look.long_hair = not bald and rng.random() < 0.45 - 0.4 * face.sex
    look.hair_colour = HAIR_COLOURS[rng.integers(len(HAIR_COLOURS))] * rng.uniform(0.7, 1.2)
    return look


@lru_cache(maxsize=2)
def _grain(size: int) -> Array:
    """Make grey noise around the middle of a byte, larger than an image: every image crops another part."""
    noise = np.random.default_rng(0).standard_normal((size + GRAIN_ROOM, size + GRAIN_ROOM), np.float32)
    return cv2.cvtColor((128 + GRAIN_ONE * noise).clip(0, 255).astype(np.uint8), cv2.COLOR_GRAY2RGB)


def _photograph(image: Array, look: Look, rng: np.random.Generator) -> Array:
    """Imitate a camera: exposure, colour cast, grey film, blur, noise, tone curve."""
    size = len(image)
    grey, soft, shrink, coarse = rng.random(4).tolist()
    if soft < 0.35:
        small = max(1, round(size * (0.35 + 0.55 * shrink)))
        image = cv2.resize(cv2.resize(image, (small, small)), (size, size))
    across, down = rng.integers(GRAIN_ROOM, size=2).tolist()
    strength = (0.5 + 6 * coarse**2) / GRAIN_ONE
    noise = _grain(size)[down : down + size, across : across + size]
    image = cv2.addWeighted(image, 1, noise, strength, -128 * strength)
    gain = np.array([1 + look.cast, 1 + look.tint, 1 - look.cast], np.float32) * max(0.4, look.exposure)
    tones = 255 * np.clip(np.arange(256, dtype=np.float32)[:, None] / 255 * gain, 0, 1) ** look.gamma
    image = cv2.LUT(image, tones[None].astype(np.uint8))
    return image if grey > 0.1 else cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def _render_shot(face: Look, shot: int, size: int) -> tuple[Array, Array, int]:
    """Render one shot: image, landmarks and JPEG quality."""
    rng = np.random.default_rng([*face.key, shot])
    look = _draw_look(face, rng)
    image, landmarks = portrait.draw_portrait(look, rng, size)
    return _photograph(image, look, rng), landmarks, int(rng.integers(35, 96))
