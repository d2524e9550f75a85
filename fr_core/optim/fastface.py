"""FastFace: the loss decides the learning rate (METHODS §4). The one stateful schedule.

Both forms smooth the loss, measure how fast it falls, call a step stationary where it hardly does, and cut the rate
after a stretch of stationary steps. They differ in this:

===================  =================================  ==========================================================
                     Recurrence (the published code)    HaarWindow (the published training log)
===================  =================================  ==========================================================
smoothing            two EMAs, of rates α and β         mean of m losses, then halves of a window of m such means
detector             D: the fall per step               h: older half minus newer half, over m
stationary           D < λ                              h < threshold
stretch              ⌊τ·T⌋ steps                        2m steps
after a stretch      rate / δ, ``max_cuts`` times       rate / 2; instead of a fourth cut in a row, rate × 4
a step that falls    ends the stretch                   ends the stretch and the row of cuts
starts               with the second step               after 2m steps
state                six numbers                        2m numbers; running sums make a step O(1)
===================  =================================  ==========================================================

All ranks must feed the same loss, the global batch's, or their rates drift apart. State is float64 (Python's floats):
in float32 the recurrence's double pole loses a fifth of D within 50,000 steps.
"""

from array import array
from typing import Any, assert_never

from fr_core.config.optim import Constant, Cosine, FastFace, FastFaceHaar, MultiStep, Polynomial, Schedule
from fr_core.errors import UserError

CUTS_IN_A_ROW = 3  # of HaarWindow, before the rate is raised instead


class Recurrence:
    """D_t = (2−α−β)·D_{t−1} − (1−α)(1−β)·D_{t−2} + αβ·(L_{t−1} − L_t), with D_1 = α(L_0 − L_1).

    ``start = "published"`` sets D_0 = 0, which overshoots at first; ``"consistent"`` sets D_0 = D_1, and D is then
    exactly the EMA of the EMA of the loss's falls.

    Attributes:
        factor: of the base rate, for the next step.
        detector: D.
        count: stationary steps in a row.
        cuts: so far.

    Raises:
        UserError: a run so short that ⌊τ·T⌋ = 0, when every stationary step would cut the rate; or a batch so large
            that α or β would pass 1.
    """

    STATE = ("factor", "detector", "before", "loss", "steps", "count", "cuts")

    def __init__(self, config: FastFace, total_steps: int, global_batch: int) -> None:
        ratio = global_batch / config.reference_batch if config.reference_batch else 1.0
        self.alpha, self.beta, self.threshold = config.alpha * ratio, config.beta * ratio, config.threshold * ratio
        if max(self.alpha, self.beta) >= 1:
            raise UserError(f"schedule.reference_batch = {config.reference_batch}: alpha or beta would pass 1")
        self.config, self.patience = config, int(total_steps * config.patience)
        if self.patience == 0:
            raise UserError(f"schedule.patience = {config.patience} of {total_steps} steps is not one: raise it")
        self.factor, self.detector, self.before, self.loss = 1.0, 0.0, 0.0, 0.0
        self.steps = self.count = self.cuts = 0

    def observe(self, loss: float) -> None:
        """Takes the loss of the step just done; ``factor`` is then that of the next step. A loss that is not finite
        must not come here: that step was dropped.
        """
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
        if self.detector >= self.threshold:
            self.count = 0
        elif self.count < self.patience:
            self.count += 1
        else:
            self.count = 0
            if self.cuts < self.config.max_cuts:
                self.cuts += 1
                self.factor /= self.config.delta

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready; a run that resumes with another length keeps its rate and its stretch under the new patience."""
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.STATE:
            setattr(self, name, state[name])


class HaarWindow:
    """A_t = mean of the last m losses; h_t = (sum of the older ⌊m/2⌋ of the last m A's − that of the newer)/m.

    Attributes: as those of :class:`Recurrence`, ``detector`` being h; ``cuts`` are those in a row.

    Raises:
        UserError: a run too short for a single decision.
    """

    STATE = ("m", "factor", "detector", "steps", "count", "cuts", "sum", "older", "newer")
    RINGS = ("losses", "means")

    def __init__(self, config: FastFaceHaar, total_steps: int) -> None:
        self.config, self.m = config, config.m or int(total_steps * config.window)
        if self.m < 2:
            raise UserError(f"schedule.window = {config.window} of {total_steps} steps is less than 2: raise it, or m")
        self.factor, self.detector = 1.0, 0.0
        self.steps = self.count = self.cuts = 0
        self.losses, self.means = array("d", bytes(8 * self.m)), array("d", bytes(8 * self.m))  # rings
        self.sum = self.older = self.newer = 0.0

    def observe(self, loss: float) -> None:
        """As :meth:`Recurrence.observe`."""
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
        """JSON-ready; the window keeps the length it began with."""
        return {name: getattr(self, name) for name in self.STATE} | {n: getattr(self, n).tolist() for n in self.RINGS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.STATE:
            setattr(self, name, state[name])
        for name in self.RINGS:
            setattr(self, name, array("d", state[name]))


def watcher(schedule: Schedule, total_steps: int, global_batch: int) -> Recurrence | HaarWindow | None:
    """What watches the loss for this schedule; None for schedules that are functions of the step."""
    match schedule:
        case FastFace():
            return Recurrence(schedule, total_steps, global_batch)
        case FastFaceHaar():
            return HaarWindow(schedule, total_steps)
        case Constant() | Cosine() | Polynomial() | MultiStep():
            return None
        case _ as unknown:
            assert_never(unknown)
