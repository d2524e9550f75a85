"""AttFC's class centres: attention over class images (METHODS §3, the paper's Eq. 8–10).

Legend: B faces, K class images of each, D embedding, N identities, G global batch.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@torch.no_grad()
def generative_centres(
    x_BD: Tensor, class_BKD: Tensor, strategy: Literal["attention", "constant", "single"], temperature: float = 1.0
) -> Tensor:
    """The class centre that each face's class images make, normalised: w⁺ = Σ_i α_i K_i / ‖Σ_i α_i K_i‖.

    The sum is over the class encoder's raw features. α: the softmax over i of cos(f, K_i) / temperature (attention),
    1/K (constant), or the first image alone (single).

    Args:
        x_BD: the faces' embeddings; no gradient passes to or through them.
        class_BKD: the class encoder's features.

    Returns:
        float32 [B, D], without gradient.
    """
    class_BKD = class_BKD.float()
    match strategy:
        case "single":
            mixed_BD = class_BKD[:, 0]
        case "constant":
            mixed_BD = class_BKD.mean(1)
        case "attention":
            cos_BK = F.cosine_similarity(x_BD.float()[:, None], class_BKD, dim=2)
            mixed_BD = ((cos_BK / temperature).softmax(1)[:, :, None] * class_BKD).sum(1)
    return F.normalize(mixed_BD)


@torch.no_grad()
def follow(encoder: nn.Module, backbone: nn.Module, momentum: float) -> None:
    """Moves a momentum encoder's weights: θ_k ← γ·θ_k + (1 − γ)·θ_q. Its batch-norm statistics stay its own."""
    torch._foreach_lerp_(list(encoder.parameters()), list(backbone.parameters()), 1 - momentum)
