"""Search space of AttFC (2025; docs/methods/attfc.md)."""

from fr_core.config.methods import AttFC
from fr_core.config.optim import Optimizer
from tune_spaces.fields import Choice, Integers, LogUniform, Uniform, knob

SPACE = (
    knob(AttFC, "size_ratio", Uniform(0.1, 1.0)),  # AttFC: 0.1 to 0.3; small sets need more slots
    knob(AttFC, "encoder_momentum", Choice((0.9, 0.99, 0.997, 0.999))),  # AttFC: 0.999; short runs need less
    knob(AttFC, "class_images", Integers(2, 5)),  # AttFC, table 3
    knob(AttFC, "temperature", LogUniform(0.05, 2.0)),  # AttFC has none, which is 1
    knob(AttFC, "margin.m2", Uniform(0.1, 0.6)),  # AttFC: 0.5
    knob(AttFC, "margin.scale", LogUniform(16, 64)),  # AttFC: 64; small sets need less
    knob(Optimizer, "lr", LogUniform(0.01, 0.5)),  # AttFC: 0.1 at batch 384
)
