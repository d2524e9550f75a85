"""MagFace's margins and its regulariser.

Meng, Zhao, Huang, Zhou, "MagFace: A Universal Representation for Face Recognition and Quality Assessment", CVPR 2021.

Legend: G faces of the global batch.
"""

from fr_core.config.methods import MagFaceMargin
from fr_core.heads.margins import FaceMargin, FaceMargins, Faces


class MagFace(FaceMargins):
    """Margins m(a) that grow with the length a of an embedding, and g(a), which falls with it; both have a gradient."""

    def __init__(self, margin: MagFaceMargin) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, faces: Faces) -> FaceMargin:
        """Return the faces' margins and their share of the regulariser, λ·g(a)."""
        given = self.margin
        length_G = faces.x_GD.norm(dim=1).clamp(given.low_length, given.high_length)
        rise = (given.high_margin - given.low_margin) / (given.high_length - given.low_length)
        m2_G = given.low_margin + rise * (length_G - given.low_length)
        extra_G = given.weight * (length_G / given.high_length**2 + 1 / length_G)
        return FaceMargin(given.scale, m1=1.0, m2=m2_G, m3=0.0, past_pi=given.past_pi, extra_G=extra_G)
