"""What a run carries from step to step, how it starts, and the one place where weights move."""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fr_core import rng
from fr_core.config import (
    DCQ,
    F2C,
    AttFC,
    Config,
    FixedCentres,
    MoENet,
    QuantFace,
    Residual,
    VirtualFC,
    class_matrix,
    classes,
    distillation,
    total_steps,
)
from fr_core.data.plan import Plan
from fr_core.device import multiplies_bfloat16
from fr_core.errors import UserError
from fr_core.heads.attfc import queue_slots
from fr_core.heads.class_queue import ClassQueue
from fr_core.heads.f2c import ClassPool
from fr_core.heads.sharded_fc import ShardedFC
from fr_core.heads.streamed import Softmax
from fr_core.heads.virtual_fc import Anchors
from fr_core.losses.ekd import Agreement
from fr_core.nets.ghost import use_ghost_batches
from fr_core.nets.iresnet import BLOCKS, recompute
from fr_core.nets.moe import take_balance
from fr_core.nets.open import Backbone, build_net, normalised, on_device
from fr_core.optim.fastface import HaarWindow, Recurrence, watcher
from fr_core.optim.optimizers import make_optimizers, squared_norm
from fr_core.optim.schedules import learning_rate
from fr_core.ranks import Ranks
from fr_core.train.distill import Teacher, open_teacher

Head = ShardedFC | ClassQueue | ClassPool | Anchors | Agreement

FIRST_LOSS_SCALE = 2.0**16  # float16 only
LOSS_SCALE_PATIENCE = 2000  # good steps until it doubles
MAPS = 6  # that autograd keeps of a residual block


@dataclass
class TrainState:
    """Everything that training changes, and the plan that it follows."""

    plan: Plan
    device: torch.device
    backbone: Backbone  # without its data-parallel wrapper
    parallel: nn.Module  # what training calls: the backbone, wrapped where there are several ranks
    head: Any  # a Head: which one follows from the method
    optimizers: dict[str, Any]
    total_steps: int
    average: Backbone | None = None  # moving average of the backbone
    encoder: Any = None  # Backbone, the momentum encoder: AttFC's class encoder, DCQ's key encoder, F2C's gallery net
    ships_encoder: bool = False
    teacher: Teacher | None = None
    adapter: Any = None  # nn.Linear to the teacher's width; trained with the backbone, not shipped
    agreement: Any = None  # Agreement, of quantface; its head too where it has no class matrix
    watcher: Recurrence | HaarWindow | None = None  # FastFace: what cuts the rate
    began: float = field(default_factory=time.monotonic)  # seconds, as if the run had gone on without a break
    step: int = 0  # optimiser steps done
    loss_scale: float = 1.0
    good_steps: int = 0  # since the loss scale changed
    bad_steps: int = 0  # non-finite steps in a row
    run_id: str | None = None  # of MLflow
    buffers: list[Tensor] = field(default_factory=list)  # statistics before this step

    @property
    def trained(self) -> dict[str, Tensor]:
        """What the backbone's optimiser moves, by name."""
        adapter = {"adapter.weight": self.adapter.weight} if self.adapter else {}
        return {name: p for name, p in self.backbone.named_parameters() if p.requires_grad} | adapter

    @property
    def usable(self) -> Backbone:
        """The backbone that is verified and shipped: DCQ's key encoder, else the moving average where there is one."""
        if self.encoder is not None and self.ships_encoder:
            return self.encoder
        return self.average if self.average is not None else self.backbone


def initial_state(config: Config, plan: Plan, ranks: Ranks, device: torch.device) -> TrainState:
    """Seeded weights, the same on every rank and for every number of ranks."""
    torch.manual_seed(rng.torch_seed(config.seed, "backbone"))
    backbone = on_device(trained_net(config), device)
    head = make_head(config, classes(config, plan.dataset.manifest.identities), ranks, device).to(device)
    distill, teacher, adapter = distillation(config), open_teacher(config, plan.dataset, device), None
    if distill and distill.adapter and teacher:
        torch.manual_seed(rng.torch_seed(config.seed, "adapter"))
        adapter = nn.Linear(config.net.embedding, teacher.embedding, bias=False, device=device)
    optimizers = make_optimizers(config, nn.ModuleList([backbone, adapter] if adapter else [backbone]), head, ranks)
    total = total_steps(config, plan.steps_per_epoch)
    state = TrainState(plan, device, backbone, _data_parallel(config, backbone, ranks), head, optimizers, total)
    state.teacher, state.adapter = teacher, adapter
    if isinstance(config.method, QuantFace):
        state.agreement = head if isinstance(head, Agreement) else Agreement(config.method.loss).to(device)
    state.watcher = watcher(config.schedule, total, config.train.global_batch)
    if config.train.ema:
        state.average = copy.deepcopy(backbone).requires_grad_(False)
    if isinstance(config.method, AttFC | DCQ | F2C):
        state.encoder = copy.deepcopy(backbone).requires_grad_(False)
        for module in state.encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # training mode is for its batch norm
        state.ships_encoder = isinstance(config.method, DCQ)
    if config.train.precision == "float16":
        state.loss_scale = FIRST_LOSS_SCALE
    return state


