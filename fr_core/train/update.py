"""The parts of a step that all methods share: learning rates, embeddings, gradients, and the update or its undoing.

Legend: B images of a rank's micro-batch, K class images of each, D embedding.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fr_core import rng
from fr_core.config import Config, unwatched_steps
from fr_core.config.nets import MoENet
from fr_core.nets.backbone import normalised
from fr_core.nets.finetune import set_mode
from fr_core.nets.moe import take_balance
from fr_core.optim.optimizers import move_weights
from fr_core.optim.schedules import learning_rate
from fr_core.ranks import Ranks
from fr_core.train.notice import WEIGHTS
from fr_core.train.precision import autocast, scales_loss
from fr_core.train.reading import ASKED, Reading
from fr_core.train.state import TrainState
from fr_core.undo import Undo

LOSS_SCALE_PATIENCE = 2000  # finite steps until the loss scale doubles
READ_LATE = {"cuda": 1}  # steps by which the host's account lags behind, by kind of device; elsewhere 0


def begin_step(config: Config, state: TrainState) -> None:
    """Set the learning rates, and copy what a dropped step must restore."""
    share = learning_rate(config.schedule, state.step, state.total_steps, state.plan.steps_per_epoch)
    if state.watcher:
        share *= state.watcher.factor
    for optimizer in state.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = share * group["initial_lr"]
    set_mode(state.backbone, not state.head_only, state.frozen)
    if state.encoder is not None:
        set_mode(state.encoder, True, state.frozen)
    state.undo = Undo(buffers_to_restore(state))
    if state.head:
        state.head.begin_step()


def embed(config: Config, state: TrainState, images_BHWC: Tensor, ranks: Ranks, micro_batch: int = 0) -> Tensor:
    """Embed uint8 images with the backbone in training mode: [B, D], with gradient.

    While the head alone is trained, the gradient ends at the embeddings, so that the backbone costs its forward pass.
    Dropout is seeded by the run's seed, the step, and the place of these images in the global batch.
    """
    place = ranks.rank * config.train.accumulate + micro_batch
    torch.manual_seed(rng.torch_seed(config.seed, "dropout", state.step, place))
    images_BCHW = normalised(images_BHWC, state.backbone)
    with autocast(config, state.device):
        if not state.head_only:
            return state.parallel(images_BCHW)
        with torch.no_grad():
            x_BD = state.backbone(images_BCHW)
    return x_BD.requires_grad_()


@torch.no_grad()
def encode_class_images(config: Config, state: TrainState, images_BKHWC: Tensor) -> Tensor:
    """Encode class images with the momentum encoder in training mode: features [B, K, D], without gradient."""
    assert state.encoder is not None
    images = normalised(images_BKHWC.flatten(0, 1), state.backbone)
    with autocast(config, state.device):
        return state.encoder(images).unflatten(0, images_BKHWC.shape[:2])


def without_sync(state: TrainState) -> AbstractContextManager[None]:
    """Return a context without the sum of gradients over ranks, for all micro-batches but the last."""
    parallel = state.parallel
    return parallel.no_sync() if isinstance(parallel, DistributedDataParallel) else nullcontext()


def buffers_to_restore(state: TrainState) -> list[Tensor]:
    """List the buffers that a dropped step restores: batch-norm statistics and quantface's thresholds.

    Modules in eval mode do not move theirs. The head restores its own buffers (:class:`fr_core.heads.head.Head`).
    """
    nets = [net for net in (state.backbone, state.encoder, state.agreement) if net is not None]
    modules = (module for net in nets for module in net.modules() if module.training)
    return [buffer for module in modules for buffer in module.buffers(recurse=False)]


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
) -> Reading:
    """Move the weights by the gradients of one global batch.

    This clips gradients, and updates optimisers and moving average. If the loss or a gradient is not finite, all ranks
    drop the step: weights and buffers stay as they were. The device decides this, so that the host need not wait.

    The loss scale is not left to ``GradScaler``: ranks with different rows of the class matrix must agree on it.

    Args:
        loss: this rank's share. The global loss is the sum over ranks, and is identical on all ranks.
        terms: this rank's shares of the loss terms to report.

    Returns:
        The loss and its terms, and the gradient norms. The head's norm is 0 if it has no gradient.
    """
    terms = terms or {}
    backbone = gradients(state.trained.values())
    head = gradients(state.head.parameters()) if state.head else []
    if state.loss_scale != 1:
        torch._foreach_div_([*backbone, *head], state.loss_scale)
    asked = torch.full_like(loss, WEIGHTS[state.asked])
    backbone_norm = squared_norm(backbone, state.device).sqrt()
    sums = ranks.sum_(torch.stack([squared_norm(head, state.device), loss.detach(), *terms.values(), asked]))
    numbers = torch.cat([torch.stack([backbone_norm, sums[0].sqrt()]), sums[1:]])
    good = numbers.isfinite().all()
    clip(backbone, numbers[0], config.optim.clip)
    if matrix := config.method.class_matrix:
        clip(head, numbers[1], matrix.clip_head)
    for optimizer in state.optimizers.values():
        move_weights(optimizer, good)
        optimizer.zero_grad(set_to_none=True)
    state.undo.unless(good)
    if state.head:
        state.head.end_step(good)
    if state.average is not None:
        # Early weights change fast: at first, average over few steps.
        decay = min(config.train.ema, (1 + state.step) / (10 + state.step))
        blend(state.average, state.backbone, 1 - decay)
    reading = Reading(state.step, ("grad_norm", "head_grad_norm", "loss", *terms, ASKED), numbers)
    state.step += 1
    state.unread.append(reading)
    while len(state.unread) > READ_LATE.get(state.device.type, 0):
        account(config, state, state.unread.pop(0))
    return reading


def account(config: Config, state: TrainState, reading: Reading) -> None:
    """Draw the host's conclusions from a step: FastFace, the loss scale, counts of steps, and notices.

    On a card it is the step before the last one, whether the newest was read or not. So a run does not depend on how
    often it logs.
    """
    state.notice = max(state.notice, reading.request)
    if not reading.good:
        state.bad_steps += 1
        state.dropped_steps += 1
        state.good_steps = 0
        state.loss_scale = max(1.0, state.loss_scale / 2)
        return
    if state.watcher and reading.step >= unwatched_steps(config, state.plan.steps_per_epoch):
        state.watcher.observe(reading.read()["loss"])
    state.bad_steps = 0
    state.good_steps += 1
    if scales_loss(config, state.device) and state.good_steps == LOSS_SCALE_PATIENCE:
        state.loss_scale *= 2
        state.good_steps = 0


def metrics_of(state: TrainState, reading: Reading) -> dict[str, float]:
    """Return the metrics of the last step: learning rate, loss and terms, gradient norms, FastFace's detector."""
    metrics = {"lr": state.optimizers["backbone"].param_groups[0]["lr"]} | reading.metrics
    if state.watcher:
        metrics |= {"detector": state.watcher.detector, "stationary": float(state.watcher.count)}
    return metrics


