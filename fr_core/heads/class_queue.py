"""The queue of class centres that stands for the class matrix in AttFC and DCQ (METHODS §3).

Legend: B faces of a rank, G faces of all ranks, D embedding, S slots.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fr_core import rng
from fr_core.heads.head import Head
from fr_core.heads.streamed import Softmax, fixed_centres_softmax, random_centres, same_label

NOBODY = -1  # the label of a slot that holds a random centre


class ClassQueue(Head):
    """First in, first out: S centres of length 1 and their labels, the same on every rank.

    S is a multiple of G, so a batch's slots follow from the number of the step and there is no cursor to save.
    """

    too_large = ("centres_SD", "labels_S")
    centres_SD: Tensor
    labels_S: Tensor

    def __init__(self, slots: int, embedding: int, softmax: Softmax, seed: int) -> None:
        super().__init__()
        self.softmax = softmax
        first = rng.torch_seed(seed, "class queue")
        self.register_buffer("centres_SD", random_centres(slots, embedding, softmax.precision, first))
        self.register_buffer("labels_S", torch.full((slots,), NOBODY))
        self.replaced: tuple[slice, Tensor, Tensor] | None = None  # by this step: slots, their centres and labels

    def begin_step(self) -> None:
        super().begin_step()
        self.replaced = None

    @torch.no_grad()
    def put(self, centres_GD: Tensor, labels_G: Tensor, step: int) -> None:
        """Puts a step's centres over the oldest ones; once a step."""
        first = step * len(labels_G) % len(self.labels_S)
        slots = slice(first, first + len(labels_G))
        self.replaced = slots, self.centres_SD[slots].clone(), self.labels_S[slots].clone()
        self.centres_SD[slots], self.labels_S[slots] = centres_GD.to(self.centres_SD.dtype), labels_G

    @torch.no_grad()
    def drop_step(self) -> None:
        super().drop_step()
        if self.replaced:
            slots, centres_GD, labels_G = self.replaced
            self.centres_SD[slots], self.labels_S[slots] = centres_GD, labels_G

    def forward(self, x_BD: Tensor, centres_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Mean cross-entropy of each face against its own centre and every slot of another label.

        Args:
            x_BD: embeddings, not normalised.
            centres_BD: the fresh centre of each face's class, of length 1, without gradient.
        """
        with torch.autocast(x_BD.device.type, enabled=False):
            unit_BD = F.normalize(x_BD.float())
            excluded = same_label(labels_B, self.labels_S)
            return fixed_centres_softmax(unit_BD, centres_BD.float(), self.centres_SD, excluded, self.softmax)