def trained_net(config: Config) -> Backbone:
    """The backbone as training runs it: the published net, in what the recipe makes of its memory and batch norm."""
    net = build_net(config.net)
    if config.train.ghost_batch:
        use_ghost_batches(net, config.train.ghost_batch)
    if blocks := segment_blocks(config):
        recompute(net, blocks)
    return net


def segment_blocks(config: Config) -> int | None:
    """Residual blocks that the backward pass makes anew at a time; None: it makes none.

    Of n blocks in segments of k, autograd keeps n / k inputs and, at a time, MAPS·k maps: least at k = √(n / MAPS).
    """
    if not (config.train.recompute and isinstance(config.net, Residual)):
        return None
    return config.train.recompute_blocks or round(math.sqrt(sum(BLOCKS[config.net.depth]) / MAPS))


def make_head(config: Config, classes: int, ranks: Ranks, device: torch.device) -> Head:
    """What stands for the classes: this rank's rows of the class matrix, or all ranks' common centres.

    Where nothing does, what the ranks have in common to compare the student with its teacher.

    Raises:
        UserError: fewer centres than a batch needs.
    """
    method, embedding, seed = config.method, config.net.embedding, config.seed
    if matrix := class_matrix(config):
        return ShardedFC(classes, embedding, matrix, ranks, seed)
    if isinstance(method, QuantFace):
        return Agreement(method.loss)
    assert isinstance(method, FixedCentres)
    precision = autocast_precision(config, device) if method.precision == "auto" else getattr(torch, method.precision)
    precision = torch.float32 if precision == torch.float16 else precision
    softmax = Softmax(method.margin, precision=precision, tile=method.tile)
    centres = centres_of(config, classes)
    match method:
        case AttFC() | DCQ():
            return ClassQueue(centres, embedding, softmax, seed)
        case F2C():
            return ClassPool(centres, embedding, softmax, seed)
        case VirtualFC():
            return Anchors(centres, embedding, softmax, seed)


def centres_of(config: Config, classes: int) -> int:
    """How many centres stand for the classes; 0 where a class matrix does.

    Raises:
        UserError: fewer than a batch needs.
    """
    batch = config.train.global_batch
    match config.method:
        case AttFC() as method:
            return queue_slots(method.size_ratio * classes, batch)
        case DCQ() as method:
            return queue_slots(method.queue_size, batch)
        case F2C() as method:
            if method.pool_size < 3 * batch // 4:
                raise UserError(
                    f"method.pool_size = {method.pool_size} cannot hold the {3 * batch // 4} faces that a batch of "
                    f"{batch} writes: raise it"
                )
            return method.pool_size
        case VirtualFC() as method:
            if method.anchors < batch:
                raise UserError(f"method.anchors = {method.anchors} is less than a batch of {batch}: raise it")
            return method.anchors
        case _:
            return 0


