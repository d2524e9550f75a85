"""Sections of the optimiser and of the learning-rate schedule."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fr_core.config.sections import NonNegative, Positive, Probability, Section


class ClassMatrix(Section):
    """SGD with momentum for the class matrix, whatever optimises the backbone."""

    lr: Positive | None = None
    """Learning rate of the class matrix; LARS and AdamW need it, because their rates mean something else. None: the
    backbone's."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Momentum of the class matrix. None: the backbone's, or 0.9 with AdamW."""
    weight_decay: NonNegative | None = None
    """Weight decay of the class matrix. None: the backbone's, or 5e-4 with AdamW."""


class Optimizer(Section):
    """Base of the optimisers' sections."""

    lr: Positive = 0.1
    """Base learning rate of the backbone; the schedule multiplies it."""
    weight_decay: NonNegative = 5e-4
    """Weight decay, added to the gradient (L2)."""
    clip: Positive | None = 5.0
    """Largest norm of the backbone's gradient; a longer gradient is scaled down."""
    reference_batch: Annotated[int, Field(ge=1)] | None = None
    """Batch that lr is meant for: lr is multiplied by global_batch / reference_batch (Goyal et al., 2017). None: lr as
    given."""
    shard_state: bool = False
    """Shard the backbone's optimiser state over the workers (ZeRO stage 1, Rajbhandari et al., 2020)."""
    head: ClassMatrix = ClassMatrix()
    """Optimiser of the class matrix."""

    @property
    def head_rate_unknown(self) -> bool:
        """Return whether the class matrix still needs a rate: the backbone's is no rate of SGD."""
        return False


class SGD(Optimizer):
    """Stochastic gradient descent with momentum."""

    kind: Literal["sgd"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Use Nesterov's momentum."""
    decay_all: bool = True
    """Apply weight decay to norm layers and biases too."""


class LARS(Optimizer):
    """Layer-wise rates for large batches (You et al., 2017). Norm layers and biases neither adapt nor decay."""

    kind: Literal["lars"] = "lars"
    lr: Positive = 0.1  # declared anew, since SGD's rate is no rate of LARS
    """Base learning rate of LARS: a factor of the layer-wise rates; the schedule multiplies it."""
    reference_batch: Annotated[int, Field(ge=1)] | None = None
    """Batch that LARS's lr is meant for: lr is multiplied by global_batch / reference_batch. None: lr as given."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of LARS."""
    trust: Positive = 1e-3
    """Trust coefficient η of the layer-wise rates (You et al., 2017, algorithm 1)."""

    @property
    def head_rate_unknown(self) -> bool:
        """Return whether the class matrix still needs a rate: LARS's rate is no rate of SGD."""
        return self.head.lr is None


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019). Norm layers and biases do not decay."""

    kind: Literal["adamw"] = "adamw"
    lr: Positive = 1e-3
    """Base learning rate of AdamW; the schedule multiplies it."""
    reference_batch: Annotated[int, Field(ge=1)] | None = None
    """Batch that AdamW's lr is meant for: lr is multiplied by global_batch / reference_batch. None: lr as given."""
    weight_decay: NonNegative = 0.05
    """Decoupled weight decay: a step multiplies weights by 1 − lr · weight_decay."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """β1: decay of the mean of gradients."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """β2: decay of the mean of squared gradients."""

    @property
    def head_rate_unknown(self) -> bool:
        """Return whether the class matrix still needs a rate: AdamW's rate is no rate of SGD."""
        return self.head.lr is None


class MuonSGD(Section):
    """SGD beside Muon: for norm layers, biases and the class matrix."""

    lr: Positive = 0.1
    """Base learning rate of the parameters that Muon does not optimise."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of the parameters that Muon does not optimise."""
    weight_decay: NonNegative = 5e-4
    """Weight decay of the parameters that Muon does not optimise, added to the gradient (L2)."""


class Muon(Optimizer):
    """Orthogonalised steps for matrices and convolutions (Jordan et al., 2024). Other parameters follow ``sgd``."""

    kind: Literal["muon"] = "muon"
    lr: Positive = 0.02
    """Base learning rate of Muon; the schedule multiplies it."""
    reference_batch: Annotated[int, Field(ge=1)] | None = None
    """Batch that Muon's lr is meant for: lr is multiplied by global_batch / reference_batch. None: lr as given."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay: a step multiplies weights by 1 − lr · weight_decay."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Momentum of Muon (Jordan et al., 2024)."""
    sgd: MuonSGD = MuonSGD()
    """SGD for norm layers, biases and the class matrix."""


Optim = Annotated[SGD | LARS | AdamW | Muon, Field(discriminator="kind")]


