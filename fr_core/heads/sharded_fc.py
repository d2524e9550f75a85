"""The class matrix, sharded over ranks, with its margin softmax: exact loss, exact gradients (docs/methods/bigface.md).

Legend: G global batch, D embedding, N identities, S rows of this rank that take part (all, or the sampled ones). K rows
of a class; row k of class c lies at c·K + k.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fr_core import rng
from fr_core.config.methods import BigFace
from fr_core.device import from_host
from fr_core.heads.head import Head
from fr_core.heads.make_margin import make_margin
from fr_core.heads.margins import Faces
from fr_core.heads.streamed import Softmax, TileSGD, margin_softmax, own_cosines
from fr_core.ranks import Ranks

INIT_STD = 0.01
_INIT_ROWS = 4096  # rows drawn from one seed, so that the initial values do not depend on the number of ranks


class ShardedFC(Head):
    """This rank's rows [lo, hi) of the K·N×D class matrix, and the softmax over the rows of all ranks.

    Args:
        precision: type of the operands of products.

    Raises:
        ValueError: fewer identities than ranks.
    """

    sharded = ("weight",)

    def __init__(
        self,
        identities: int,
        embedding: int,
        method: BigFace,
        ranks: Ranks,
        seed: int,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if identities < ranks.size:
            raise ValueError(f"{identities} identities cannot be shared out to {ranks.size} ranks")
        self.ranks, self.seed, self.identities, self.sample_rate = ranks, seed, identities, method.sample_rate
        self.margin = make_margin(method.margin, method.sample_rate * identities)
        self.method, self.precision = method, precision
        self.classes = range(*ranks.split(identities))
        self.lo, self.hi = (method.subcentres * place for place in (self.classes.start, self.classes.stop))
        self.weight = nn.Parameter(initial_rows(self.lo, self.hi, embedding, seed))

    def sample(self, labels_G: Tensor, step: int) -> Tensor | None:
        """Draw the rows that enter the softmax of this step (Partial FC: An et al., CVPR 2022).

        They are those of all positive classes of this rank, filled up with random negative classes to the share
        ``sample_rate`` of its classes.

        Returns:
            Sorted int64 [S], relative to ``lo``; None if every row enters.
        """
        if self.sample_rate >= 1:
            return None
        classes, device = len(self.classes), labels_G.device
        column_G = self.columns(labels_G)
        is_own_G = column_G >= 0
        seed = rng.torch_seed(self.seed, "partial fc", step, self.ranks.rank)
        priority = torch.rand(classes, generator=torch.Generator(device).manual_seed(seed), device=device)
        priority = F.pad(priority, (0, 1))  # the last place is for faces of other ranks
        priority.index_fill_(0, torch.where(is_own_G, column_G, classes), 2.0)
        count = max(int(self.sample_rate * classes + 1e-9), 1)
        if count < len(labels_G):  # then the positives may be more, and a card must be asked
            count = max(count, len(labels_G[is_own_G].unique()))
        sampled = priority[:classes].topk(count).indices.sort().values
        each = torch.arange(self.method.subcentres, device=device)
        return (self.method.subcentres * sampled[:, None] + each).flatten()

    def columns(self, labels_G: Tensor) -> Tensor:
        """Return the place of each label among this rank's classes: int64 [G], −1 if another rank holds the class."""
        is_own_G = (labels_G >= self.classes.start) & (labels_G < self.classes.stop)
        return torch.where(is_own_G, labels_G - self.classes.start, -1)

    def draw(self, step: int, faces: int, micro: int, device: torch.device) -> Sequence[Tensor | None]:
        """Draw what the margins of a step need: for each micro-batch, standard normal numbers [G]; None: nothing.

        A face's number depends on its place in the global batch alone, not on ranks or micro-batches.

        Args:
            faces: of the global batch, over all micro-batches.
        """
        if not self.margin.draws:
            return [None] * micro
        drawn = torch.from_numpy(rng.normals(self.seed, "margin", step, np.arange(faces))).float()
        drawn_AG = drawn.view(self.ranks.size, micro, -1).transpose(0, 1).flatten(1)
        return from_host(drawn_AG, device).unbind()

    def forward(
        self,
        x_GD: Tensor,
        labels_G: Tensor,
        rows_S: Tensor | None = None,
        sgd: TileSGD | None = None,
        drawn_G: Tensor | None = None,
    ) -> Tensor:
        """Return the mean cross-entropy of the margin softmax over the rows of all ranks (:func:`margin_softmax`).

        Args:
            x_GD: embeddings of all ranks, not normalised.
            labels_G: int64.
            rows_S: rows from :meth:`sample`; the gradient of the weight is then sparse.
            sgd: settings of the fused mode, in which rows move in the backward pass and get no gradient.
            drawn_G: numbers from :meth:`draw`.
        """
        column_G, given = self.columns(labels_G), self.method
        if rows_S is not None:
            sampled = rows_S[:: given.subcentres] // given.subcentres
            column_G = torch.where(column_G >= 0, torch.searchsorted(sampled, column_G), -1)
        with torch.autocast(x_GD.device.type, enabled=False):
            x_GD = x_GD.to(self.weight.dtype)
            unit_GD, cos_G = F.normalize(x_GD), None
            if given.margin.sees_cosines:
                cos_G = own_cosines(unit_GD, self.weight, column_G, self.ranks, rows_S, given.subcentres)
            margin = self.margin(Faces(x_GD, cos_G, drawn_G, labels_G))
            softmax = Softmax(
                margin,
                given.drop_negatives_above,
                self.precision,
                given.tile,
                given.skip_below,
                margin.hard,
                margin.threshold,
                given.subcentres,
            )
            loss = margin_softmax(unit_GD, self.weight, column_G, softmax, self.ranks, rows_S, sgd)
            self.margin.learn(margin)
            if margin.extra_G is None:
                return loss
            extra = margin.extra_G.mean()
            return loss + extra.detach().lerp(extra, 1 / self.ranks.size)  # whole on each rank; gather sums gradients


def initial_rows(lo: int, hi: int, embedding: int, seed: int) -> Tensor:
    """Return rows [lo, hi) of a class matrix drawn from N(0, 0.01²): float32 [hi − lo, D]."""
    rows = torch.empty(hi - lo, embedding)
    for block in range(lo // _INIT_ROWS, -(-hi // _INIT_ROWS)):
        generator = torch.Generator().manual_seed(rng.torch_seed(seed, "class matrix", block))
        drawn = torch.empty(_INIT_ROWS, embedding).normal_(0, INIT_STD, generator=generator)
        first = block * _INIT_ROWS
        start, stop = max(lo, first), min(hi, first + _INIT_ROWS)
        rows[start - lo : stop - lo] = drawn[start - first : stop - first]
    return rows
