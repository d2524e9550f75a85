"""BigFace-Distill: BigFace's knobs and the weight of the distillation (METHODS §5)."""

from fr_core.config.methods import Distill
from tune_spaces import bigface
from tune_spaces.fields import LogUniform, knob

SPACE = (*bigface.SPACE, knob(Distill, "weight", LogUniform(1, 100), "distill_weight"))  # λ; paper: 9