def gradients(params: Iterable[Tensor]) -> list[Tensor]:
    """List the gradients of parameters; of a sparse gradient, the values."""
    found = []
    for param in params:
        if param.grad is not None:
            if param.grad.is_sparse:
                param.grad = param.grad.coalesce()
            found.append(param.grad._values() if param.grad.is_sparse else param.grad)
    return found


def squared_norm(grads: list[Tensor], device: torch.device) -> Tensor:
    """Return the sum of squares of all gradients: float32 scalar."""
    if not grads:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(grads)).float().square().sum()


@torch.no_grad()
def clip(grads: list[Tensor], norm: Tensor, limit: float | None) -> None:
    """Shrink gradients to a norm of at most ``limit``; None leaves them as they are."""
    if limit is None or not grads:
        return
    factor = (limit / norm.double()).clamp_max(1).float()
    if factor.is_cuda or factor < 1:  # a card is not asked: it multiplies by 1
        torch._foreach_mul_(grads, factor)


@torch.no_grad()
def blend(average: nn.Module, current: nn.Module, share: float) -> None:
    """Move the weights and buffers of an average by a share of the way towards the current ones."""
    ours, theirs = average.state_dict(), current.state_dict()
    means = [name for name in ours if ours[name].is_floating_point()]
    counts = [name for name in ours if name not in set(means)]
    torch._foreach_lerp_([ours[name] for name in means], [theirs[name] for name in means], share)
    torch._foreach_copy_([ours[name] for name in counts], [theirs[name] for name in counts])
