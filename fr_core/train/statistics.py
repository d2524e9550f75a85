"""Batch-norm statistics for verification and saving: averaged over ranks, and the last norm measured on real faces.

Legend: B batch, D embedding, M moments (0, 1, 2).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fr_core.config import Config
from fr_core.data.stream import Batch
from fr_core.nets.backbone import normalised
from fr_core.ranks import Ranks
from fr_core.train.precision import autocast
from fr_core.train.state import TrainState

IMAGES = 10_000  # images to measure the last norm; its mean is then exact to 1 % of a standard deviation


@torch.no_grad()
def average_statistics(state: TrainState, ranks: Ranks) -> None:
    """Average the batch-norm statistics over all ranks. Call it before they are verified or saved."""
    if ranks.size > 1:
        for module in (state.backbone, state.average, state.encoder):
            for name, buffer in module.named_buffers() if module is not None else ():
                if name.endswith(("running_mean", "running_var")):
                    ranks.sum_(buffer).div_(ranks.size)


@torch.no_grad()
def measure_last_norm(config: Config, state: TrainState, faces: Iterable[Batch], ranks: Ranks) -> None:
    """Set the statistics of the usable net's last batch norm to the mean and variance of its input on some faces.

    A net trained on virtual identities needs this: its embeddings of real faces lie off centre, so that all their
    cosines are too high. Re-measuring batch norm on the target domain is from Li et al., "Revisiting Batch
    Normalization For Practical Domain Adaptation", 2016. Only the last norm is measured here: it centres the embedding.

    Args:
        faces: real images of this rank, not augmented.
    """
    net = state.usable.eval()
    norm = net.last_norm
    assert norm is not None
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    moments_MD = torch.zeros(3, config.net.embedding, dtype=torch.float64, device=state.device)

    def add(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        x_BD = given[0].double()
        moments_MD.add_(torch.stack((torch.ones_like(x_BD), x_BD, x_BD.square())).sum(1))

    with norm.register_forward_pre_hook(add):
        for batch in faces:
            with autocast(config, state.device):
                net(normalised(batch.images_BHWC.to(state.device), net))
    count_D, sum_D, squares_D = ranks.sum_(moments_MD)
    mean_D = sum_D / count_D
    mean.copy_(mean_D)
    variance.copy_((squares_D - sum_D * mean_D) / (count_D - 1))
