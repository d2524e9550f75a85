"""The parts of a step that all methods share: learning rates, embeddings, gradients, and the update or its undoing.

Legend: B images of a rank's micro-batch, K class images of each, D embedding.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fr_core import rng
from fr_core.config import Config, warmup_steps
from fr_core.config.nets import MoENet
from fr_core.nets.backbone import normalised
from fr_core.nets.moe import take_balance
from fr_core.optim.optimizers import squared_norm
from fr_core.optim.schedules import learning_rate
from fr_core.ranks import Ranks
from fr_core.train.precision import autocast
from fr_core.train.state import TrainState

LOSS_SCALE_PATIENCE = 2000  # finite steps until the loss scale doubles


def begin_step(config: Config, state: TrainState) -> None:
    """Set the learning rates, and copy the buffers that a dropped step must restore."""
    share = learning_rate(config.schedule, state.step, state.total_steps, state.plan.steps_per_epoch)
    if state.watcher:
        share *= state.watcher.factor
    for optimizer in state.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = share * group["initial_lr"]
    state.backbone.train()
    state.buffers = [buffer.clone() for buffer in buffers_to_restore(state)]
    if state.head:
        state.head.begin_step()


def embed(config: Config, state: TrainState, images_BHWC: Tensor, ranks: Ranks, micro_batch: int = 0) -> Tensor:
    """Embed uint8 images with the backbone in training mode: [B, D], with gradient.

    Dropout is seeded by the run's seed, the step, and the place of these images in the global batch.
    """
    place = ranks.rank * config.train.accumulate + micro_batch
    torch.manual_seed(rng.torch_seed(config.seed, "dropout", state.step, place))
    with autocast(config, state.device):
        return state.parallel(normalised(images_BHWC, state.backbone))


@torch.no_grad()
def encode_class_images(config: Config, state: TrainState, images_BKHWC: Tensor) -> Tensor:
    """Encode class images with the momentum encoder in training mode: features [B, K, D], without gradient."""
    assert state.encoder is not None
    images = normalised(images_BKHWC.flatten(0, 1), state.backbone)
    with autocast(config, state.device):
        return state.encoder.train()(images).unflatten(0, images_BKHWC.shape[:2])


def without_sync(state: TrainState) -> AbstractContextManager[None]:
    """Return a context without the sum of gradients over ranks, for all micro-batches but the last."""
    parallel = state.parallel
    return parallel.no_sync() if isinstance(parallel, DistributedDataParallel) else nullcontext()


def buffers_to_restore(state: TrainState) -> list[Tensor]:
    """List the buffers that a dropped step restores: batch-norm statistics and quantface's thresholds.

    The head restores its own buffers (:class:`fr_core.heads.head.Head`).
    """
    modules = (state.backbone, state.encoder, state.agreement)
    return [buffer for module in modules if module is not None for buffer in module.buffers()]


def backward(config: Config, state: TrainState, loss: Tensor, ranks: Ranks) -> None:
    """Add the gradients of a micro-batch's loss, multiplied by the loss scale.

    A mixture of experts adds its load-balance term to the gradient, averaged over ranks and micro-batches. The loss
    that the run reports and FastFace watches does not contain this term.
    """
    if isinstance(config.net, MoENet):
        loss = loss + config.net.balance * take_balance(state.backbone) / (config.train.accumulate * ranks.size)
    (loss * state.loss_scale).backward()


def update(
    config: Config, state: TrainState, loss: Tensor, ranks: Ranks, terms: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Move the weights by the gradients of one global batch.

    This clips gradients, and updates optimisers, moving average, FastFace and the loss scale. If the loss or a gradient
    is not finite, all ranks drop the step: they restore the buffers, and ``state.bad_steps`` is not 0.

    The loss scale is not left to ``GradScaler``: ranks with different rows of the class matrix must agree on it.

    Args:
        loss: this rank's share. The global loss is the sum over ranks, and is identical on all ranks.
        terms: this rank's shares of the loss terms to report.

    Returns:
        Metrics: the backbone's lr, loss and terms, gradient norms, and FastFace's detector. The head's norm is 0 if it
        has no gradient.
    """
    terms = terms or {}
    backbone = [p for p in state.trained.values() if p.grad is not None]
    head = list(state.head.parameters()) if state.head else []
    if state.loss_scale != 1:
        for param in (*backbone, *head):
            if param.grad is not None:
                param.grad.div_(state.loss_scale)
    backbone_norm = squared_norm(backbone, state.device).sqrt()
    sums = ranks.sum_(torch.stack([squared_norm(head, state.device), loss.detach(), *terms.values()]))
    norms = torch.stack([backbone_norm, sums[0].sqrt()])
    numbers = torch.cat([norms, sums[1:]]).tolist()
    metrics = {"lr": state.optimizers["backbone"].param_groups[0]["lr"]}
    metrics |= dict(zip(("grad_norm", "head_grad_norm", "loss", *terms), numbers, strict=True))
    if all(map(math.isfinite, numbers)):
        _clip(backbone, metrics["grad_norm"], config.optim.clip)
        if matrix := config.method.class_matrix:
            _clip(head, metrics["head_grad_norm"], matrix.clip_head)
        for optimizer in state.optimizers.values():
            optimizer.step()
        if state.watcher and state.step >= warmup_steps(config, state.plan.steps_per_epoch):
            state.watcher.observe(metrics["loss"])
        _after_good_step(config, state)
    else:
        state.bad_steps += 1
        state.dropped_steps += 1
        state.good_steps = 0
        state.loss_scale = max(1.0, state.loss_scale / 2)
        for buffer, before in zip(buffers_to_restore(state), state.buffers, strict=True):
            buffer.copy_(before)
        if state.head:
            state.head.drop_step()
    for optimizer in state.optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    state.step += 1
    if state.watcher:
        metrics |= {"detector": state.watcher.detector, "stationary": float(state.watcher.count)}
    return metrics


def _after_good_step(config: Config, state: TrainState) -> None:
    state.bad_steps = 0
    state.good_steps += 1
    if config.train.precision == "float16" and state.good_steps == LOSS_SCALE_PATIENCE:
        state.loss_scale *= 2
        state.good_steps = 0
    if state.average is not None:
        # Early weights change fast: at first, average over few steps.
        decay = min(config.train.ema, (1 + state.step) / (10 + state.step))
        _blend(state.average, state.backbone, 1 - decay)


@torch.no_grad()
def _blend(average: nn.Module, current: nn.Module, share: float) -> None:
    for ours, theirs in zip(average.state_dict().values(), current.state_dict().values(), strict=True):
        if ours.is_floating_point():
            ours.lerp_(theirs, share)
        else:
            ours.copy_(theirs)


def _clip(params: Sequence[Tensor], norm: float, limit: float | None) -> None:
    if limit is not None and norm > limit:
        for param in params:
            if param.grad is not None:
                param.grad.mul_(limit / norm)
