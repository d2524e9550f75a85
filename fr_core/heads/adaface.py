"""AdaFace's margins (Kim, Jain, Liu, "AdaFace: Quality Adaptive Margin for Face Recognition", CVPR 2022).

Legend: G faces of the global batch.
"""

import torch
from torch import Tensor

from fr_core.config.methods import AdaFaceMargin
from fr_core.heads.margins import FaceMargin, FaceMargins, Faces

EPS = 1e-3  # added to the deviation, as in the public code
PUBLIC_MEAN, PUBLIC_STD = 20.0, 100.0  # with which the public code begins
PUBLIC_LENGTHS = 1e-3, 100.0  # to which the public code clips lengths


class AdaFace(FaceMargins):
    """Margins by the length of an embedding, relative to the moving mean and deviation of all ranks' lengths."""

    mean: Tensor  # 0 before the first step of an average that begins with a batch
    std: Tensor

    def __init__(self, margin: AdaFaceMargin) -> None:
        super().__init__()
        self.margin, self.public = margin, margin.statistics == "public"
        self.register_buffer("mean", torch.tensor(PUBLIC_MEAN if self.public else 0.0))
        self.register_buffer("std", torch.tensor(PUBLIC_STD if self.public else 0.0))

    @torch.no_grad()
    def forward(self, faces: Faces) -> FaceMargin:
        """Move the averages by the faces' lengths, and return the faces' margins. Lengths get no gradient."""
        given = self.margin
        length_G = faces.x_GD.norm(dim=1)
        if self.public:
            length_G = length_G.clamp(*PUBLIC_LENGTHS)
        share = torch.where(self.mean > 0, 1 - given.momentum, 1.0)
        self.mean.lerp_(length_G.mean().to(self.mean), share)
        self.std.lerp_(length_G.std(correction=min(1, len(length_G) - 1)).to(self.std), share)
        quality_G = (given.h * (length_G - self.mean) / (self.std + EPS)).clamp(-1, 1)
        add_G = given.m * quality_G
        return FaceMargin(given.scale, m1=1.0, m2=-add_G, m3=given.m + add_G, past_pi=given.past_ends)
