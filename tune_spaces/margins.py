"""Search spaces of the margins of a class matrix (docs/methods/margins.md, docs/methods/subcentres.md)."""

from fr_core.config.methods import (
    AdaFaceMargin,
    BigFace,
    CurricularMargin,
    ElasticArcMargin,
    LDAMMargin,
    MagFaceMargin,
    UniFaceMargin,
)
from fr_core.config.sections import Data
from tune_spaces.fields import Integers, LogUniform, Uniform, knob

SCALES = LogUniform(16, 64)  # all papers: 64; small sets need less

ADAFACE = (
    knob(AdaFaceMargin, "scale", SCALES),
    knob(AdaFaceMargin, "m", Uniform(0.2, 0.6)),  # AdaFace: 0.4
    knob(AdaFaceMargin, "h", LogUniform(0.1, 1.0)),  # AdaFace: 0.333
)
MAGFACE = (
    knob(MagFaceMargin, "scale", SCALES),
    knob(MagFaceMargin, "high_margin", Uniform(0.5, 1.0)),  # MagFace: 0.8
    knob(MagFaceMargin, "weight", LogUniform(1, 100)),  # MagFace: 35
)
CURRICULAR = (
    knob(CurricularMargin, "scale", SCALES),
    knob(CurricularMargin, "m", Uniform(0.1, 0.6)),  # CurricularFace: 0.5
)
ELASTIC_ARC = (
    knob(ElasticArcMargin, "scale", SCALES),
    knob(ElasticArcMargin, "m", Uniform(0.1, 0.6)),  # ElasticFace-Arc: 0.5
    knob(ElasticArcMargin, "sigma", LogUniform(0.01, 0.1)),  # ElasticFace: 0.05
)
UNIFACE = (
    knob(UniFaceMargin, "scale", SCALES),
    knob(UniFaceMargin, "m", Uniform(0.1, 0.5)),  # UniFace: 0.4
    knob(UniFaceMargin, "balance", LogUniform(0.1, 10)),  # UniFace: 1
)
SUBCENTRES = (knob(BigFace, "subcentres", Integers(1, 5)),)  # sub-centre ArcFace: 3
LDAM = (
    knob(LDAMMargin, "scale", SCALES),
    knob(LDAMMargin, "m3", Uniform(0.2, 0.7)),  # LDAM: 0.5
    knob(LDAMMargin, "power", Uniform(0.0, 0.5)),  # LDAM: 0.25
    knob(Data, "sampling", Uniform(0.0, 1.0)),  # class-balanced: 0, every image once: 1
)
