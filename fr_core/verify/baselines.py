"""Features without learning: their scores are the floor that a trained net must exceed.

Each function maps images to L2-normalised vectors, whose dot product is the similarity.
Legend: N images, H W pixels, D features.
"""

import numpy as np


def raw_pixels(images_NHWC: np.ndarray) -> np.ndarray:
    """Return the grey pixels of each image less their mean: float32 [N, H·W]."""
    grey = images_NHWC.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return _unit(grey.reshape(len(grey), -1) - grey.mean((1, 2))[:, None])


def colour_histogram(images_NHWC: np.ndarray) -> np.ndarray:
    """Return the square roots of 8×8×8 RGB histograms: float32 [N, 512].

    Their dot product is Bhattacharyya's coefficient.
    """
    bins = (images_NHWC >> 5).astype(np.int64) @ np.array([64, 8, 1])
    counts = np.stack([np.bincount(image.ravel(), minlength=512) for image in bins])
    return _unit(np.sqrt(counts).astype(np.float32))


def _unit(vectors_ND: np.ndarray) -> np.ndarray:
    return vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), 1e-12)
