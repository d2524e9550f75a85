"""The choice of the module that gives each face its margin."""

from typing import assert_never

from fr_core.config.methods import (
    AdaFaceMargin,
    AnyMargin,
    CurricularMargin,
    ElasticArcMargin,
    ElasticCosMargin,
    LDAMMargin,
    MagFaceMargin,
    Margin,
    UniFaceMargin,
)
from fr_core.heads.adaface import AdaFace
from fr_core.heads.curricularface import CurricularFace
from fr_core.heads.elasticface import ElasticFace
from fr_core.heads.ldam import LDAM
from fr_core.heads.magface import MagFace
from fr_core.heads.margins import FaceMargins, FixedMargin
from fr_core.heads.uniface import UniFace


def make_margin(margin: AnyMargin, classes: float) -> FaceMargins:
    """Return the module of a margin's section. The head saves and restores the module's buffers, if it has any.

    Args:
        classes: classes that take part in a step, over all ranks.
    """
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
        case UniFaceMargin():
            return UniFace(margin, classes)
        case LDAMMargin():
            return LDAM(margin)
        case _ as unknown:
            assert_never(unknown)
