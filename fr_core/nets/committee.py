"""A committee: IR-ResNets side by side, drawn apart and trained on the same batches, whose judgements are averaged.

Nets that learn few people alike err apart: the mean of their cosines recognises strangers better than either net, and
better than one net of their size or of their training's length (EXPERIMENTS.md has figures; Lakshminarayanan et al.,
"Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles", 2017).

Legend: B batch, M members, D embedding of them all, C channels, H W pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fr_core.nets.iresnet import IResNet


class Committee(nn.Module):
    """In training every member's embedding of an image is a row of its own, and has class rows of its own
    (:func:`member_classes`): [M·B, D / M], member after member. At inference the members' embeddings, each of length
    1, lie side by side, so that the cosine of two faces is the mean of the members' cosines: [B, D].
    """

    input_std = IResNet.input_std

    def __init__(self, members: Sequence[IResNet]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.input_size = members[0].input_size
        self.embedding = sum(member.embedding for member in members)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        embeddings = [member(x_BCHW) for member in self.members]
        if self.training:
            return torch.cat(embeddings)
        return torch.cat([nn.functional.normalize(own_BD) for own_BD in embeddings], 1) / len(embeddings) ** 0.5


def member_classes(labels_B: Tensor, members: int) -> Tensor:
    """The classes of a batch's rows: int64 [M·B]. Those of a person stand together, one for each member."""
    return torch.cat([labels_B * members + member for member in range(members)])
