"""FastFace (TCSVT 2025; docs/methods/fastface.md): the loss decides the learning rate. No other schedule has a state.

All forms smooth the loss and measure how fast it falls. A step is stationary if the loss hardly falls. After a stretch
of stationary steps, the rate is cut. A step that is not stationary ends the stretch.

:class:`RunWindow` measures against the run itself, so its settings fit runs of any length and losses of any scale:

- Smoothing: the means of two neighbouring windows of w losses.
- Detector: the fall between them, over the run's mean fall in as many steps. A step is stationary if it is below κ.
- A stretch is ⌊τ·T⌋ steps of T. After it the rate is divided by δ, at most ``max_cuts`` times.
- It decides after 2w steps. Its state is 2w numbers and a few sums, so a step costs O(1).
- Its tail is a function of the step alone (``fr_core/optim/schedules.py``).

:class:`Recurrence` is the published code:

- Smoothing: two exponential moving averages (EMAs), with rates α and β.
- Detector: D, the fall of the loss per step. A step is stationary if D < λ.
- A stretch and a cut are as above.
- It decides from the second step on. Its state is seven numbers.

:class:`HaarWindow` reproduces the published training log:

- Smoothing: the mean of m losses, and then the two halves of a window of m such means.
- Detector: h, the older half minus the newer half, over m. A step is stationary if h < threshold.
- A stretch is 2m steps. After it the rate is halved; instead of a fourth cut in a row, it rises by a factor of 4.
- A step that is not stationary also ends the row of cuts.
- It decides after 2m steps. Its state is 2m numbers and a few running sums, so a step costs O(1).

No form sees the losses of the warm-up: T counts the steps after it. All ranks must pass the same loss, that of the
global batch. Otherwise their rates drift apart. The state is float64 (Python floats): in float32, the recurrence's
double pole loses a fifth of D within 50,000 steps.
"""

import math
from array import array
from typing import Any, Protocol, assert_never

from fr_core.config.optim import (
    Constant,
    Cosine,
    CutRate,
    FastFace,
    FastFaceHaar,
    FastFaceRecurrence,
    MultiStep,
    Polynomial,
    Schedule,
)
from fr_core.errors import UserError

CUTS_IN_A_ROW = 3  # HaarWindow raises the rate instead of a further cut
# Recurrence forgets its start in some 5/α steps. With fewer than α·T = 5 it judges nothing else; the published start
# overshoots that long, and 50 leave it a tenth of the run.
LEAST_SPAN = {"consistent": 5, "published": 50}


