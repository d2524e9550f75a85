"""Virtual FC's anchors: M of them for N identities (METHODS §3; Li et al., "Virtual Fully-Connected Layer", 2021).

Identity l belongs to group l mod M. The identities of a batch take over anchors: the first of each group, in the order
of labels, that of its group, which keeps the new value; any further one the lowest anchor that nobody in the batch
holds, which gets its old value back after the step.

Legend: B faces of a rank, G faces of all ranks, D embedding, M anchors, I identities of the batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fr_core import rng
from fr_core.errors import UserError
from fr_core.heads.head import Head
from fr_core.heads.streamed import Softmax, fixed_centres_softmax, random_centres


class Taken(NamedTuple):
    """The anchors of a batch's identities, which of them are borrowed, and their values before."""

    anchors_I: Tensor
    borrowed_I: Tensor
    before_ID: Tensor


class Anchors(Head):
    """M centres of length 1, the same on every rank."""

    too_large = ("anchors_MD",)
    anchors_MD: Tensor

    def __init__(self, anchors: int, embedding: int, softmax: Softmax, seed: int) -> None:
        super().__init__()
        self.softmax = softmax
        first = rng.torch_seed(seed, "anchors")
        self.register_buffer("anchors_MD", random_centres(anchors, embedding, softmax.precision, first))
        self.taken: Taken | None = None

    def begin_step(self) -> None:
        super().begin_step()
        self.taken = None

    def forward(self, x_BD: Tensor, labels_B: Tensor, x_GD: Tensor, labels_G: Tensor) -> Tensor:
        """Mean cross-entropy of a rank's faces over all anchors, after the batch's identities took theirs. Once a step.

        Args:
            x_BD: this rank's embeddings, not normalised.
            x_GD: all ranks' embeddings. An anchor becomes the sum of those of its identity at length 1 (the paper's
                are not normalised first), so that each face counts alike. No gradient passes.

        Raises:
            UserError: more identities in a batch than anchors.
        """
        with torch.autocast(x_BD.device.type, enabled=False):
            unit_BD = F.normalize(x_BD.float())
            labels_I, identity_G = labels_G.unique(return_inverse=True)
            taken_I, borrowed_I = self.take(labels_I)
            member_IG = (torch.arange(len(labels_I), device=x_GD.device)[:, None] == identity_G).float()
            centres_ID = F.normalize(member_IG @ F.normalize(x_GD.detach().float()))  # in one order on all ranks
            before_ID = self.anchors_MD[taken_I]
            self.anchors_MD[taken_I] = centres_ID.to(self.anchors_MD.dtype)
            own_B = torch.searchsorted(labels_I, labels_B)
            column_P, face_P = taken_I[own_B].sort()
            loss = fixed_centres_softmax(unit_BD, centres_ID[own_B], self.anchors_MD, (face_P, column_P), self.softmax)
            self.taken = Taken(taken_I, borrowed_I, before_ID)
            return loss

    @torch.no_grad()
    def give_back(self) -> None:
        """Gives borrowed anchors their old values, at the end of a step."""
        if self.taken:
            anchors_I, borrowed_I, before_ID = self.taken
            self.anchors_MD[anchors_I[borrowed_I]] = before_ID[borrowed_I]
        self.taken = None

    @torch.no_grad()
    def drop_step(self) -> None:
        super().drop_step()
        if self.taken:
            self.anchors_MD[self.taken.anchors_I] = self.taken.before_ID
        self.taken = None

    def take(self, labels_I: Tensor) -> tuple[Tensor, Tensor]:
        """The anchor of each identity, and which of them are borrowed for this step only.

        Args:
            labels_I: sorted, without repeats.

        Returns:
            int64 [I] and bool [I].

        Raises:
            UserError: more identities than anchors.
        """
        size = len(self.anchors_MD)
        if len(labels_I) > size:
            raise UserError(f"method.anchors = {size} is less than the {len(labels_I)} identities of a batch: raise it")
        group_I = labels_I % size
        order_I = group_I.argsort(stable=True)
        repeats_I = torch.zeros_like(group_I, dtype=torch.bool)
        repeats_I[order_I[1:]] = group_I[order_I].diff() == 0
        free_M = torch.ones(size, dtype=torch.bool, device=labels_I.device)
        free_M[group_I] = False
        anchor_I = group_I.clone()
        anchor_I[repeats_I] = free_M.nonzero()[: int(repeats_I.sum()), 0]
        return anchor_I, repeats_I
