"""Search space of BigFace-Distill: BigFace's, and the weight of the distillation (docs/methods/bigface.md)."""

from fr_core.config.methods import Distill
from tune_spaces import bigface
from tune_spaces.fields import LogUniform, knob

SPACE = (*bigface.SPACE, knob(Distill, "weight", LogUniform(1, 100), "distill_weight"))  # λ; BigFace-Distill: 9
