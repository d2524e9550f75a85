"""One procedural face, from its traits to pixels.

A head is drawn frontal as coloured skin and a relief. The relief lights the skin. One warp then turns everything and
aligns it onto the five-point template.

Face units are template pixels: x from the mid line, y down from the eye line, z towards the camera. A point of the
plane is a complex number x + iy, so a shape is one array.
"""

from __future__ import annotations

import cmath
import math
from functools import lru_cache
from types import SimpleNamespace as Look

import cv2
import numpy as np

from fr_core.data.crops import TEMPLATE, TEMPLATE_SIZE

Array = np.ndarray

CANVAS_REACH, CANVAS_CENTRE_Y = 60.0, 4.4  # half the side of a canvas, and the y of its middle
SKIN_DENSITY, RELIEF_DENSITY = 1.0, 0.6  # canvas pixels per image pixel: colours are sharp, relief is smooth
LOCKS_FROM = 0.72  # share of the face's half width from which long hair hangs beside the jaw
SHADE_ONE, TONE_ONE = 200, 128  # bytes that stand for 1

LIP_RED, LIPSTICK = np.array([190.0, 88.0, 90.0]), np.array([176.0, 40.0, 58.0])
MOUTH_INSIDE, TEETH = np.array([58.0, 22.0, 24.0]), np.array([224.0, 216.0, 204.0])
EYE_WHITE, CATCHLIGHT = np.array([216.0, 208.0, 202.0]), np.array([255.0, 255.0, 255.0])

ALONG = np.linspace(-1, 1, 17)  # parameter along a line; paired lines run outwards
BULGE, PART = 1 - ALONG**2, (1 + ALONG) / 2
CIRCLE = np.exp(2j * np.pi * PART)


class Canvas:
    """A square of face units in pixels. It has axes as vectors, and draws smooth bumps and sharp shapes."""

    def __init__(self, size: int, density: float) -> None:
        self.scale = density * size / TEMPLATE_SIZE
        self.pixels = max(4, round(2 * CANVAS_REACH * self.scale))
        self.corner = complex(-CANVAS_REACH, CANVAS_CENTRE_Y - CANVAS_REACH)
        centres = (np.arange(self.pixels) + 0.5) / self.scale
        self.x = (centres + self.corner.real).astype(np.float32)[None, :]
        self.y = (centres + self.corner.imag).astype(np.float32)[:, None]

    def to_pixels(self, points: Array) -> Array:
        """Convert points in face units to pixels."""
        return points * self.scale - (self.corner * self.scale + 0.5 + 0.5j)

    def place(self, shapes: Array) -> Array:
        """Convert shapes in face units to fixed-point pixels for `fill` and `stroke`."""
        return fixed_point(self.to_pixels(shapes))

    def stroke(self, image: Array, lines: Array, colour: Array | float, width: float) -> None:
        """Draw lines of one colour and width, in place."""
        thickness = max(1, round(width * self.scale))
        cv2.polylines(image, list(lines), False, np.ravel(colour).tolist(), thickness, cv2.LINE_AA, 4)

    def bumps(self, *rows: tuple[float, ...]) -> Array:
        """Sum separable Gaussians (height, x, y, x spread, y spread), mirrored where x is not 0, by one product."""
        mirrored = [(height, -x, y, *spread) for height, x, y, *spread in rows if x]
        height, x, y, spread_x, spread_y = np.array([*rows, *mirrored], np.float32).T[..., None]
        across, down = np.exp(-0.5 * ((self.x - x) / spread_x) ** 2), np.exp(-0.5 * ((self.y.T - y) / spread_y) ** 2)
        # numpy would start threads in every worker. The fourth argument is unused: its factor is 0.
        return cv2.gemm(height * down, across, 1, across, 0, flags=cv2.GEMM_1_T)

    def stretch(self, grid: Array, interpolation: int = cv2.INTER_CUBIC) -> Array:
        """Enlarge a coarse grid to the canvas."""
        return cv2.resize(grid, (self.pixels, self.pixels), interpolation=interpolation)

    def blur(self, image: Array, sigma: float) -> Array:
        """Blur an image by a box filter of about this standard deviation in face units."""
        width = 2 * round(1.2 * sigma * self.scale) + 1
        return cv2.blur(image, (width, width))


canvas_of = lru_cache(maxsize=8)(Canvas)  # safe to share: nothing writes to its axes


