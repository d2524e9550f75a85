"""The queue of class centres that replaces the class matrix in AttFC and DCQ (docs/methods/attfc.md, baselines.md).

Legend: B faces of a rank, G faces of all ranks, D embedding, S slots.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fr_core import rng
from fr_core.heads.head import Head
from fr_core.heads.streamed import Softmax, fixed_centres_softmax, random_centres

NO_CLASS = -1  # label of a slot that still holds its random first centre


class ClassQueue(Head):
    """A first-in, first-out queue of S unit centres and their labels, the same on every rank.

    S is a multiple of G, so the step number alone gives the slots of a batch. There is no cursor to save.
    """

    too_large = ("centres_SD", "labels_S")
    centres_SD: Tensor
    labels_S: Tensor

    def __init__(self, slots: int, embedding: int, softmax: Softmax, seed: int) -> None:
        super().__init__()
        self.softmax = softmax
        first = rng.torch_seed(seed, "class queue")
        self.register_buffer("centres_SD", random_centres(slots, embedding, softmax.precision, first))
        self.register_buffer("labels_S", torch.full((slots,), NO_CLASS))
        self.replaced: tuple[slice, Tensor, Tensor] | None = None  # what this step overwrote: slots, centres, labels

    def begin_step(self) -> None:
        """Forget what the last step overwrote."""
        super().begin_step()
        self.replaced = None

    @torch.no_grad()
    def put(self, centres_GD: Tensor, labels_G: Tensor, step: int) -> None:
        """Overwrite the oldest centres with those of this step. Call it once per step."""
        first = step * len(labels_G) % len(self.labels_S)
        slots = slice(first, first + len(labels_G))
        self.replaced = slots, self.centres_SD[slots].clone(), self.labels_S[slots].clone()
        self.centres_SD[slots], self.labels_S[slots] = centres_GD.to(self.centres_SD.dtype), labels_G

    @torch.no_grad()
    def end_step(self, good: Tensor) -> None:
        """Restore the buffers and the centres that this step overwrote, unless it was good."""
        super().end_step(good)
        if self.replaced:
            slots, centres_GD, labels_G = self.replaced
            self.centres_SD[slots] = torch.where(good, self.centres_SD[slots], centres_GD)
            self.labels_S[slots] = torch.where(good, self.labels_S[slots], labels_G)

    def forward(self, x_BD: Tensor, centres_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Return the mean cross-entropy of the faces: own centre against every slot with another label.

        Args:
            x_BD: embeddings, not normalised.
            centres_BD: the new unit centre of each face's class, without gradient.
        """
        with torch.autocast(x_BD.device.type, enabled=False):
            unit_BD = F.normalize(x_BD.float())
            given = centres_BD.float(), self.centres_SD, labels_B, self.labels_S
            return fixed_centres_softmax(unit_BD, *given, self.softmax)
