"""F2C's class pool: it holds Q classes and evicts the least recently used one.

Wang et al., "An Efficient Training Approach for Very Large Scale Face Recognition", CVPR 2022;
docs/methods/baselines.md.

A class has two layers of centres, which are written in turn. The loss reads layer 0 and the layer that was written
last. The pool therefore stores these two views instead of both layers.

Legend: B faces of a rank, G faces of all ranks, D embedding, Q slots.
"""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fr_core import rng
from fr_core.device import integers_from_host
from fr_core.heads.head import Head
from fr_core.heads.streamed import Softmax, fixed_centres_softmax, random_centres

HARD_SHARE, HARD_FEWEST, HARD_MOST = 2e-4, 3, 10  # number of centres that push a face whose class is not in the pool


class Slot(NamedTuple):
    """The place of a class in the pool."""

    place: int
    latest: int = 0  # layer that was written last


class Overwritten(NamedTuple):
    """What :meth:`ClassPool.write` overwrote: the slots of all classes, and places with their centres in each view."""

    slots: OrderedDict[int, Slot]
    views: list[tuple[Tensor, Tensor, Tensor]]  # view [Q, D], places [P] and centres [P, D]


class ClassPool(Head):
    """Two views of Q unit centres, and the slot of each class. All ranks hold the same pool."""

    too_large = ("first_QD", "latest_QD")
    first_QD: Tensor
    latest_QD: Tensor

    def __init__(self, slots: int, embedding: int, softmax: Softmax, seed: int) -> None:
        super().__init__()
        self.softmax = softmax
        centres_QD = random_centres(slots, embedding, softmax.precision, rng.torch_seed(seed, "class pool"))
        self.register_buffer("first_QD", centres_QD)
        self.register_buffer("latest_QD", centres_QD.clone())
        self.slots: OrderedDict[int, Slot] = OrderedDict()  # by label, least recently used first
        self.overwritten: Overwritten | None = None

    def begin_step(self) -> None:
        """Forget what the last step overwrote."""
        super().begin_step()
        self.overwritten = None

    @torch.no_grad()
    def write(self, centres_GD: Tensor, labels_G: Tensor) -> None:
        """Write the centres of a batch, one face after another.

        A new class takes a free slot, or the slot of the least recently used class, and writes layer 0. A class that is
        in the pool writes the other layer of its slot. Each face writes, also when a label repeats.

        The host deals out the slots before it knows whether the step is good, so a dropped step keeps its centres: no
        gradient made them. A number that is not finite becomes 0.

        Args:
            labels_G: int64, on the host.
        """
        slots = self.slots.copy()
        first: dict[int, int] = {}  # slot -> the last face that writes it
        latest: dict[int, int] = {}
        for face, label in enumerate(labels_G.tolist()):
            slot = self.slots.pop(label, None)
            if slot is not None:
                slot = Slot(slot.place, 1 - slot.latest)
            elif len(self.slots) < len(self.first_QD):
                slot = Slot(len(self.slots))
            else:
                slot = Slot(self.slots.popitem(last=False)[1].place)
            self.slots[label] = slot
            latest[slot.place] = face
            if slot.latest == 0:
                first[slot.place] = face
        centres_GD = centres_GD.to(self.first_QD.dtype).nan_to_num(0, 0, 0)
        views = []
        for view_QD, written in ((self.first_QD, first), (self.latest_QD, latest)):
            places, faces = integers_from_host([[*written], [*written.values()]], centres_GD.device)
            views.append((view_QD, places, view_QD[places]))
            view_QD[places] = centres_GD[faces]
        self.overwritten = Overwritten(slots, views)

    @torch.no_grad()
    def roll_back(self) -> None:
        """Undo the last :meth:`write` of this step, if there was one."""
        if self.overwritten:
            self.slots = self.overwritten.slots
            for view_QD, places, centres_PD in self.overwritten.views:
                view_QD[places] = centres_PD
        self.overwritten = None

    def forward(self, x_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Return the mean loss over the faces, summed over the two views.

        A face whose class is in the pool has a cross-entropy. For any other face, the loss is the mean positive cosine
        to its nearest centres.

        Args:
            x_BD: embeddings of this rank, not normalised.
            labels_B: int64, on the host.
        """
        with torch.autocast(x_BD.device.type, enabled=False):
            unit_BD = F.normalize(x_BD.float())
            slots = [self.slots.get(label) for label in labels_B.tolist()]
            places, known, other = integers_from_host(
                [
                    [slot.place for slot in slots if slot],
                    [i for i, slot in enumerate(slots) if slot],
                    [i for i, slot in enumerate(slots) if not slot],
                ],
                x_BD.device,
            )
            total = unit_BD.new_zeros(())
            for centres_QD in (self.first_QD, self.latest_QD):
                if len(known):
                    positive_KD = centres_QD[places].float()
                    loss = fixed_centres_softmax(unit_BD[known], positive_KD, centres_QD, places, None, self.softmax)
                    total = total + loss * (len(known) / len(labels_B))
                if len(other):
                    total = total + self._push(unit_BD[other], centres_QD) * (len(other) / len(labels_B))
            return total

    @staticmethod
    def _push(unit_UD: Tensor, centres_QD: Tensor) -> Tensor:
        hardest = min(max(int(HARD_SHARE * len(centres_QD)), HARD_FEWEST), HARD_MOST, len(centres_QD))
        with torch.no_grad():  # the pool changes before the backward pass: keep a copy of the nearest centres only
            near_UH = (unit_UD @ centres_QD.float().T).topk(hardest).indices
            near_UHD = centres_QD[near_UH].float()
        return torch.einsum("ud,uhd->uh", unit_UD, near_UHD).clamp_min(0).mean()

    def get_extra_state(self) -> Tensor:
        """Return label, place and latest layer of each class in the order of use: int64 [classes, 3]."""
        rows = [(label, slot.place, slot.latest) for label, slot in self.slots.items()]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the slots from what :meth:`get_extra_state` returned."""
        self.slots = OrderedDict((label, Slot(place, latest)) for label, place, latest in state.tolist())
