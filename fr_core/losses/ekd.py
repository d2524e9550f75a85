"""Losses that make a student agree with its teacher: EKD and its general form on pairs, and QuantFace's MSE.

Verification accepts a pair of images whose cosine exceeds a threshold, and a false-positive rate sets the threshold.
Evaluation-oriented knowledge distillation (EKD, CVPR 2022) therefore teaches on which side of the thresholds each pair
lies. Teacher and student have thresholds of their own. See docs/methods/quantface.md.

Legend: G images of the global batch, P pairs of images, H hardest negative pairs, M cosines of the pool. N = 2 networks
(teacher, student), K = 6 thresholds, D embedding of the student, E embedding of the teacher.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fr_core.config.methods import EKD, EmbeddingMSE, RelativeSimilarity
from fr_core.device import from_host
from fr_core.losses.distill import distillation_loss

RATES = 6  # number of false-positive rates, 1e-1 … 1e-6; each has a threshold
NETWORKS = ("teacher", "student")
THRESHOLDS = tuple(f"threshold_{network}_1e-{k}" for network in NETWORKS for k in range(1, RATES + 1))


class Agreement(nn.Module):
    """The loss of a student against its teacher on a batch, and the thresholds of both networks.

    A pool holds the cosines of the m newest negative pairs of each network; m grows up to ``form.pool``. The pool's
    threshold A_k is the cosine at place ⌊m / 10^k⌋ (from 0) from the highest. With fewer than 10^k negatives, A_k is
    their maximum.

    The thresholds in use are an exponential moving average of the pool's, which starts at its first value. The pool
    averages over many batches, the moving average over steps in which the student changes. With
    ``form.threshold_momentum = 0`` the pool's thresholds are used directly. All thresholds are 1 before the first
    negative pair, and carry no gradient.
    """

    pool_NM: Tensor  # cosines, newest batch first; -inf in places not filled yet
    thresholds_NK: Tensor

    def __init__(self, form: EKD | RelativeSimilarity | EmbeddingMSE) -> None:
        super().__init__()
        self.form = form
        if not isinstance(form, EmbeddingMSE):
            self.register_buffer("pool_NM", torch.full((2, form.pool), -torch.inf))
            self.register_buffer("thresholds_NK", torch.ones(2, RATES))

    def forward(self, student_GD: Tensor, teacher_GE: Tensor, labels_G: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a global batch, and the metrics to report with it.

        Args:
            student_GD: any floating type; computed in float32, or in float64 if it is float64, also under autocast.
            teacher_GE: embeddings without gradient; the MSE needs E = D.
            labels_G: int64, on the host; images with equal labels form a positive pair.

        Returns:
            The loss, a float scalar. The metrics, without gradient: unweighted terms of the loss, and thresholds.
        """
        form = self.form
        if isinstance(form, EmbeddingMSE):
            loss = distillation_loss("euclidean", student_GD, teacher_GE)
            return loss, {"distill_loss": loss.detach()}
        one, other = torch.triu_indices(len(labels_G), len(labels_G), 1, device=student_GD.device)
        cosines_NP = torch.stack([cosines(x)[one, other] for x in (teacher_GE, student_GD)])
        negative_P, positive_P = split_pairs(labels_G, one, other)
        negatives_NP = cosines_NP[:, negative_P]
        self.observe(negatives_NP.detach(), form.threshold_momentum)
        hardest_H = negatives_NP[1].topk(min(form.hardest, negatives_NP.shape[1])).indices
        positive, negative = self.distance(cosines_NP[:, positive_P]), self.distance(negatives_NP[:, hardest_H])
        terms = {"positive_loss": positive.detach(), "negative_loss": negative.detach()}
        thresholds = dict(zip(THRESHOLDS, self.thresholds_NK.flatten().clone(), strict=True))
        return form.lambda_pos * positive + form.lambda_neg * negative, terms | thresholds

    @torch.no_grad()
    def observe(self, negatives_NP: Tensor, momentum: float) -> None:
        """Put the negatives of a batch into the pool (at most the first M), and update the thresholds."""
        if negatives_NP.shape[1] == 0:
            return
        first = self.pool_NM[0, 0].isinf()
        self.pool_NM.copy_(torch.cat([negatives_NP, self.pool_NM], 1)[:, : self.pool_NM.shape[1]])
        filled = self.pool_NM[0].isneginf().logical_not().sum()
        places_K = filled // 10 ** torch.arange(1, RATES + 1, device=filled.device)
        now_NK = self.pool_NM.sort(1, descending=True).values[:, places_K]
        self.thresholds_NK.lerp_(now_NK, torch.where(first, 1.0, 1 - momentum))

    def distance(self, cosines_NP: Tensor) -> Tensor:
        """Return the mean squared difference between teacher and student over the pairs; 0 if there are none.

        EKD compares r(x) = Σ_k sigmoid((x − A_k) / temperature): about the number of thresholds that a cosine exceeds.
        The general form is ‖(x_T − A_k,T) − (x_S − A_k,S)‖. The EKD paper does not say which norm; here it is the mean
        square over k, too.
        """
        above_NPK = cosines_NP[..., None] - self.thresholds_NK[:, None]
        if isinstance(self.form, EKD):
            teacher, student = (above_NPK / self.form.temperature).sigmoid().sum(-1)
        else:
            teacher, student = above_NPK
        return (teacher - student).square().sum() / max(1, student.numel())


def split_pairs(labels_G: Tensor, one_P: Tensor, other_P: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places of negative and of positive pairs among all pairs of images, in order.

    The host counts the pairs, so that it need not ask the device for their number.

    Args:
        labels_G: int64, on the host.
        one_P, other_P: the two images of each pair, on the device.
    """
    repeats = labels_G.unique(return_counts=True)[1]
    positives = int((repeats * (repeats - 1) // 2).sum())
    there_G = from_host(labels_G, one_P.device)
    order_P = (there_G[one_P] == there_G[other_P]).byte().argsort(stable=True)
    return order_P[: len(order_P) - positives], order_P[len(order_P) - positives :]


def cosines(x_GD: Tensor) -> Tensor:
    """Return the cosines of all pairs [G, G], in float32, or in float64 for float64 embeddings."""
    with torch.autocast(x_GD.device.type, enabled=False):
        unit_GD = F.normalize(x_GD if x_GD.dtype == torch.float64 else x_GD.float())
        return unit_GD @ unit_GD.T
