"""Search space of Ef-QuantFace (2024; docs/methods/quantface.md)."""

from fr_core.config.methods import EKD
from fr_core.config.nets import QuantisedNet
from fr_core.config.optim import Optimizer
from fr_core.config.sections import Train
from tune_spaces.fields import Choice, LogUniform, StepShare, knob

SPACE = (
    knob(EKD, "lambda_pos", LogUniform(2e-3, 0.2)),  # λ1; EKD: 0.02
    knob(EKD, "lambda_neg", LogUniform(1e-3, 0.1)),  # λ2; EKD: 0.01
    knob(QuantisedNet, "weights", Choice((4, 6, 8)), "weight_bits"),  # Ef-QuantFace: 6 and 8
    knob(QuantisedNet, "activations", Choice((4, 6, 8)), "activation_bits"),
    knob(Optimizer, "lr", LogUniform(1e-4, 1e-2)),  # Ef-QuantFace: 1e-3
    knob(
        Train, "max_steps", StepShare(0.25, 1.0), "data_steps"
    ),  # share of the data of one epoch; Ef-QuantFace: 25 to 100 %
)
