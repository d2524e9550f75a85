"""LDAM's margins: the fewer images an identity has, the greater its margin.

Cao, Wei, Gaidon, Arechiga, Ma, "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019.

Legend: G faces of the global batch, N identities, V classes of an identity.
"""

import numpy as np
import torch
from torch import Tensor

from fr_core.config.methods import LDAMMargin
from fr_core.heads.margins import FaceMargin, FaceMargins, Faces


class LDAM(FaceMargins):
    """Margins in proportion to n^(−power) of the identity's n images."""

    share_N: Tensor | None = None  # of the stated margins; follows from the data, so no checkpoint has it

    def __init__(self, margin: LDAMMargin) -> None:
        super().__init__()
        self.margin, self.variants = margin, 1

    def know(self, images_N: np.ndarray, variants: int, device: torch.device) -> None:
        """Take the numbers of images of each identity, by label, before the first step.

        Args:
            variants: V.
        """
        self.share_N = torch.from_numpy(margin_shares(images_N, self.margin)).float().to(device)
        self.variants = variants

    def forward(self, faces: Faces) -> FaceMargin:
        """Return the margins of the faces' classes."""
        given = self.margin
        assert self.share_N is not None, "the margin knows no numbers of images"
        assert faces.labels_G is not None
        share_G = self.share_N[faces.labels_G // self.variants]
        m2 = given.m2 * share_G if given.m2 else 0.0
        return FaceMargin(given.scale, 1.0, m2, given.m3 * share_G, given.gradient, given.past_pi)


def margin_shares(images_N: np.ndarray, margin: LDAMMargin) -> np.ndarray:
    """Return what the stated margins are multiplied by: float64 [N], of which the largest, or the mean, is 1."""
    share_N = images_N.clip(1) ** -margin.power
    return share_N / (share_N.max() if margin.stated == "largest" else share_N.mean())