class Warmup(Section):
    """Base of the schedules' sections: each may begin with a warm-up."""

    warmup_epochs: NonNegative = 0.0
    """Epochs in which the rate rises linearly from 0."""

    @property
    def watches_loss(self) -> bool:
        """Return whether the loss decides the rate; such a schedule has a state."""
        return False


class Constant(Warmup):
    """The base rate, for the whole run."""

    kind: Literal["constant"] = "constant"


class Cosine(Warmup):
    """Half a cosine down to ``final_ratio`` of the base rate (Loshchilov & Hutter, 2017)."""

    kind: Literal["cosine"] = "cosine"
    final_ratio: Probability = 0.0
    """Rate at the end of the run, as a share of the base rate."""


class Polynomial(Warmup):
    """(1 − progress)^power of the base rate."""

    kind: Literal["polynomial"] = "polynomial"
    power: Positive = 2.0
    """Exponent of the polynomial; 1 is linear."""


class MultiStep(Warmup):
    """The rate is multiplied by ``factor`` at each milestone."""

    kind: Literal["multistep"] = "multistep"
    milestones: tuple[Positive, ...]
    """Epochs, rising, at which the rate is multiplied by factor."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """What each milestone multiplies the rate by."""

    @model_validator(mode="after")
    def _check_milestones(self) -> "MultiStep":
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("milestones must rise")
        return self


class WatchedLoss(Warmup):
    """Base of the schedules that the loss decides. They see no loss of the warm-up, and begin after it."""

    @property
    def watches_loss(self) -> bool:
        """Return True."""
        return True


class CutRate(WatchedLoss):
    """Base of the schedules that cut the rate after a stretch of stationary steps (FastFace, 2025)."""

    patience: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """τ: consecutive stationary steps before a cut, as a share of the steps after the warm-up (FastFace, 2025)."""
    delta: Annotated[float, Field(gt=1)] = 2.0
    """δ: a cut divides the rate by this number (FastFace, 2025)."""
    max_cuts: Annotated[int, Field(ge=1)] = 8
    """Most cuts of a run (FastFace's published code)."""


class FastFace(CutRate):
    """The loss decides, against its own mean fall in this run (after FastFace, 2025; docs/methods/fastface.md).

    Shares are of the steps after the warm-up. So the rate changes at the same share of a short run and a long one, and
    the scale of the loss does not matter.
    """

    kind: Literal["fastface"] = "fastface"
    window: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Length of each of two windows, whose mean losses are compared, as a share of the run."""
    slope: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """κ: a step is stationary when the loss falls by less than this share of its mean fall in this run."""
    tail: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Last share of the run, in which the rate falls linearly to 0 as well. 0: none, for runs long enough to be cut."""


class FastFaceRecurrence(CutRate):
    """The loss decides: the recurrence of FastFace's published code (FastFace, 2025; docs/methods/fastface.md)."""

    kind: Literal["fastface_recurrence"] = "fastface_recurrence"
    alpha: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    """α: rate of the first moving average, of the loss's falls (FastFace, 2025)."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    """β: rate of the second moving average, of the first one (FastFace, 2025)."""
    threshold: Positive = 5e-5
    """λ: a step is stationary when the averaged loss falls by less (FastFace, 2025)."""
    start: Literal["published", "consistent"] = "consistent"
    """First value of the recurrence. consistent: that of the two moving averages. published: 0, which overshoots at
    first, so that it is only for long runs."""
    reference_batch: Annotated[int, Field(ge=1)] | None = None
    """Batch that alpha, beta and threshold are meant for; other batches scale them. None: as given."""


class FastFaceHaar(WatchedLoss):
    """The loss decides: FastFace's window form, which also raises the rate again (FastFace, 2025)."""

    kind: Literal["fastface_haar"] = "fastface_haar"
    m: Annotated[int, Field(ge=2)] | None = None
    """Steps of the window. None: as window says."""
    window: Annotated[float, Field(gt=0, lt=1)] = 0.015
    """Length of the window, as a share of the steps after the warm-up (FastFace, 2025)."""
    threshold: Positive = 0.06
    """A step is stationary when the older half of the window exceeds the newer half by less (FastFace, 2025)."""


Schedule = Annotated[
    Constant | Cosine | Polynomial | MultiStep | FastFace | FastFaceRecurrence | FastFaceHaar,
    Field(discriminator="kind"),
]


def steps_of_epochs(epochs: float, steps_per_epoch: int) -> int:
    """Return the whole steps in a number of epochs, rounded down."""
    return math.floor(epochs * steps_per_epoch + 1e-9)
