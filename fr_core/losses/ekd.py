"""Losses by which a student agrees with its teacher on the pairs of a batch (METHODS §6), and QuantFace's own.

Evaluation-oriented knowledge distillation (EKD): verification accepts a pair whose cosine exceeds a threshold, which a
false-positive rate sets. What a student must keep is on which side of the thresholds its pairs lie, each network by
thresholds of its own.

Legend: G images of the global batch, P pairs of them, H of these, M similarities of a pool, N = 2 networks (teacher,
student), K = 6 thresholds, D student's and E teacher's embedding.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fr_core.config.methods import EKD, EmbeddingMSE, RelativeSimilarity
from fr_core.losses.distill import distillation_loss

RATES = 6  # false-positive rates 1e-1 … 1e-6, one threshold each
NETWORKS = ("teacher", "student")
THRESHOLDS = tuple(f"threshold_{network}_1e-{k}" for network in NETWORKS for k in range(1, RATES + 1))


class Agreement(nn.Module):
    """How far a student is from agreeing with its teacher on a batch, and the thresholds by which it is judged.

    Threshold A_k of a network is the cosine at place ⌊m / 10^k⌋ (from 0) of its m newest negatives, sorted from the
    highest. m grows to ``form.pool``; with fewer than 10^k negatives A_k is their maximum. The thresholds then follow
    the pool's as an EMA that starts at its first value: the pool steadies them over many batches, the EMA over the
    steps in which the student changes; ``form.threshold_momentum = 0`` leaves it to the pool. Before the first
    negative they are 1. They carry no gradient.
    """

    pool_NM: Tensor  # cosines, newest batch first; -inf where none has come yet
    thresholds_NK: Tensor

    def __init__(self, form: EKD | RelativeSimilarity | EmbeddingMSE) -> None:
        super().__init__()
        self.form = form
        if not isinstance(form, EmbeddingMSE):
            self.register_buffer("pool_NM", torch.full((2, form.pool), -torch.inf))
            self.register_buffer("thresholds_NK", torch.ones(2, RATES))

    def forward(self, student_GD: Tensor, teacher_GE: Tensor, labels_G: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a global batch, and what to tell beside it.

        Args:
            student_GD: any floating type; computed in float32 (float64 stays so), whatever autocast says.
            teacher_GE: without gradient; D = E for the MSE.
            labels_G: int64; equal ones make a positive pair.

        Returns:
            Loss, float scalar; and without gradient its terms before their weights, and the thresholds.
        """
        form = self.form
        if isinstance(form, EmbeddingMSE):
            loss = distillation_loss("euclidean", student_GD, teacher_GE)
            return loss, {"distill_loss": loss.detach()}
        one, other = torch.triu_indices(len(labels_G), len(labels_G), 1, device=labels_G.device)
        cosines_NP = torch.stack([cosines(x)[one, other] for x in (teacher_GE, student_GD)])
        same_P = labels_G[one] == labels_G[other]
        negatives_NP = cosines_NP[:, ~same_P]
        self.observe(negatives_NP.detach(), form.threshold_momentum)
        hardest_H = negatives_NP[1].topk(min(form.hardest, negatives_NP.shape[1])).indices
        positive, negative = self.distance(cosines_NP[:, same_P]), self.distance(negatives_NP[:, hardest_H])
        terms = {"positive_loss": positive.detach(), "negative_loss": negative.detach()}
        told = dict(zip(THRESHOLDS, self.thresholds_NK.flatten().clone(), strict=True))
        return form.lambda_pos * positive + form.lambda_neg * negative, terms | told

    @torch.no_grad()
    def observe(self, negatives_NP: Tensor, momentum: float) -> None:
        """Puts a batch's negatives into the pool, of more than M the first, and moves the thresholds."""
        if negatives_NP.shape[1] == 0:
            return
        first = self.pool_NM[0, 0].isinf()
        self.pool_NM.copy_(torch.cat([negatives_NP, self.pool_NM], 1)[:, : self.pool_NM.shape[1]])
        filled = self.pool_NM[0].isneginf().logical_not().sum()
        places_K = filled // 10 ** torch.arange(1, RATES + 1, device=filled.device)
        now_NK = self.pool_NM.sort(1, descending=True).values[:, places_K]
        self.thresholds_NK.lerp_(now_NK, torch.where(first, 1.0, 1 - momentum))

    def distance(self, cosines_NP: Tensor) -> Tensor:
        """Mean square over pairs of how differently the networks place them; 0 of no pairs.

        EKD places a pair at r(x) = Σ_k sigmoid((x − A_k) / temperature), about the number of thresholds it exceeds.
        The general form ‖(x_T − A_k,T) − (x_S − A_k,S)‖, whose norm the paper leaves open, is the mean square over k
        too.
        """
        above_NPK = cosines_NP[..., None] - self.thresholds_NK[:, None]
        if isinstance(self.form, EKD):
            teacher, student = (above_NPK / self.form.temperature).sigmoid().sum(-1)
        else:
            teacher, student = above_NPK
        return (teacher - student).square().sum() / max(1, student.numel())


def cosines(x_GD: Tensor) -> Tensor:
    """Of all pairs: float32 [G, G], or float64 of float64."""
    with torch.autocast(x_GD.device.type, enabled=False):
        unit_GD = F.normalize(x_GD if x_GD.dtype == torch.float64 else x_GD.float())
        return unit_GD @ unit_GD.T
