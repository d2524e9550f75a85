"""The state that a run begins with."""

import copy
import math
from functools import lru_cache
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fr_core import rng
from fr_core.config import Config, class_count, class_rows, distillation, head_steps, total_steps, unwatched_steps
from fr_core.config.nets import Net
from fr_core.data.plan import Plan
from fr_core.device import set_arithmetic
from fr_core.heads.ldam import LDAM
from fr_core.heads.sharded_fc import ShardedFC
from fr_core.losses.ekd import Agreement
from fr_core.nets.backbone import Backbone
from fr_core.nets.build import build_net, on_device
from fr_core.nets.finetune import freeze, layer_rates
from fr_core.nets.ghost import use_ghost_batches
from fr_core.nets.iresnet import recompute
from fr_core.optim.fastface import watcher
from fr_core.optim.optimizers import make_optimizers
from fr_core.ranks import Ranks
from fr_core.train.distill import open_teacher
from fr_core.train.methods import make_head
from fr_core.train.precision import scales_loss
from fr_core.train.state import TrainState

MOST_CODES = (
    64  # versions of a block's compiled code: four stages with two shapes each, in training and with other sizes
)
FIRST_LOSS_SCALE = 2.0**16  # for float16 only
MAPS = 6  # feature maps that autograd keeps of a residual block


def initial_state(config: Config, plan: Plan, ranks: Ranks, device: torch.device) -> TrainState:
    """Return a state with seeded weights, which are the same on every rank and for every number of ranks."""
    set_arithmetic(config.train.deterministic, config.train.tf32)
    torch.manual_seed(rng.torch_seed(config.seed, "backbone"))
    backbone = on_device(trained_net(config), device)
    frozen = freeze(backbone, config.finetune.freeze)
    head = make_head(config, class_count(config, plan.dataset.manifest.identities), ranks, device)
    head = head.to(device) if head else None
    if isinstance(head, ShardedFC) and isinstance(head.margin, LDAM):
        head.margin.know(plan.dataset.identity_counts(), config.data.variants, device)
    compile_blocks(config, backbone, device)
    distill, teacher, adapter = distillation(config), open_teacher(config, plan.dataset, device), None
    if distill and distill.adapter and teacher:
        torch.manual_seed(rng.torch_seed(config.seed, "adapter"))
        adapter = nn.Linear(config.net.embedding, teacher.embedding, bias=False, device=device)
    trained = nn.ModuleList([backbone, adapter] if adapter else [backbone])
    optimizers = make_optimizers(config, trained, head, ranks, layer_rates(backbone, config.finetune.layer_decay))
    total = total_steps(config, plan.steps_per_epoch)
    state = TrainState(plan, device, backbone, _data_parallel(config, backbone, ranks), head, optimizers, total)
    state.teacher, state.adapter = teacher, adapter
    state.frozen, state.head_steps = frozen, head_steps(config, plan.steps_per_epoch)
    if agreement := config.method.agreement:
        state.agreement = Agreement(agreement).to(device)
    watched = total - unwatched_steps(config, plan.steps_per_epoch)
    state.watcher = watcher(config.schedule, watched, config.train.global_batch)
    if config.train.ema:
        state.average = copy.deepcopy(backbone).requires_grad_(False)
    if config.method.facts.encoder != "none":
        state.encoder = copy.deepcopy(backbone).requires_grad_(False)
        state.encoder.stop_dropout()  # it is in training mode for its batch norm alone
        compile_blocks(config, state.encoder, device)
        state.ships_encoder = config.method.facts.encoder == "shipped"
    if scales_loss(config, device):
        state.loss_scale = FIRST_LOSS_SCALE
    return state


def trained_net(config: Config) -> Backbone:
    """Build the backbone, with the recipe's ghost batches and recomputation."""
    net = build_net(config.net)
    if config.train.ghost_batch:
        use_ghost_batches(net, config.train.ghost_batch)
    if blocks := segment_blocks(config):
        recompute(net, blocks)
    return net


def compile_blocks(config: Config, net: Backbone, device: torch.device) -> None:
    """Compile a net's blocks at their first use, if the recipe says so. The net's weights keep their names."""
    by_itself = device.type == "cuda" and find_spec("triton") is not None
    if config.train.compile == "on" or (config.train.compile == "auto" and by_itself):
        from torch import _dynamo  # takes seconds

        _dynamo.config.recompile_limit = MOST_CODES
        for block in net.blocks():
            block.compile()


def segment_blocks(config: Config) -> int | None:
    """Return how many residual blocks the backward pass recomputes at a time; None: it recomputes none.

    With n blocks in segments of k, autograd keeps n / k inputs, and MAPS·k maps of the segment at work. The sum is
    smallest at k = √(n / MAPS).
    """
    if not config.train.recompute:
        return None
    return config.train.recompute_blocks or max(1, round(math.sqrt(block_count(config.net) / MAPS)))


@lru_cache
def block_count(net: Net) -> int:
    """Return the number of blocks that a net repeats."""
    with torch.device("meta"):
        return len(build_net(net).blocks())


def parameter_figures(config: Config, identities: int) -> dict[str, int]:
    """Count the parameters of a run's backbone and of its class matrix. Fixed centres are not parameters."""
    with torch.device("meta"):
        backbone = sum(param.numel() for param in build_net(config.net).parameters())
    matrix = class_rows(config) * class_count(config, identities) * config.net.embedding
    return {"backbone_parameters": backbone, "classifier_parameters": matrix}


def _data_parallel(config: Config, backbone: nn.Module, ranks: Ranks) -> nn.Module:
    """Wrap the backbone in DDP that *sums* gradients: those of the ranks add up to the global one (``ranks.py``)."""
    if ranks.size == 1:
        return backbone
    parallel = DistributedDataParallel(backbone, broadcast_buffers=False, gradient_as_bucket_view=True)
    parallel.register_comm_hook(getattr(torch, config.train.compress_gradients or "float32"), _sum_bucket)
    return parallel


def _sum_bucket(precision: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sum a gradient bucket over ranks in ``precision``.

    bfloat16 has the range of float32. If float16 overflows, all ranks see the same infinity: they drop the step and
    lower the loss scale.
    """
    work = dist.all_reduce(bucket.buffer().to(precision), async_op=True)
    return work.get_future().then(lambda future: bucket.buffer().copy_(future.value()[0]))
