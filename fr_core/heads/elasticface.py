"""ElasticFace's margins, drawn anew in each step.

Boutros, Damer, Kirchbuchner, Kuijper, "ElasticFace: Elastic Margin Loss for Deep Face Recognition", CVPRW 2022.

Legend: G faces of the global batch.
"""

from fr_core.config.methods import ElasticArcMargin, ElasticCosMargin
from fr_core.heads.margins import FaceMargin, FaceMargins, Faces


class ElasticFace(FaceMargins):
    """Margins of the angle or the cosine from N(m, σ²), which the step and the face's place in the batch determine."""

    draws = True

    def __init__(self, margin: ElasticArcMargin | ElasticCosMargin) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, faces: Faces) -> FaceMargin:
        """Return the faces' margins."""
        given = self.margin
        assert faces.drawn_G is not None
        m_G = given.m + given.sigma * faces.drawn_G
        if faces.cos_G is not None:
            nearest_G = faces.cos_G.argsort(descending=True, stable=True)
            sorted_G = m_G.sort().values
            m_G = sorted_G[nearest_G] if given.plus == "public" else m_G.scatter(0, nearest_G, sorted_G)
        if isinstance(given, ElasticArcMargin):
            return FaceMargin(given.scale, m1=1.0, m2=m_G, m3=0.0, past_pi=given.past_pi)
        return FaceMargin(given.scale, m1=1.0, m2=0.0, m3=m_G)
