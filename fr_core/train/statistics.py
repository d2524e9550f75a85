"""Batch-norm statistics for verification and saving: averaged over ranks, and the last norm measured on real faces.

Legend: B batch, D embedding, M moments (0, 1, 2), C channels, X pixels of images.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fr_core.config import Config
from fr_core.data.stream import Batch
from fr_core.nets.backbone import Backbone, normalised
from fr_core.nets.ghost import GhostBatchNorm
from fr_core.ranks import Ranks
from fr_core.train.precision import autocast
from fr_core.train.state import TrainState

AT_ONCE = 8  # images whose moments are summed at once, in float64
Norm = nn.BatchNorm1d | nn.BatchNorm2d | GhostBatchNorm
IMAGES = 10_000  # images to measure the last norm; its mean is then exact to 1 % of a standard deviation


@torch.no_grad()
def average_statistics(state: TrainState, ranks: Ranks) -> None:
    """Average the batch-norm statistics over all ranks. Call it before they are verified or saved.

    Statistics that training does not move stay, since a mean of equal numbers may be rounded.
    """
    if ranks.size > 1:
        for module in (state.backbone, state.average, state.encoder):
            for name, buffer in module.named_buffers() if module is not None else ():
                norm, _, statistic = name.rpartition(".")
                if statistic in ("running_mean", "running_var") and state.has_moved(norm):
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
    ((mean_D, variance_D),) = input_moments(config, state, net, [norm], faces, ranks)
    norm.get_buffer("running_mean").copy_(mean_D)
    norm.get_buffer("running_var").copy_(variance_D)


@torch.no_grad()
def input_moments(
    config: Config, state: TrainState, net: Backbone, norms: Sequence[nn.Module], faces: Iterable[Batch], ranks: Ranks
) -> list[tuple[Tensor, Tensor]]:
    """Return mean and variance of the inputs of a net's norms, float64 [C], over some faces on all ranks.

    Args:
        faces: images of this rank, not augmented.
    """
    sizes = [(3, len(norm.get_buffer("running_mean"))) for norm in norms]
    moments = [torch.zeros(size, dtype=torch.float64, device=state.device) for size in sizes]

    def add(moments_MC: Tensor, x: Tensor) -> None:
        for part in x.split(AT_ONCE):
            x_XC = part.double().movedim(1, -1).flatten(0, -2)
            moments_MC.add_(torch.stack((torch.ones_like(x_XC), x_XC, x_XC.square())).sum(1))

    hooks = [
        norm.register_forward_pre_hook(lambda _, given, moments_MC=moments_MC: add(moments_MC, given[0]))
        for norm, moments_MC in zip(norms, moments, strict=True)
    ]
    for batch in faces:
        with autocast(config, state.device):
            net(normalised(batch.images_BHWC.to(state.device), net))
    for hook in hooks:
        hook.remove()
    found = []
    for moments_MC in moments:
        count_C, sum_C, squares_C = ranks.sum_(moments_MC)
        mean_C = sum_C / count_C
        found.append((mean_C, (squares_C - sum_C * mean_C) / (count_C - 1)))
    return found


def unfolded_norms(net: nn.Module) -> list[Norm]:
    """Return the norms that a file had folded into convolutions (``fr_core/nets/onnx_graph.py``)."""
    return [module for module in net.modules() if isinstance(module, Norm) and _changes_no_scale(module)]


def _changes_no_scale(norm: Norm) -> bool:
    """Return whether a norm adds its shift and does nothing else."""
    mean_C, variance_C = norm.running_mean, norm.running_var
    assert mean_C is not None
    assert variance_C is not None
    same_C = (mean_C == 0) & (norm.weight == 1) & (variance_C == torch.ones_like(variance_C) - norm.eps)
    return bool(same_C.all())
