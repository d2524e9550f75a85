"""The choice of the module that gives each face its margin."""

from typing import assert_never

from fr_core.config.methods import (
    AdaFaceMargin,
    AnyMargin,
    CurricularMargin,
    ElasticArcMargin,
    ElasticCosMargin,
    MagFaceMargin,
    Margin,
)
from fr_core.heads.adaface import AdaFace
from fr_core.heads.curricularface import CurricularFace
from fr_core.heads.elasticface import ElasticFace
from fr_core.heads.magface import MagFace
from fr_core.heads.margins import FaceMargins, FixedMargin


def make_margin(margin: AnyMargin) -> FaceMargins:
    """Return the module of a margin's section. The head saves and restores the module's buffers, if it has any."""
    match margin:
        case Margin():
            return FixedMargin(margin)
        case AdaFaceMargin():
            return AdaFace(margin)
        case MagFaceMargin():
            return MagFace(margin)
        case ElasticArcMargin() | ElasticCosMargin():
            return ElasticFace(margin)
        case CurricularMargin():
            return CurricularFace(margin)
        case _ as unknown:
            assert_never(unknown)
