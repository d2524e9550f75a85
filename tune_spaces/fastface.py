"""Search spaces of FastFace's two forms (2025; docs/methods/fastface.md)."""

from fr_core.config.optim import FastFace, FastFaceHaar, Optimizer
from tune_spaces.fields import LogUniform, Uniform, knob

LR = knob(Optimizer, "lr", LogUniform(0.005, 0.2))  # FastFace: 0.02
# FastFace uses 0.001 in runs of 200,000 steps; a run of hundreds of steps needs faster averages.
SPACE = (
    knob(FastFace, "alpha", LogUniform(1e-3, 0.2)),
    knob(FastFace, "beta", LogUniform(1e-3, 0.2)),
    knob(FastFace, "threshold", LogUniform(1e-5, 5e-2)),  # λ; FastFace: 5e-5; a short run's loss falls faster
    knob(FastFace, "patience", Uniform(0.02, 0.2)),  # τ; FastFace: 0.05
    knob(FastFace, "delta", Uniform(1.5, 4.0)),  # FastFace: 2
    LR,
)
HAAR = (
    knob(FastFaceHaar, "window", LogUniform(0.005, 0.05)),  # FastFace: 0.015
    knob(FastFaceHaar, "threshold", LogUniform(0.01, 0.2)),  # FastFace: 0.06
    LR,
)
