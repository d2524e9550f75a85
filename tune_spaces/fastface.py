"""Search spaces of FastFace's forms (2025; docs/methods/fastface.md)."""

from fr_core.config.optim import FastFace, FastFaceHaar, FastFaceRecurrence, Optimizer
from tune_spaces.fields import LogUniform, Uniform, knob

LR = knob(Optimizer, "lr", LogUniform(0.005, 0.2))  # FastFace: 0.02
SPACE = (
    knob(FastFace, "window", LogUniform(0.02, 0.2)),
    knob(FastFace, "slope", Uniform(0.1, 0.8)),  # κ
    knob(FastFace, "patience", Uniform(0.02, 0.2)),  # τ; FastFace: 0.05
    knob(FastFace, "delta", Uniform(1.5, 4.0)),  # FastFace: 2
    knob(FastFace, "tail", Uniform(0.0, 0.5)),
    LR,
)
# FastFace uses 0.001 in runs of 200,000 steps; a run of hundreds of steps needs faster averages.
RECURRENCE = (
    knob(FastFaceRecurrence, "alpha", LogUniform(1e-3, 0.2)),
    knob(FastFaceRecurrence, "beta", LogUniform(1e-3, 0.2)),
    knob(FastFaceRecurrence, "threshold", LogUniform(1e-5, 5e-2)),  # λ; FastFace: 5e-5; a short run's loss falls faster
    knob(FastFaceRecurrence, "patience", Uniform(0.02, 0.2)),  # τ; FastFace: 0.05
    knob(FastFaceRecurrence, "delta", Uniform(1.5, 4.0)),  # FastFace: 2
    LR,
)
HAAR = (
    knob(FastFaceHaar, "window", LogUniform(0.005, 0.05)),  # FastFace: 0.015
    knob(FastFaceHaar, "threshold", LogUniform(0.01, 0.2)),  # FastFace: 0.06
    LR,
)
