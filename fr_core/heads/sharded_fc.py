"""The class matrix, sharded over ranks, with its margin softmax: exact loss, exact gradients (METHODS §1, §2).

Legend: G global batch, D embedding, N identities, S this rank's rows of the class matrix (or the sampled ones).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fr_core import rng
from fr_core.config import BigFace
from fr_core.heads.margins import with_margin
from fr_core.ranks import Ranks

INIT_STD = 0.01
_INIT_ROWS = 4096  # drawn from one seed, so that a row's first value does not depend on the number of ranks


class ShardedFC(nn.Module):
    """Rows [lo, hi) of the N×D class matrix and the softmax over all of them.

    Raises:
        ValueError: fewer identities than ranks.
    """

    def __init__(self, identities: int, embedding: int, method: BigFace, ranks: Ranks, seed: int) -> None:
        super().__init__()
        if identities < ranks.size:
            raise ValueError(f"{identities} identities cannot be shared out to {ranks.size} ranks")
        self.method, self.ranks, self.seed, self.identities = method, ranks, seed, identities
        self.lo, self.hi = ranks.split(identities)
        self.weight = nn.Parameter(initial_rows(self.lo, self.hi, embedding, seed))

    def sample(self, labels_G: Tensor, step: int) -> Tensor | None:
        """Partial FC (An et al., 2022): the rows that enter this step's softmax.

        All of this rank's positives, and random negatives up to ``sample_rate`` of its rows.

        Returns:
            Sorted int64 [S], relative to ``lo``; None where every row enters.
        """
        if self.method.sample_rate >= 1:
            return None
        own = labels_G[(labels_G >= self.lo) & (labels_G < self.hi)].unique() - self.lo
        rows = self.hi - self.lo
        generator = torch.Generator().manual_seed(rng.torch_seed(self.seed, "partial fc", step, self.ranks.rank))
        priority = torch.rand(rows, generator=generator).to(labels_G.device)
        priority[own] = 2.0
        count = max(int(self.method.sample_rate * rows), len(own), 1)
        return priority.topk(count).indices.sort().values

    def forward(self, x_GD: Tensor, labels_G: Tensor, rows_S: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of the margin softmax over all ranks' rows.

        Every rank calls it with the same arguments and gets the same loss; its backward gives this rank's rows their
        whole gradient and ``x_GD`` the part that these rows contribute (``Ranks.gather`` sums the parts).

        Args:
            x_GD: all ranks' embeddings, not normalised.
            labels_G: int64.
            rows_S: from :meth:`sample`; the weight's gradient is then sparse.
        """
        scale, limit = self.method.margin.scale, self.method.drop_negatives_above
        weight_SD = self.weight if rows_S is None else F.embedding(rows_S, self.weight, sparse=True)
        with torch.autocast(x_GD.device.type, enabled=False):
            cos_GS = F.linear(F.normalize(x_GD.float()), F.normalize(weight_SD)).clamp(-1, 1)
        own_P, column_P = self._positives(labels_G, rows_S)
        positive_P = with_margin(cos_GS[own_P, column_P], self.method.margin)
        if limit < 1:
            cos_GS = cos_GS.masked_fill(cos_GS.detach() > limit, -torch.inf)
        logits_GS = scale * cos_GS.index_put((own_P, column_P), positive_P)
        positive_G = logits_GS.new_zeros(len(labels_G)).index_put((own_P,), scale * positive_P)
        top_G = self.ranks.max_(logits_GS.detach().amax(1))
        total_G = self.ranks.sum(torch.exp(logits_GS - top_G[:, None]).sum(1))
        return (total_G.log() + top_G - self.ranks.sum(positive_G)).mean()

    def _positives(self, labels_G: Tensor, rows_S: Tensor | None) -> tuple[Tensor, Tensor]:
        """Positions in the batch of the faces whose identity lies on this rank, and their columns in ``cos_GS``."""
        own_P = torch.nonzero((labels_G >= self.lo) & (labels_G < self.hi)).squeeze(1)
        local_P = labels_G[own_P] - self.lo
        return own_P, local_P if rows_S is None else torch.searchsorted(rows_S, local_P)


def initial_rows(lo: int, hi: int, embedding: int, seed: int) -> Tensor:
    """Rows [lo, hi) of a class matrix drawn from N(0, 0.01²): float32 [hi − lo, D]."""
    blocks = []
    for block in range(lo // _INIT_ROWS, -(-hi // _INIT_ROWS)):
        generator = torch.Generator().manual_seed(rng.torch_seed(seed, "class matrix", block))
        rows = torch.empty(_INIT_ROWS, embedding).normal_(0, INIT_STD, generator=generator)
        first = block * _INIT_ROWS
        blocks.append(rows[max(lo - first, 0) : min(hi - first, _INIT_ROWS)])
    return torch.cat(blocks)