def fixed_point(points: Array) -> Array:
    """Convert complex [..., n] to int32 [..., n, 2] with 4 fractional bits, the form that `fill` and `stroke` take."""
    return np.rint(points * 16).view(np.float64).astype(np.int32).reshape(*points.shape, 2)


def fill(image: Array, shapes: Array, colour: Array | float) -> None:
    """Fill shapes with one colour, in place."""
    cv2.fillPoly(image, list(shapes), np.ravel(colour).tolist(), cv2.LINE_AA, 4)


def _paired(points: Array) -> Array:
    """Return the mirror image of a right-hand shape, and the shape."""
    return np.array([-points.conj(), points])  # the mirror image of a right-hand shape, and the shape


def ramp(distance: Array, softness: float) -> Array:
    """Map a distance to 0 … 255 across the edge at distance 0. OpenCV clips while converting."""
    return cv2.addWeighted(distance, 255 / softness, distance, 0, 127.5, dtype=cv2.CV_8U)


def _lay_over(image: Array, colour: Array, alpha: Array, tone: Array) -> None:
    """Lay a colour times a tone over the rows of an image that alpha touches. Both are bytes [height, width]."""
    touched = np.flatnonzero(alpha.max(1))
    if len(touched):
        rows = slice(touched[0], touched[-1] + 1)
        alpha, tone = alpha[rows], tone[rows]
        over = [cv2.multiply(alpha, tone, scale=value / (255 * TONE_ONE)) for value in colour.tolist()]
        under = cv2.multiply(image[rows], cv2.merge([cv2.bitwise_not(alpha)] * 3), scale=1 / 255)
        cv2.add(under, cv2.merge(over), dst=image[rows])


def draw_portrait(look: Look, rng: np.random.Generator, size: int) -> tuple[Array, Array]:
    """Draw a person (with bare skin and features): image uint8 [size, size, 3], landmarks float32 [5, 2] in pixels."""
    canvas, clay = canvas_of(size, SKIN_DENSITY), canvas_of(size, RELIEF_DENSITY)
    width = _outline(look, canvas.y)
    skin, corners = _paint(canvas, look, width, rng)
    clay_width = cv2.resize(width, (1, clay.pixels))
    relief = _sculpt(clay, look, clay_width)
    points = np.array([-look.eye_gap, look.eye_gap, 1j * look.nose_length, *corners])
    pose = Pose(look, points, _heights(clay, relief, points), rng, size)
    alpha = _head_alpha(clay, look, clay_width)
    layers = _light(clay, relief, look, alpha)
    shade, gloss, background = (canvas.stretch(layer, cv2.INTER_LINEAR) for layer in layers)
    shaded = cv2.multiply(skin, cv2.merge([shade] * 3), scale=1 / SHADE_ONE)
    lit = cv2.add(shaded, cv2.merge([gloss] * 3))
    places = pose.unwarp(canvas, clay, clay.blur(relief, 1.5))
    # OpenCV samples four byte channels at once in half the time of three channels or of floats.
    turned = _sample(cv2.merge([lit, background]), places)
    head = cv2.cvtColor(turned, cv2.COLOR_RGBA2RGB)
    turned_background = cv2.extractChannel(turned, 3)
    scene = _draw_backdrop(look, pose, rng, size)
    backdrop = cv2.multiply(scene, cv2.merge([turned_background] * 3), scale=1 / 255)
    return cv2.add(head, backdrop), pose.landmarks


def _heights(clay: Canvas, relief: Array, points: Array) -> Array:
    """Read the relief at the nearest pixel to each point."""
    nearest = np.rint(clay.to_pixels(points)).view(np.float64).astype(int)
    column, row = nearest.clip(0, clay.pixels - 1).reshape(-1, 2).T
    return relief[row, column]


