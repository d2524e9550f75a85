"""Sections of the optimiser and of the learning-rate schedule."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fr_core.config.sections import NonNegative, Positive, Probability, Section


class ClassMatrix(Section):
    """How the class matrix moves: by SGD with momentum, whatever moves the backbone. None: as the backbone."""

    lr: Positive | None = None  # to be given beside LARS and AdamW, whose rates mean something else
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None  # None beside AdamW: 0.9
    weight_decay: NonNegative | None = None  # None beside AdamW, whose decay means something else: 5e-4


class Optimizer(Section):
    lr: Positive = 0.1
    weight_decay: NonNegative = 5e-4
    clip: Positive | None = 5.0  # largest norm of the backbone's gradient
    reference_batch: Annotated[int, Field(ge=1)] | None = None  # lr is meant for it: × global_batch / reference_batch
    shard_state: bool = False  # the backbone's optimiser state over the ranks (ZeRO, stage 1)
    head: ClassMatrix = ClassMatrix()

    @property
    def head_rate_unknown(self) -> bool:
        """Whether ``lr`` means something else than SGD's rate, and nothing says at which the class matrix moves."""
        return False


class SGD(Optimizer):
    kind: Literal["sgd"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    decay_all: bool = True  # False: norm layers and biases do not decay


class LARS(Optimizer):
    """Layer-wise rates for large batches (You et al., 2017); norm layers and biases neither adapt nor decay."""

    kind: Literal["lars"] = "lars"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    trust: Positive = 1e-3

    @property
    def head_rate_unknown(self) -> bool:
        return self.head.lr is None


class AdamW(Optimizer):
    """Norm layers and biases do not decay."""

    kind: Literal["adamw"] = "adamw"
    lr: Positive = 1e-3
    weight_decay: NonNegative = 0.05
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999

    @property
    def head_rate_unknown(self) -> bool:
        return self.head.lr is None


class Plain(Section):
    """SGD beside Muon."""

    lr: Positive = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 5e-4


class Muon(Optimizer):
    """Orthogonal steps for matrices and convolutions (Jordan et al., 2024); the rest and the class matrix: ``sgd``."""

    kind: Literal["muon"] = "muon"
    lr: Positive = 0.02
    weight_decay: NonNegative = 0.01  # of lr, as AdamW's
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    sgd: Plain = Plain()


Optim = Annotated[SGD | LARS | AdamW | Muon, Field(discriminator="kind")]


class Warmup(Section):
    warmup_epochs: NonNegative = 0.0  # linear from 0

    @property
    def watches_loss(self) -> bool:
        """Whether the loss decides, so that the schedule has a state; the others are functions of the step."""
        return False


class Constant(Warmup):
    kind: Literal["constant"] = "constant"


class Cosine(Warmup):
    kind: Literal["cosine"] = "cosine"
    final_ratio: Probability = 0.0  # of the base rate, where the last step ends


class Polynomial(Warmup):
    kind: Literal["polynomial"] = "polynomial"
    power: Positive = 2.0


class MultiStep(Warmup):
    kind: Literal["multistep"] = "multistep"
    milestones: tuple[Positive, ...]  # epochs
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _rising(self) -> "MultiStep":
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("milestones must rise")
        return self


class FastFace(Warmup):
    """The loss decides (METHODS §4): the recurrence of the published code."""

    kind: Literal["fastface"] = "fastface"
    alpha: Annotated[float, Field(gt=0, lt=1)] = 1e-3  # rates of the two moving averages
    beta: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    threshold: Positive = 5e-5  # λ: a loss that falls by less a step is stationary
    patience: Annotated[float, Field(gt=0, lt=1)] = 0.05  # τ: stationary share of all steps before a cut
    delta: Annotated[float, Field(gt=1)] = 2.0  # the rate is divided by it
    max_cuts: Annotated[int, Field(ge=1)] = 8
    start: Literal["published", "consistent"] = "published"
    reference_batch: Annotated[int, Field(ge=1)] | None = None  # alpha, beta, threshold hold for it and are scaled

    @property
    def watches_loss(self) -> bool:
        return True


class FastFaceHaar(Warmup):
    """The loss decides: the window form, which also raises the rate again."""

    kind: Literal["fastface_haar"] = "fastface_haar"
    m: Annotated[int, Field(ge=2)] | None = None  # steps; None: window
    window: Annotated[float, Field(gt=0, lt=1)] = 0.015  # m as a share of all steps
    threshold: Positive = 0.06

    @property
    def watches_loss(self) -> bool:
        return True


Schedule = Annotated[Constant | Cosine | Polynomial | MultiStep | FastFace | FastFaceHaar, Field(discriminator="kind")]


def steps_of_epochs(epochs: float, steps_per_epoch: int) -> int:
    """Whole steps nearest below a number of epochs."""
    return math.floor(epochs * steps_per_epoch + 1e-9)
