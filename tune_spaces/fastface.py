"""Knobs of FastFace's two forms (METHODS §4)."""

from fr_core.config.optim import FastFace, FastFaceHaar, Optimizer
from tune_spaces.fields import LogUniform, Uniform, knob

LR = knob(Optimizer, "lr", LogUniform(0.005, 0.2))  # paper: 0.02
# Paper: 0.001 over 200,000 steps and more; a run of hundreds needs averages that much faster.
SPACE = (
    knob(FastFace, "alpha", LogUniform(1e-3, 0.2)),
    knob(FastFace, "beta", LogUniform(1e-3, 0.2)),
    knob(FastFace, "threshold", LogUniform(1e-5, 5e-2)),  # λ; paper: 5e-5; a short run's loss falls faster
    knob(FastFace, "patience", Uniform(0.02, 0.2)),  # τ; paper: 0.05
    knob(FastFace, "delta", Uniform(1.5, 4.0)),  # paper: 2
    LR,
)
HAAR = (
    knob(FastFaceHaar, "window", LogUniform(0.005, 0.05)),  # paper: 0.015
    knob(FastFaceHaar, "threshold", LogUniform(0.01, 0.2)),  # paper: 0.06
    LR,
)