def parameter_figures(config: Config, identities: int) -> dict[str, int]:
    """Parameters of a run's backbone and of its classifier, the class matrix; centres without a gradient are none."""
    with torch.device("meta"):
        backbone = sum(param.numel() for param in build_net(config.net).parameters())
    matrix = classes(config, identities) * config.net.embedding if class_matrix(config) else 0
    return {"backbone_parameters": backbone, "classifier_parameters": matrix}


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The backbone's precision."""
    precision = autocast_precision(config, device)
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def autocast_precision(config: Config, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the processor multiplies it natively.

    Without such instructions a CPU emulates it: IR-10 at width 16 and 64×64 trained 17 images/s instead of 160.
    """
    if config.train.precision == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    return getattr(torch, config.train.precision)


@torch.no_grad()
def encoded(config: Config, state: TrainState, images_BKHWC: Tensor) -> Tensor:
    """The momentum encoder's features of class images, by its batch norm's own statistics of them: [B, K, D]."""
    images = normalised(images_BKHWC.flatten(0, 1), state.backbone.input_std)
    with autocast(config, state.device):
        return state.encoder.train()(images).unflatten(0, images_BKHWC.shape[:2])


def without_sync(state: TrainState) -> Any:
    """Holds back the sum of gradients over ranks, for all but the last micro-batch."""
    parallel = state.parallel
    return parallel.no_sync() if isinstance(parallel, DistributedDataParallel) else nullcontext()


def begin_step(config: Config, state: TrainState) -> float:
    """Sets the learning rates and returns the backbone's.

    Remembers the :func:`statistics`, so that a step that is not finite can leave no trace.
    """
    share = learning_rate(config.schedule, state.step, state.total_steps, state.plan.steps_per_epoch)
    if state.watcher:
        share *= state.watcher.factor
    for optimizer in state.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = share * group["initial_lr"]
    state.buffers = [buffer.clone() for buffer in statistics(state)]
    return state.optimizers["backbone"].param_groups[0]["lr"]


def statistics(state: TrainState) -> list[Tensor]:
    """What batch norm has gathered, of the backbone and of a momentum encoder, and the thresholds of quantface."""
    modules = (state.backbone, state.encoder, state.agreement)
    return [buffer for module in modules if module is not None for buffer in module.buffers()]


def backward(config: Config, state: TrainState, loss: Tensor, ranks: Ranks) -> None:
    """Gradients of a micro-batch's loss, at the loss scale.

    A mixture of experts adds its load-balance term: the mean over ranks and micro-batches of theirs, to the gradient
    alone; the loss that a run reports, and FastFace sees, stays that of the method.
    """
    if isinstance(config.net, MoENet):
        loss = loss + config.net.balance * take_balance(state.backbone) / (config.train.accumulate * ranks.size)
    (loss * state.loss_scale).backward()


def update(
    config: Config, state: TrainState, loss: Tensor, ranks: Ranks, terms: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Moves the weights by the gradients of one global batch, or drops the step on all ranks if any is not finite:
    then ``state.bad_steps`` is not 0.

    Clips, steps both optimisers, the moving average and the loss scale. The loss scale lives here, not in
    ``GradScaler``, because ranks with different rows of the class matrix must agree on it.

    Args:
        loss: this rank's share; the global loss is the ranks' sum, the same to the last bit on all of them.
        terms: of the loss, to be told beside it, shares too.

    Returns:
        loss and its terms, gradient norms (the head's is 0 where it has no gradient), and what FastFace sees.
    """
    backbone, terms = [p for p in state.trained.values() if p.grad is not None], terms or {}
    head = list(state.head.parameters())
    if state.loss_scale != 1:
        for param in (*backbone, *head):
            if param.grad is not None:
                param.grad.div_(state.loss_scale)
    backbone_norm = squared_norm(backbone, state.device).sqrt()
    shared = ranks.sum_(torch.stack([squared_norm(head, state.device), loss.detach(), *terms.values()]))
    numbers = torch.cat([torch.stack([backbone_norm, shared[0].sqrt()]), shared[1:]]).tolist()
    metrics = dict(zip(("grad_norm", "head_grad_norm", "loss", *terms), numbers, strict=True))
    if all(map(math.isfinite, numbers)):
        _clip(backbone, metrics["grad_norm"], config.optim.clip)
        if matrix := class_matrix(config):
            _clip(head, metrics["head_grad_norm"], matrix.clip_head)
        for optimizer in state.optimizers.values():
            optimizer.step()
        if state.watcher:
            state.watcher.observe(metrics["loss"])
        _after_good_step(config, state)
    else:
        state.bad_steps += 1
        state.good_steps = 0
        state.loss_scale = max(1.0, state.loss_scale / 2)
        for buffer, before in zip(statistics(state), state.buffers, strict=True):
            buffer.copy_(before)
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
        decay = min(config.train.ema, (1 + state.step) / (10 + state.step))  # a short memory while weights still race
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


def _data_parallel(config: Config, backbone: nn.Module, ranks: Ranks) -> nn.Module:
    """DDP that *sums* gradients: the loss is already the mean over the global batch (``fr_core/ranks.py``)."""
    if ranks.size == 1:
        return backbone
    parallel = DistributedDataParallel(backbone, broadcast_buffers=False, gradient_as_bucket_view=True)
    parallel.register_comm_hook(getattr(torch, config.train.compress_gradients or "float32"), _summed)
    return parallel


def _summed(precision: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The bucket summed over ranks in ``precision``.

    bfloat16 has float32's range. Where float16 overflows, at the loss scale, all ranks see the same infinity and drop
    the step, and the scale falls.
    """
    work = dist.all_reduce(bucket.buffer().to(precision), async_op=True)
    return work.get_future().then(lambda future: bucket.buffer().copy_(future.value()[0]))
