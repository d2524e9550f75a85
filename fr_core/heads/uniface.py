"""UniFace's margin and threshold.

Zhou, Jia, Li, Shen, Duan, "UniFace: Unified Cross-Entropy Loss for Deep Face Recognition", ICCV 2023.
"""

import math

import torch
from torch import Tensor

from fr_core.config.methods import UniFaceMargin
from fr_core.heads.margins import FaceMargin, FaceMargins, Faces, Threshold


class UniFace(FaceMargins):
    """A threshold that all faces and classes share. It is one number, the same on all ranks, so it moves itself.

    Args:
        classes: classes that take part in a step.
    """

    bias: Tensor
    velocity: Tensor

    def __init__(self, margin: UniFaceMargin, classes: float) -> None:
        super().__init__()
        self.margin = margin
        self.register_buffer("bias", torch.tensor(math.log(10 * classes)))
        self.register_buffer("velocity", torch.zeros(()))

    def forward(self, faces: Faces) -> FaceMargin:
        """Return the margin, with the threshold of this step."""
        given = self.margin
        threshold = Threshold(self.bias.clone(), given.balance, torch.zeros_like(self.bias))
        return FaceMargin(given.scale, m1=1.0, m2=0.0, m3=given.m, threshold=threshold)

    @torch.no_grad()
    def learn(self, margin: FaceMargin) -> None:
        """Move the threshold by SGD with momentum and the exact gradient: v ← μ·v + gradient, b ← b − rate·v."""
        assert margin.threshold is not None
        self.velocity.mul_(self.margin.momentum).add_(margin.threshold.gradient)
        self.bias.sub_(self.velocity, alpha=self.margin.rate)