def _paint(canvas: Canvas, look: Look, width: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Paint skin [pixels, pixels, 3] with everything that is drawn on it; also return the corners of the mouth."""
    strands = canvas.stretch(rng.standard_normal((9, 70)).astype(np.float32), cv2.INTER_LINEAR)
    tone = cv2.addWeighted(strands, 0.28 * TONE_ONE, strands, 0, 0.85 * TONE_ONE, dtype=cv2.CV_8U)
    tone = np.maximum(tone, round(0.3 * TONE_ONE))
    skin = _crease(canvas, look)
    corners = _draw_mouth(canvas, skin, look)
    _draw_eyes(canvas, skin, look)
    _draw_brows(canvas, skin, look, tone)
    if look.beard > 0.05:
        _grow_beard(canvas, skin, look, tone)
    if look.glasses:
        _draw_glasses(canvas, skin, look, rng)
    if look.hair:
        _lay_over(skin, look.hair_colour, _hair_over_skin(canvas, look, width, strands), tone)
    return skin, corners


def _outline(look: Look, y: Array) -> Array:
    """Return the half width of the head at each y: two superellipses that meet at the widest part."""
    top, widest, chin = -62.0, 2.0, look.chin + 6 * look.mouth_open
    above = y < widest
    reach = np.minimum((y - widest) / np.where(above, top - widest, chin - widest), 1)
    power, root = np.where(above, 2.5, look.jaw_power), np.where(above, 0.5, look.jaw_round)
    return (look.face_width * (1 - reach**power) ** root).astype(np.float32)


def _sculpt(clay: Canvas, look: Look, width: Array) -> Array:
    """Sculpt the relief [pixels, pixels] of head and features, in face units."""
    across = np.minimum(np.square(clay.x / np.maximum(width, 0.55 * look.face_width)), 1.15**2)
    expression = clay.bumps(
        (-1.8, 0, look.mouth_y + 9 * (1 + look.mouth_open), 9.0, 3.0),
        (1.5 * look.happy, 25.0, 17.0, 9.0, 8.0),
        (2.0 * look.happy, 19.0, 24.0, 6.0, 6.0),
    )
    return look.features + expression - look.depth * across + (look.depth - 9 * np.square((clay.y - 10) / 55))


def _crease(canvas: Canvas, look: Look) -> Array:
    """Darken bare skin by nostrils, smile lines, eye bags and wrinkles. These are soft strokes, multiplied on."""
    soft = np.full((canvas.pixels, canvas.pixels), 255, np.uint8)
    t, bulge, part = ALONG[::2], BULGE[::2], PART[::2]
    tip, mouth, wing, corner = look.nose_length, look.mouth_y, look.nose_width, look.mouth_width + 4 + 2 * look.happy
    fold = complex(wing + 1.5, tip - 2), complex(corner, mouth - 2)
    brow = 18 * part - 1j * (17 + look.brow_lift - 1.5 * part**2)
    chin = mouth + look.lip_lower + 3 + 9 * look.mouth_open
    lines = [
        (fold[0] + (fold[1] - fold[0]) * part + 2 * bulge, 0.05 + 0.2 * look.fold + 0.22 * look.happy, 2.0),
        (wing - 0.5 + 1.1 * bulge + 1j * (tip + 2.7 * t), 0.28, 1.2),
        (0.48 * wing + 1.6 * t + 1j * (tip + 2.6 - 0.9 * bulge), 0.7, look.nostril),
        (look.eye_gap - 1 + look.eye_width * t + 1j * (5.5 + 2 * bulge), 0.25 * look.eye_bag + 0.12 * look.happy, 1.4),
        (7 * part + 1j * (chin - part**2), 0.18, 2.0),
        *((brow - 5j * row, 0.25 * look.wrinkle + 0.05 * look.brow_lift, 1.0) for row in range(3)),
    ]
    places = canvas.place(_paired(np.array([line for line, _, _ in lines])))
    for row, (_, strength, width) in enumerate(lines):
        if strength > 0:
            canvas.stroke(soft, places[:, row], 255 * (1 - min(0.85, strength)), width)
    return cv2.multiply(look.bare, cv2.merge([canvas.blur(soft, 1.0)] * 3), scale=1 / 255)


def _draw_eyes(canvas: Canvas, skin: Array, look: Look) -> None:
    """Draw eyes, lids and lashes."""
    lid = look.eye_open * (0.1 if look.blink else max(0.4, 1 - abs(look.squint) - 0.15 * look.happy))
    above = -lid * BULGE**0.75 * (1 + look.eye_skew * ALONG)
    below = 0.7 * lid * BULGE * (1 - look.eye_skew * ALONG)
    crease = -(lid + max(0.8, look.lid_fold)) * BULGE**0.6
    lines = look.eye_width * ALONG + 1j * (np.array([above, above + 0.8, below, crease]) + 0.3)
    lines = _paired(lines * cmath.rect(1, -look.eye_slant) + look.eye_gap)
    upper, shadow, lower, fold = canvas.place(lines).swapaxes(0, 1)
    gaze = complex(look.gaze_x, look.gaze_y - 0.2 * look.eye_open)
    disc, catch = look.iris * CIRCLE, math.copysign(1.1, look.light_x) - 1j + 0.8 * CIRCLE
    discs = np.array([disc, 0.2j + 0.8 * disc, 0.42 * disc, catch])
    discs = canvas.place(np.array([gaze - look.eye_gap + discs, gaze + look.eye_gap + discs]))
    balls, mask = skin.copy(), np.zeros(skin.shape[:2], np.uint8)
    opening = np.concatenate([upper, lower[:, ::-1]], axis=1)
    fill(mask, opening, 255)
    fill(balls, opening, EYE_WHITE)
    for layer, colour in enumerate((look.iris_colour * 0.5, look.iris_colour, look.iris_colour * 0.1, CATCHLIGHT)):
        fill(balls, discs[:, layer], colour)
    canvas.stroke(balls, shadow, EYE_WHITE * 0.5, 0.8)
    cv2.copyTo(balls, mask, skin)
    for line, shade, width in ((fold, 0.68, 1.0), (lower, 0.62, 0.8), (upper, 0.28 + 0.1 * look.sex, 1.2)):
        canvas.stroke(skin, line, look.skin * shade, width)


def _draw_brows(canvas: Canvas, skin: Array, look: Look, tone: Array) -> None:
    """Draw eyebrows."""
    x, y = look.brow_gap + 2 * look.brow_length * PART, look.brow_slant * look.brow_length * ALONG
    y = y - look.brow_arch * np.sin(np.pi * PART**1.2) - look.brow_rise - 1.3 * look.brow_lift
    thick = max(0.5, look.brow_thick) * (0.6 + 0.5 * PART) ** -0.4 * np.sqrt(1.02 - PART**3)
    mask = np.zeros(skin.shape[:2], np.uint8)
    shape = np.concatenate([x + 1j * (y - thick), (x + 1j * (y + thick))[::-1]])
    fill(mask, canvas.place(_paired(shape)), 255 * min(1.0, look.brow_dark))
    _lay_over(skin, 0.4 * look.hair_colour + 0.11 * look.skin, canvas.blur(mask, 0.8), tone)


def _draw_mouth(canvas: Canvas, skin: Array, look: Look) -> Array:
    """Draw lips, and teeth if the mouth opens; return the corners."""
    x = (look.mouth_width + 2.6 * look.smile) * ALONG
    seam = look.mouth_y + look.smile + look.lip_curve * (0.5 - ALONG**2) - 4 * look.smile * ALONG**2
    full = BULGE**0.8
    gap = (9 * look.mouth_open + 2.4 * max(0.0, look.smile - 0.4)) * full
    bow = look.lip_upper * full * (1 - look.lip_bow * np.exp(-np.square(ALONG / 0.2)))
    upper, lower = seam - 0.15 * gap, seam + 0.85 * gap
    teeth = np.minimum(lower, upper + 3.6 * BULGE)
    edges = x + 1j * np.array([upper - bow, upper, teeth, lower, lower + look.lip_lower * BULGE**0.65])
    shapes = np.concatenate([edges[:-1], edges[1:, ::-1]], axis=1)  # each between two neighbouring edges
    top_lip, white, inside, bottom_lip = canvas.place(shapes)[:, None]
    lip = look.skin + min(0.8, max(0.1, 0.25 + 0.6 * look.lip_red)) * (LIP_RED * (1 - 0.35 * look.tone) - look.skin)
    lip = lip + look.lipstick * (LIPSTICK - lip)
    parts = [(top_lip, lip * 0.84), (bottom_lip, lip), (inside, MOUTH_INSIDE), (white, TEETH)]
    for shape, colour in parts if gap.max() > 0.8 else parts[:2]:
        fill(skin, shape, colour)
    canvas.stroke(skin, white[:, : len(x)], lip * 0.45, 0.8)
    return (x + 1j * seam)[[0, -1]]


def _grow_beard(canvas: Canvas, skin: Array, look: Look, tone: Array) -> None:
    """Draw moustache and beard."""
    moustache, chin = (1.0, 0, look.mouth_y - 7, 9.0, 2.2), (1.3, 0, look.chin - 6, 16.0, 8.0)
    mouth, jaw = (-1.6, 0, look.mouth_y + 1, 9.0, 3.2), (1.2, 27, look.mouth_y + 4, 7.0, 12.0)
    zone = ramp(canvas.bumps(moustache, chin, mouth, jaw) - 0.5, 1.0)
    _lay_over(skin, look.hair_colour * 0.8, cv2.convertScaleAbs(zone, alpha=0.8 * look.beard), tone)


def _draw_glasses(canvas: Canvas, skin: Array, look: Look, rng: np.random.Generator) -> None:
    """Draw glasses of a random shape."""
    half, tall, width, power, grey = rng.uniform((11, 7, 0.8, 0.4, 10), (14, 11, 2.2, 1.0, 90))
    turn = np.exp(2j * np.pi * np.linspace(0, 1, 33))
    across, down = (np.copysign(np.abs(part) ** power, part) for part in (turn.real, turn.imag))
    inner, outer = look.eye_gap - half, look.eye_gap + half
    rim = look.eye_gap + half * across + 1j * (tall * down + 1.5)
    for line in (rim, np.array([outer - 1j, 46 - 2j]), np.array([inner - 1j, -2.5j])):
        canvas.stroke(skin, canvas.place(_paired(line)), np.full(3, grey), width)


def _hair_over_skin(canvas: Canvas, look: Look, width: Array, strands: Array) -> Array:
    """Return the alpha of the hair before the skin: above the hair line and at the sides, far down if it is long."""
    line = look.hairline + look.hair_drop + look.hair_tilt * canvas.x
    line = line + (look.hairline_bow + look.hair_bow) * np.square(canvas.x / look.face_width)
    inner = np.maximum(width - look.hair_cover, LOCKS_FROM * look.face_width) if look.long_hair else width - 2
    sides = ramp(np.abs(canvas.x) - inner - 0.7 * strands, 4)
    if not look.long_hair:
        sides = np.minimum(sides, ramp(4 - canvas.y, 8))
    return np.maximum(ramp(strands + (line - canvas.y), 6), sides)


def _head_alpha(clay: Canvas, look: Look, width: Array) -> Array:
    """Return where the head, with its ears and hair, hides the background."""
    aside, bulk = np.abs(clay.x), look.hair * max(0.0, look.hair_bulk)
    ear = look.ear * np.exp(-(((clay.y - 8) / 7) ** 4))
    alpha = ramp(width + np.maximum(ear, ramp(-clay.y, 20) * np.float32(bulk / 255)) - aside, 1.6)
    if look.long_hair:
        locks = np.minimum(0.95 * look.face_width + bulk - aside, aside - LOCKS_FROM * look.face_width)
        alpha = np.maximum(alpha, np.minimum(ramp(locks, 1.6), ramp(clay.y + 10, 20)))
    return alpha


def _light(clay: Canvas, relief: Array, look: Look, alpha: Array) -> tuple[Array, Array, Array]:
    """Return light times alpha, gloss times alpha, and 1 - alpha, in bytes. The relief casts shadows on itself."""
    length = math.hypot(look.light_x, look.light_y, 1)
    x, y, z = look.light_x / length, look.light_y / length, 1 / length
    slope_x = cv2.Sobel(relief, cv2.CV_32F, 1, 0, scale=clay.scale / 8)
    slope_y = cv2.Sobel(relief, cv2.CV_32F, 0, 1, scale=clay.scale / 8)
    steep = 1 / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    facing = (z - x * slope_x - y * slope_y) * steep
    shiny = np.maximum((facing + steep) * (1 / math.hypot(x, y, z + 1)), 0)
    highest = relief
    for step in (4.0, 9.0):
        ahead = [clay.pixels / 2 - 0.5 + step * clay.scale * along for along in (x, y)]
        highest = np.maximum(highest, cv2.getRectSubPix(relief, relief.shape, ahead) - step * z)
    lit = clay.blur(ramp(relief - highest + 1.2, 2.5), 1.2) * np.float32(1 / 255)
    shade = look.ambient + (1.25 - look.ambient) * np.maximum(facing, 0) * (0.4 + 0.6 * lit)
    gloss = max(0.0, look.gloss) * np.square(np.square(np.square(shiny))) * lit
    return (alpha * (shade * (SHADE_ONE / 255))).astype(np.uint8), (alpha * gloss).astype(np.uint8), 255 - alpha


def _sample(layer: Array, places: Array) -> Array:
    """Sample a layer at complex places, in pixels."""
    return cv2.remap(layer, places.real, places.imag, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


class Pose:
    """The turned head seen from afar. Inexact landmarks align it to the template."""

    def __init__(self, look: Look, plane: Array, heights: Array, rng: np.random.Generator, size: int) -> None:
        self.size = size
        side, tilt = math.sin(look.yaw), cmath.rect(1, look.pitch)
        axes = complex(math.cos(look.yaw), side * tilt.imag), 1j * tilt.real, side - 1j * math.cos(look.yaw) * tilt.imag
        error = rng.normal(0, 0.8, (6, 2)) @ (1, 1j)
        found = axes[0] * plane.real + axes[1] * plane.imag + axes[2] * heights + error[:5]
        target = TEMPLATE @ (1, 1j) + error[5]
        # Least-squares similarity: one complex factor turns and scales.
        middle, goal = complex(found.mean()), complex(target.mean())
        found -= middle
        fit = complex(np.vdot(found, target - goal) / np.vdot(found, found).real)
        fit *= cmath.exp(look.zoom + 1j * look.roll)
        self.axes = [fit * axis * (size / TEMPLATE_SIZE) for axis in axes]  # the head's axes in the image, pixels
        self.offset = (goal - fit * middle) * (size / TEMPLATE_SIZE)
        self.landmarks = self.project(plane, heights).view(np.float64).reshape(5, 2).astype(np.float32)

    def project(self, plane: Array, heights: Array | float) -> Array:
        """Project points in face units with heights to pixels of the image."""
        return self.axes[0] * plane.real + self.axes[1] * plane.imag + self.axes[2] * heights + self.offset

    def unwarp(self, canvas: Canvas, clay: Canvas, relief: Array) -> Array:
        """Return the place on the canvas of every pixel.

        It is the fixed point of place = flat(pixel) - parallax * relief(place).
        """
        x, y, z = self.axes
        area = (x.conjugate() * y).imag

        def flatten(step: complex) -> complex:
            """Return the step on a flat face that looks like ``step`` in the image."""
            return complex((step.conjugate() * y).imag / area, (x.conjugate() * step).imag / area)

        def flat(surface: Canvas, count: int) -> Array:
            """Return count × count places on the surface, as if the head were flat."""
            pixel = (np.arange(count, dtype=np.float32) + 0.5) * (self.size / count) - 0.5
            across, down = flatten(1) * pixel + flatten(-self.offset), flatten(1j) * surface.scale * pixel
            return surface.to_pixels(across) + down[:, None]

        rough = flat(clay, max(1, self.size // 2))  # half resolution is enough for heights
        height: Array = np.full(rough.shape, 10, np.float32)
        for _ in range(4):
            height = _sample(relief, rough - flatten(z) * clay.scale * height)
        height = cv2.resize(height, (self.size, self.size))
        return flat(canvas, self.size) - flatten(z) * canvas.scale * height


def _draw_backdrop(look: Look, pose: Pose, rng: np.random.Generator, size: int) -> Array:
    """Draw everything behind the head: a blurred scene, long hair, the neck in the shade of the chin, clothes."""
    level, contrast, colourful = rng.uniform(20, 230), rng.uniform(5, 60), rng.uniform(2, 20)
    scene = (rng.normal(level, contrast, (5, 5, 1)) + rng.normal(0, colourful, (5, 5, 3))).clip(0, 255)
    half = max(1, size // 2)  # enlarging it later blurs too
    scene = cv2.resize(scene.astype(np.uint8), (14, 14), interpolation=cv2.INTER_CUBIC)
    image = cv2.resize(scene, (half, half))
    neck, low = look.face_width * (0.64 + 0.08 * look.sex), rng.uniform(72, 95)
    hair = [40 + 110j, 46 + 70j, 47 + 40j, 42 - 10j]
    throat = [90 + 150j, 90 + 86j, neck + 4 + 74j, neck + 30j]
    clothes = [95 + 160j, 95 + 80j, neck + 70j, 1j * low]
    right = np.array([hair, throat, clothes])
    seen = pose.project(np.concatenate([right, -right[:, ::-1].conj()], axis=1), np.array([[-15], [-8], [-8]]))
    shapes = fixed_point((seen + 0.5 + 0.5j) * (half / size) - 0.5 - 0.5j)[:, None]
    shade = 0.8 * (look.ambient + 0.3 * (1.25 - look.ambient))
    colours = look.hair_colour * shade, look.skin * shade, rng.uniform(10, 240, 3)
    for layer in range(0 if look.long_hair else 1, 3):
        fill(image, shapes[layer], colours[layer])
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.6, 2.0) * half / TEMPLATE_SIZE)
    return cv2.resize(image, (size, size))
