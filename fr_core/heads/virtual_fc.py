"""Virtual FC's anchors: M of them represent N identities.

Li et al., "Virtual Fully-Connected Layer: Training a Large-Scale Face Recognition Dataset with Limited Computational
Resources", CVPR 2021; docs/methods/baselines.md.

Identity l belongs to group l mod M, and each group has one anchor. In a step, the first identity of a group (by label)
overwrites the anchor of its group for good. A further identity of the same group borrows the lowest free anchor. A
borrowed anchor gets its old value back after the step.

Legend: B faces of a rank, G faces of all ranks, D embedding, M anchors, I identities of the batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fr_core import rng
from fr_core.device import integers_from_host
from fr_core.errors import UserError
from fr_core.heads.head import Head
from fr_core.heads.streamed import Softmax, fixed_centres_softmax, random_centres


class Assignment(NamedTuple):
    """The anchors of a batch's identities, which of them are borrowed, and their old values."""

    anchors_I: Tensor
    borrowed_I: Tensor
    before_ID: Tensor


class Anchors(Head):
    """M unit centres, the same on every rank."""

    too_large = ("anchors_MD",)
    anchors_MD: Tensor

    def __init__(self, anchors: int, embedding: int, softmax: Softmax, seed: int) -> None:
        super().__init__()
        self.softmax = softmax
        first = rng.torch_seed(seed, "anchors")
        self.register_buffer("anchors_MD", random_centres(anchors, embedding, softmax.precision, first))
        self.assignment: Assignment | None = None

    def begin_step(self) -> None:
        """Forget the assignment of the last step."""
        super().begin_step()
        self.assignment = None

    def forward(self, x_BD: Tensor, labels_B: Tensor, x_GD: Tensor, labels_G: Tensor) -> Tensor:
        """Write the anchors of the batch's identities, and return the mean cross-entropy of this rank's faces.

        Call it once per step. An anchor becomes the normalised sum of its identity's unit embeddings, so that each face
        counts the same. Departure from the Virtual FC paper: there the embeddings are not normalised before the sum.

        Args:
            x_BD: embeddings of this rank, not normalised.
            labels_B: int64, on the host.
            x_GD: embeddings of all ranks; they get no gradient.
            labels_G: int64, on the host.

        Raises:
            UserError: the batch has more identities than there are anchors.
        """
        with torch.autocast(x_BD.device.type, enabled=False):
            unit_BD = F.normalize(x_BD.float())
            labels_I, identity_G = labels_G.unique(return_inverse=True)
            own_B = torch.searchsorted(labels_I, labels_B)
            parts = (*self.assign(labels_I), identity_G, own_B)
            anchors_I, borrowed_I, identity_G, own_B = integers_from_host(parts, x_GD.device)
            member_IG = (torch.arange(len(labels_I), device=x_GD.device)[:, None] == identity_G).float()
            # All ranks sum in the same order, so that their anchors are identical.
            centres_ID = F.normalize(member_IG @ F.normalize(x_GD.detach().float()))
            before_ID = self.anchors_MD[anchors_I]
            self.anchors_MD[anchors_I] = centres_ID.to(self.anchors_MD.dtype)
            given = centres_ID[own_B], self.anchors_MD, anchors_I[own_B], None
            loss = fixed_centres_softmax(unit_BD, *given, self.softmax)
            self.assignment = Assignment(anchors_I, borrowed_I.bool(), before_ID)
            return loss

    @torch.no_grad()
    def end_step(self, good: Tensor) -> None:
        """Restore the buffers and all anchors that this step wrote; after a good step, the borrowed anchors alone."""
        super().end_step(good)
        if self.assignment:
            anchors_I, borrowed_I, before_ID = self.assignment
            stays_I = good & ~borrowed_I
            self.anchors_MD[anchors_I] = torch.where(stays_I[:, None], self.anchors_MD[anchors_I], before_ID)
        self.assignment = None

    def assign(self, labels_I: Tensor) -> tuple[Tensor, Tensor]:
        """Return the anchor of each identity, and whether it is borrowed for this step only.

        Args:
            labels_I: sorted labels without repeats, on the host.

        Returns:
            int64 [I] and bool [I].

        Raises:
            UserError: there are more identities than anchors.
        """
        size = len(self.anchors_MD)
        if len(labels_I) > size:
            raise UserError(f"method.anchors = {size} is less than the {len(labels_I)} identities of a batch: raise it")
        group_I = labels_I % size
        order_I = group_I.argsort(stable=True)
        repeats_I = torch.zeros_like(group_I, dtype=torch.bool)
        repeats_I[order_I[1:]] = group_I[order_I].diff() == 0
        free_M = torch.ones(size, dtype=torch.bool)
        free_M[group_I] = False
        anchor_I = group_I.clone()
        anchor_I[repeats_I] = free_M.nonzero()[: int(repeats_I.sum()), 0]
        return anchor_I, repeats_I
