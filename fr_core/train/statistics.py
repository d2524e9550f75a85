"""Batch-norm statistics as they are verified and saved: one for all ranks, and the last norm's of real faces.

Legend: B batch, D embedding, M moments (0, 1, 2).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fr_core.config import Config
from fr_core.data.stream import Batch
from fr_core.nets.open import normalised
from fr_core.ranks import Ranks
from fr_core.train.precision import autocast
from fr_core.train.state import TrainState

IMAGES = 10_000  # that the last norm is measured by: its mean is then within 1 % of a deviation


@torch.no_grad()
def average_statistics(state: TrainState, ranks: Ranks) -> None:
    """Gives all ranks the mean of their batch-norm statistics, before these are verified or saved."""
    if ranks.size > 1:
        for module in (state.backbone, state.average, state.encoder):
            for name, buffer in module.named_buffers() if module is not None else ():
                if name.endswith(("running_mean", "running_var")):
                    ranks.sum_(buffer).div_(ranks.size)


@torch.no_grad()
def measure_last_norm(config: Config, state: TrainState, faces: Iterable[Batch], ranks: Ranks) -> None:
    """Sets the statistics of the usable net's last batch norm to the mean and variance of its input on some faces.

    For a net whose training showed others than those it is made for: trained on virtual identities, its embeddings of
    real faces lie off centre, and their cosines are all too high. (Batch norm measured anew on the domain in question:
    Li et al., "Revisiting Batch Normalization For Practical Domain Adaptation", 2016; here the last norm alone, which
    centres the embedding.)

    Args:
        faces: this rank's images, not augmented.
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
                net(normalised(batch.images_BHWC.to(state.device), net.input_std))
    count_D, sum_D, squares_D = ranks.sum_(moments_MD)
    mean_D = sum_D / count_D
    mean.copy_(mean_D)
    variance.copy_((squares_D - sum_D * mean_D) / (count_D - 1))
