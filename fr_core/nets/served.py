"""A trained net as MLflow serves it: files of images in, embeddings out. MLflow calls :func:`_load_pyfunc`."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fr_core.data.decode import resized
from fr_core.data.photos import RejectedImage, read_rgb
from fr_core.nets.open import Recogniser, open_net

if TYPE_CHECKING:
    from pandas import DataFrame

IMAGE = "image"  # the one column of the input


class ServedNet:
    """The object whose ``predict`` MLflow calls."""

    def __init__(self, recogniser: Recogniser) -> None:
        self.recogniser = recogniser

    def predict(self, faces: "DataFrame", params: dict[str, object] | None = None) -> np.ndarray:
        """Return the embeddings that ``Recogniser.embed`` returns: float32 [N, D], of length 1.

        Args:
            faces: column ``image`` with N files of aligned face crops, as bytes: JPEG, PNG, WEBP, BMP, TIFF.
            params: MLflow passes it; it has no meaning here.

        Raises:
            MlflowException: a file is no image that can be read. The server answers it as an error of the client.
        """
        from mlflow.exceptions import MlflowException

        size, crops = self.recogniser.net.input_size, []
        for row, data in enumerate(faces[IMAGE]):
            try:
                crops.append(resized(read_rgb(data), size))
            except RejectedImage as reason:
                raise MlflowException.invalid_parameter_value(f"row {row}: not a readable image: {reason}") from None
        return self.recogniser.embed(np.stack(crops)) if crops else np.empty((0, self.recogniser.net.embedding), "f4")


def _load_pyfunc(path: str) -> ServedNet:
    """Open the net of an MLflow model; ``path`` is its file of weights."""
    return ServedNet(open_net(Path(path)))
