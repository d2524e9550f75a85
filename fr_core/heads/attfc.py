"""AttFC's class centres: attention over class images (AttFC, arXiv 2025, Eq. 8–10; docs/methods/attfc.md).

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
    """Return the class centre of each face, made of its class images: w⁺ = Σ_i α_i K_i / ‖Σ_i α_i K_i‖.

    K_i are the class encoder's features, not normalised. The strategy sets the weights α:

    - attention: the softmax over i of cos(f, K_i) / temperature;
    - constant: 1/K;
    - single: the first image alone.

    Args:
        x_BD: embeddings f of the faces; they get no gradient.
        class_BKD: features of the class images.

    Returns:
        Unit vectors, float32 [B, D], without gradient.
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
def update_encoder(encoder: nn.Module, backbone: nn.Module, momentum: float) -> None:
    """Move a momentum encoder's weights towards the backbone's: θ_k ← γ·θ_k + (1 − γ)·θ_q.

    The encoder keeps its own batch-norm statistics.
    """
    torch._foreach_lerp_(list(encoder.parameters()), list(backbone.parameters()), 1 - momentum)
