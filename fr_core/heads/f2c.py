"""F2C's class pool: Q classes, the least recently used leaves first (METHODS §3; Wang et al., "An Efficient Training
Approach for Very Large Scale Face Recognition").

A class has two layers of centres, written in turn. The loss reads them in two ways only: layer 0, and whichever layer
was written last; so these two are what is kept.

Legend: B faces of a rank, G faces of all ranks, D embedding, Q slots.
"""

from collections import OrderedDict
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fr_core import rng
from fr_core.heads.head import Head
from fr_core.heads.streamed import Softmax, fixed_centres_softmax, random_centres

T = TypeVar("T")
HARD_SHARE, HARD_FEWEST, HARD_MOST = 2e-4, 3, 10  # centres that a face without a class is pushed away from


class Slot(NamedTuple):
    place: int
    latest: int = 0  # the layer that was written last


class Before(NamedTuple):
    """What :meth:`ClassPool.put` wrote over: who held which slot, and of both layers places and their centres."""

    slots: OrderedDict[int, Slot]
    first: tuple[list[int], Tensor]
    latest: tuple[list[int], Tensor]


class ClassPool(Head):
    """Two layers of Q centres of length 1, and which class holds which slot: the same on every rank."""

    too_large = ("first_QD", "latest_QD")
    first_QD: Tensor
    latest_QD: Tensor

    def __init__(self, slots: int, embedding: int, softmax: Softmax, seed: int) -> None:
        super().__init__()
        self.softmax = softmax
        centres_QD = random_centres(slots, embedding, softmax.precision, rng.torch_seed(seed, "class pool"))
        self.register_buffer("first_QD", centres_QD)
        self.register_buffer("latest_QD", centres_QD.clone())
        self.slots: OrderedDict[int, Slot] = OrderedDict()  # by label, the least recently used first
        self.before: Before | None = None

    def begin_step(self) -> None:
        super().begin_step()
        self.before = None

    @torch.no_grad()
    def put(self, centres_GD: Tensor, labels_G: Tensor) -> None:
        """Writes faces one after another: a new class takes a free slot or that of the least recently used class
        (layer 0), a known one its slot's other layer. Of faces with one label in a row, each writes.
        """
        slots = self.slots.copy()
        first: dict[int, int] = {}  # slot -> the face whose centre it ends up with
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
        held = [(list(written), layer[list(written)]) for layer, written in self._layers(first, latest)]
        for layer_QD, written in self._layers(first, latest):
            layer_QD[list(written)] = centres_GD[list(written.values())].to(layer_QD.dtype)
        self.before = Before(slots, *held)

    @torch.no_grad()
    def take_back(self) -> None:
        """The pool before the last :meth:`put` of this step, if there was one."""
        if self.before:
            self.slots = self.before.slots
            for layer_QD, (places, centres_PD) in self._layers(self.before.first, self.before.latest):
                layer_QD[places] = centres_PD
        self.before = None

    def drop_step(self) -> None:
        super().drop_step()
        self.take_back()

    def _layers(self, first: T, latest: T) -> list[tuple[Tensor, T]]:
        return [(self.first_QD, first), (self.latest_QD, latest)]

    def forward(self, x_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Sum of the two layers' mean losses: cross-entropy for faces whose class is in the pool, and for the others
        the mean of their nearest centres' positive cosines.
        """
        with torch.autocast(x_BD.device.type, enabled=False):
            unit_BD = F.normalize(x_BD.float())
            slots = [self.slots.get(label) for label in labels_B.tolist()]
            known = torch.tensor([i for i, slot in enumerate(slots) if slot], dtype=torch.int64)
            places = torch.tensor([slot.place for slot in slots if slot], dtype=torch.int64)
            other = torch.tensor([i for i, slot in enumerate(slots) if not slot], dtype=torch.int64)
            known, places, other = (x.to(x_BD.device) for x in (known, places, other))
            column_P, face_P = places.sort()
            total = unit_BD.new_zeros(())
            for centres_QD in (self.first_QD, self.latest_QD):
                if len(known):
                    positive_KD = centres_QD[places].float()
                    loss = fixed_centres_softmax(
                        unit_BD[known], positive_KD, centres_QD, (face_P, column_P), self.softmax
                    )
                    total = total + loss * (len(known) / len(labels_B))
                if len(other):
                    total = total + self._push(unit_BD[other], centres_QD) * (len(other) / len(labels_B))
            return total

    @staticmethod
    def _push(unit_UD: Tensor, centres_QD: Tensor) -> Tensor:
        hardest = min(max(int(HARD_SHARE * len(centres_QD)), HARD_FEWEST), HARD_MOST, len(centres_QD))
        with torch.no_grad():  # the pool will be overwritten before the backward pass: keep only what is near
            near_UH = (unit_UD @ centres_QD.float().T).topk(hardest).indices
            near_UHD = centres_QD[near_UH].float()
        return torch.einsum("ud,uhd->uh", unit_UD, near_UHD).clamp_min(0).mean()

    def get_extra_state(self) -> Tensor:
        """Label, place and latest layer of each class in the order of use: int64 [classes, 3], in ``state_dict``."""
        rows = [(label, slot.place, slot.latest) for label, slot in self.slots.items()]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)

    def set_extra_state(self, state: Tensor) -> None:
        self.slots = OrderedDict((label, Slot(place, latest)) for label, place, latest in state.tolist())
