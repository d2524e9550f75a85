"""Distillation losses on embeddings: how far the student points from the teacher (docs/methods/bigface.md).

Legend: B images, D embedding.
"""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F


def distillation_loss(form: Literal["euclidean", "angular"], student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Return the mean distance between the directions of student and teacher embeddings: float32 scalar.

    The lengths of the embeddings do not matter.

    Args:
        form: ``euclidean`` is ‖t/‖t‖ − s/‖s‖‖² = 2·(1 − cos) (BigFace-Distill, MFR-ICCV 2021). ``angular`` is
            (1 − cos)² (Duong et al., "ShrinkTeaNet", 2019): its gradient vanishes as student and teacher come to agree.
        student_BD: any floating type; the loss is computed in float32.
    """
    distance_B = (F.normalize(teacher_BD.float()) - F.normalize(student_BD.float())).square().sum(1)
    return (distance_B if form == "euclidean" else (distance_B / 2).square()).mean()
