"""CurricularFace's margin and its rule for hard negatives.

Huang et al., "CurricularFace: Adaptive Curriculum Learning Loss for Deep Face Recognition", CVPR 2020.

Legend: G faces of the global batch.
"""

import torch
from torch import Tensor

from fr_core.config.methods import CurricularMargin
from fr_core.heads.margins import FaceMargin, FaceMargins, Faces, Hard


class CurricularFace(FaceMargins):
    """ArcFace's margin, and a rule for negatives above the positive's cosine after the margin."""

    t: Tensor  # moving average of the mean positive cosine, from 0

    def __init__(self, margin: CurricularMargin) -> None:
        super().__init__()
        self.margin = margin
        self.register_buffer("t", torch.zeros(()))

    @torch.no_grad()
    def forward(self, faces: Faces) -> FaceMargin:
        """Move t by the faces' mean positive cosine, and return the margin. t and thresholds have no gradient."""
        given = self.margin
        assert faces.cos_G is not None
        cos_G = faces.cos_G.clamp(-1, 1)
        self.t.lerp_(cos_G.mean().to(self.t), 1 - given.momentum)
        hard = Hard(torch.cos(torch.acos(cos_G) + given.m), self.t.to(cos_G).clone())
        return FaceMargin(given.scale, m1=1.0, m2=given.m, m3=0.0, hard=hard)
