"""Search space of BigFace (MFR-ICCV2021; docs/methods/bigface.md)."""

from fr_core.config.methods import BigFace
from fr_core.config.optim import Optimizer
from fr_core.config.sections import Masks
from tune_spaces.fields import LogUniform, Uniform, knob

SPACE = (
    knob(Masks, "ratio", Uniform(0.0, 0.6), "mask_ratio"),  # BigFace: 0.35
    knob(Masks, "rendered", Uniform(0.0, 1.0), "mask_mix"),  # share of the 3D tool
    knob(Optimizer, "lr", LogUniform(0.005, 0.5)),  # BigFace: 0.01, scaled with the batch
    knob(Optimizer, "weight_decay", LogUniform(1e-5, 5e-3)),  # BigFace: 5e-4
    knob(BigFace, "margin.m3", Uniform(0.1, 0.5)),  # BigFace: 0.4
)