class FastFaceWatcher(Protocol):
    """Watches the loss of a run and decides the factor of its learning rate."""

    factor: float
    """Factor of the base rate for the next step."""
    detector: float
    """How fast the loss falls, as this form measures it."""
    count: int
    """Stationary steps in a row."""
    cuts: int
    """Cuts so far; of :class:`HaarWindow`, cuts in a row."""

    def observe(self, loss: float) -> None:
        """Take the loss of the last step, and set ``factor`` for the next step.

        Do not pass a loss that is not finite: its step was dropped.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state, ready for JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        ...


class Stretch:
    """The cuts of :class:`RunWindow` and :class:`Recurrence`: more than ⌊τ·T⌋ stationary steps in a row cut the rate.

    Raises:
        UserError: ⌊τ·T⌋ = 0, so that every stationary step would cut the rate.
    """

    def __init__(self, config: CutRate, steps: int) -> None:
        self.delta, self.max_cuts, self.patience = config.delta, config.max_cuts, int(steps * config.patience)
        if self.patience == 0:
            raise UserError(
                f"schedule.patience = {config.patience} of {steps} steps after the warm-up is less than 1 step: "
                "raise schedule.patience, or train longer"
            )
        self.factor, self.count, self.cuts = 1.0, 0, 0

    def judge(self, stationary: bool) -> None:
        """Count a stationary step, cut the rate after a stretch of them, or end the stretch."""
        if not stationary:
            self.count = 0
        elif self.count < self.patience:
            self.count += 1
        else:
            self.count = 0
            if self.cuts < self.max_cuts:
                self.cuts += 1
                self.factor /= self.delta


class RunWindow(Stretch):
    """detector_t = (older − newer) / (w · (first − newer) / (t − w)); older, newer and first are means of w losses.

    ``newer`` is the mean of the last w losses, ``older`` of the w before, and ``first`` of the run's first w. So the
    detector is 1 while the loss falls evenly, and a·L + b with a > 0 gives the same detector as L. While the loss is
    not below its start, any fall counts as fast and a rise as stationary.

    Raises:
        UserError: the window or the stretch is too short for this run.
    """

    STATE = ("factor", "detector", "steps", "count", "cuts", "w", "first", "older", "newer")

    def __init__(self, config: FastFace, steps: int) -> None:
        self.config, self.w = config, int(steps * config.window)
        if self.w < 2:
            raise UserError(
                f"schedule.window = {config.window} of {steps} steps after the warm-up is less than 2 steps: "
                "raise schedule.window, or train longer"
            )
        super().__init__(config, steps)
        self.detector, self.steps = 1.0, 0
        self.losses = array("d", bytes(16 * self.w))  # a ring buffer of 2w losses
        self.first = self.older = self.newer = 0.0  # sums of w losses

    def observe(self, loss: float) -> None:
        """Take the loss of the last step, as :class:`FastFaceWatcher` says."""
        w, at = self.w, self.steps % (2 * self.w)
        middle = self.losses[at - w]  # leaves the newer window for the older one
        self.older += middle - self.losses[at]
        self.newer += loss - middle
        self.losses[at] = loss
        self.steps += 1
        if self.steps % (2 * w) == 0:  # O(1) a step, and no rounding error grows old, also that of a huge loss
            self.older, self.newer = math.fsum(self.losses[:w]), math.fsum(self.losses[w:])
        if self.steps == w:
            self.first = self.newer
        if self.steps < 2 * w:
            return
        fall, mean_fall = self.older - self.newer, (self.first - self.newer) * w / (self.steps - w)
        self.detector = fall / mean_fall if mean_fall > 0 else float(fall > 0)
        self.judge(self.detector < self.config.slope)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, ready for JSON. A run resumed with another length keeps its windows."""
        return {name: getattr(self, name) for name in self.STATE} | {"losses": self.losses.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        for name in self.STATE:
            setattr(self, name, state[name])
        self.losses = array("d", state["losses"])


class Recurrence(Stretch):
    """D_t = (2−α−β)·D_{t−1} − (1−α)(1−β)·D_{t−2} + αβ·(L_{t−1} − L_t), with D_1 = α(L_0 − L_1).

    ``start = "published"`` sets D_0 = 0, which overshoots at first. ``"consistent"`` sets D_0 = D_1. D is then exactly
    the EMA of the EMA of the falls of the loss.

    Raises:
        UserError: the run is so short that ⌊τ·T⌋ = 0, so that every stationary step would cut the rate. Or it is too
            short for the averages. Or the batch is so large that the scaled α or β reaches 1.
    """

    STATE = ("factor", "detector", "before", "loss", "steps", "count", "cuts")

    def __init__(self, config: FastFaceRecurrence, steps: int, global_batch: int) -> None:
        ratio = global_batch / config.reference_batch if config.reference_batch else 1.0
        self.alpha, self.beta, self.threshold = config.alpha * ratio, config.beta * ratio, config.threshold * ratio
        if max(self.alpha, self.beta) >= 1:
            raise UserError(
                f"schedule.reference_batch = {config.reference_batch}: a batch of {global_batch} scales schedule.alpha "
                f"to {self.alpha:g} and schedule.beta to {self.beta:g}, both must stay below 1: "
                "raise schedule.reference_batch"
            )
        super().__init__(config, steps)
        self.config = config
        name, rate = min(("alpha", self.alpha), ("beta", self.beta), key=lambda pair: pair[1])
        if steps * rate < LEAST_SPAN[config.start]:
            longer = LEAST_SPAN[config.start] / steps
            raise UserError(
                f"schedule.{name} = {rate:g} averages over {1 / rate:,.0f} steps, too many for {steps:,} steps after "
                f'the warm-up with schedule.start = "{config.start}": raise it to {longer:.2g}, or use '
                'schedule.kind = "fastface"'
            )
        self.detector, self.before, self.loss, self.steps = 0.0, 0.0, 0.0, 0

    def observe(self, loss: float) -> None:
        """Take the loss of the last step, as :class:`FastFaceWatcher` says."""
        fall, self.loss, self.steps = self.loss - loss, loss, self.steps + 1
        if self.steps == 1:
            return
        if self.steps == 2:
            self.detector = self.alpha * fall
            self.before = 0.0 if self.config.start == "published" else self.detector
        else:
            a, b = self.alpha, self.beta
            now = (2 - a - b) * self.detector - (1 - a) * (1 - b) * self.before + a * b * fall
            self.before, self.detector = self.detector, now
        self.judge(self.detector < self.threshold)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, ready for JSON. A run resumed with another length keeps its rate and its stretch."""
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        for name in self.STATE:
            setattr(self, name, state[name])


class HaarWindow:
    """h_t = (sum of the older half − sum of the newer half of the last m means A) / m.

    A_t is the mean of the last m losses, and a half has ⌊m/2⌋ means.

    Raises:
        UserError: the window is shorter than two steps, or so long that the run ends before its first change.
    """

    STATE = ("m", "factor", "detector", "steps", "count", "cuts", "sum", "older", "newer")
    RINGS = ("losses", "means")

    def __init__(self, config: FastFaceHaar, steps: int) -> None:
        self.config, self.m = config, config.m or int(steps * config.window)
        if self.m < 2:
            raise UserError(
                f"schedule.window = {config.window} of {steps} steps after the warm-up is less than 2 steps: "
                "raise schedule.window, or give schedule.m"
            )
        if steps <= 4 * self.m:
            given = f"m = {config.m}" if config.m else f"window = {config.window}"
            raise UserError(
                f"schedule.{given} changes the rate after {4 * self.m:,} steps at the earliest, and the run has "
                f"{steps:,} steps after the warm-up: lower it"
            )
        self.factor, self.detector = 1.0, 0.0
        self.steps = self.count = self.cuts = 0
        self.losses, self.means = array("d", bytes(8 * self.m)), array("d", bytes(8 * self.m))  # ring buffers
        self.sum = self.older = self.newer = 0.0

    def observe(self, loss: float) -> None:
        """Take the loss of the last step, as :class:`FastFaceWatcher` says."""
        m, half, at = self.m, self.m // 2, self.steps % self.m
        self.sum += loss - self.losses[at]
        self.losses[at] = loss
        self.steps += 1
        if self.steps < m:
            return
        passed = self.means[(at - half) % m]  # leaves the newer half
        self.newer += self.sum / m - passed
        self.older += self.means[(at - m + half) % m] - self.means[at]
        self.means[at] = self.sum / m
        if self.steps < 2 * m:
            return
        self.detector = (self.older - self.newer) / m
        if self.detector >= self.config.threshold:
            self.count = self.cuts = 0
            return
        self.count += 1
        if self.count > 2 * m:
            self.count = 0
            self.cuts = (self.cuts + 1) % (CUTS_IN_A_ROW + 1)
            self.factor *= 0.5 if self.cuts else 4

    def state_dict(self) -> dict[str, Any]:
        """Return the state, ready for JSON. A resumed run keeps the window length that it began with."""
        return {name: getattr(self, name) for name in self.STATE} | {n: getattr(self, n).tolist() for n in self.RINGS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        for name in self.STATE:
            setattr(self, name, state[name])
        for name in self.RINGS:
            setattr(self, name, array("d", state[name]))


def watcher(schedule: Schedule, steps: int, global_batch: int) -> FastFaceWatcher | None:
    """Return the object that watches the loss for this schedule; None if the schedule is a function of the step.

    Args:
        steps: steps of the run after its warm-up.
    """
    match schedule:
        case FastFace():
            return RunWindow(schedule, steps)
        case FastFaceRecurrence():
            return Recurrence(schedule, steps, global_batch)
        case FastFaceHaar():
            return HaarWindow(schedule, steps)
        case Constant() | Cosine() | Polynomial() | MultiStep():
            return None
        case _ as unknown:
            assert_never(unknown)
