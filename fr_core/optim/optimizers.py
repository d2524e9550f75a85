"""Optimisers: PyTorch's own, LARS for large batches, Muon for short runs, and SGD on rows for the class matrix."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, assert_never

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from fr_core.config import Config, rate_scale
from fr_core.config.methods import BigFace
from fr_core.config.optim import LARS, SGD, AdamW, Muon
from fr_core.device import multiplies_bfloat16
from fr_core.heads.head import Head
from fr_core.heads.streamed import TileSGD
from fr_core.ranks import Ranks
from fr_core.undo import Undo, fill, flat


def move_weights(optimizer: torch.optim.Optimizer, good: Tensor) -> None:
    """Let an optimiser take a step if it is good: bool scalar on the weights' device.

    The host knows at once what a CPU found. On a card the optimiser itself looks at ``found_inf``, which is 1 in a bad
    step. PyTorch's fused optimisers know this tensor from ``GradScaler``.
    """
    if good.is_cuda:
        optimizer.found_inf = 1 - good.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif good:
        optimizer.step()


class OwnOptimizer(torch.optim.Optimizer):
    """An optimiser of this project. In a bad step on a card it moves nothing."""

    found_inf: Tensor | None = None  # set by move_weights on a card: 1 in a bad step, else 0

    @contextmanager
    def undone_if_bad(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Undo what the block does to tensors, if the step is bad."""
        if self.found_inf is None:
            yield
            return
        undo = Undo(tensors)
        yield
        undo.unless(self.found_inf == 0)

    def momentum_of(self, param: Tensor) -> Tensor:
        """Return the momentum of a parameter, which begins as zero."""
        if "momentum_buffer" not in self.state[param]:
            self.state[param]["momentum_buffer"] = torch.zeros_like(param)
        return self.state[param]["momentum_buffer"]


class RowSGD(OwnOptimizer):
    """SGD with momentum and weight decay that moves only the rows of a sparse gradient.

    A dense update would also move the rows that were not sampled, by their momentum and weight decay. In the fused mode
    the head moves the rows itself (:meth:`tile_sgd`), and ``step`` has no gradient to apply.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def tile_sgd(self) -> TileSGD:
        """Return the settings of this step, for a head that moves its rows itself."""
        (group,) = self.param_groups
        (param,) = group["params"]
        return TileSGD(self.momentum_of(param), group["lr"], group["momentum"], group["weight_decay"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the rows that have a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                grad = param.grad.coalesce()
                rows, values = grad.indices()[0], grad.values()
                buffer = self.momentum_of(param)
                current, momentum = param[rows], buffer[rows]
                with self.undone_if_bad([current, momentum]):
                    momentum.mul_(group["momentum"]).add_(values).add_(current, alpha=group["weight_decay"])
                    current.sub_(momentum, alpha=group["lr"])
                buffer[rows] = momentum
                param[rows] = current


class LayerwiseSGD(OwnOptimizer):
    """LARS: v ← μ·v + lr·r·(g + β·w), w ← w − v, with r = trust·‖w‖ / (‖g‖ + β·‖w‖) for each tensor.

    You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", 2017, algorithm 1. r is 1 in groups with
    ``adapt = False``, and where a tensor or its gradient is all zero.
    """

    def __init__(self, params: ParamsT, lr: float, momentum: float, weight_decay: float, trust: float) -> None:
        given = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": True}
        super().__init__(params, given)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move all parameters by LARS."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            buffers = [self.momentum_of(param) for param in params]
            with self.undone_if_bad([*params, *buffers]):
                moves = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
                if group["adapt"]:
                    weights = torch.stack(torch._foreach_norm(params))
                    grads = torch.stack(torch._foreach_norm([p.grad for p in params]))
                    rates = group["trust"] * weights / (grads + group["weight_decay"] * weights)
                    rates = torch.where((weights > 0) & (grads > 0), rates, 1.0)
                    torch._foreach_mul_(moves, list(rates.unbind()))
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, moves, alpha=group["lr"])
                torch._foreach_sub_(params, buffers)


class OrthogonalSGD(OwnOptimizer):
    """Muon: v ← μ·v + g, w ← (1 − η·λ)·w − η·√max(1, m/n)·O(g + μ·v) for a matrix w [m, n], O as :func:`orthogonal`.

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. A convolution is treated as the
    matrix of its m filters. Groups with ``adapt = False`` move by SGD: v ← μ·v + g + λ·w, w ← w − η·v.
    """

    def __init__(self, params: ParamsT, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "adapt": True})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move matrices by Muon, and other parameters by SGD."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            rate, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
            grads, buffers = [p.grad for p in params], [self.momentum_of(param) for param in params]
            with self.undone_if_bad([*params, *buffers]):
                torch._foreach_mul_(buffers, momentum)
                torch._foreach_add_(buffers, grads)
                if not group["adapt"]:
                    torch._foreach_add_(buffers, params, alpha=decay)
                    torch._foreach_sub_(params, buffers, alpha=rate)
                    continue
                torch._foreach_mul_(params, 1 - rate * decay)
                ahead = torch._foreach_add(grads, buffers, alpha=momentum)
                for alike in by_shape(ahead):
                    moves = orthogonal(torch.stack([ahead[i].flatten(1) for i in alike]))
                    tall = max(1.0, moves.shape[1] / moves.shape[2]) ** 0.5
                    shaped = [move.view(params[i].shape) for i, move in zip(alike, moves, strict=True)]
                    torch._foreach_sub_([params[i] for i in alike], shaped, alpha=rate * tall)


def by_shape(tensors: Sequence[Tensor]) -> Iterable[list[int]]:
    """Group tensors of equal shape: the places of each group."""
    places: dict[torch.Size, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        places[tensor.shape].append(i)
    return places.values()


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return about U·Vᵀ for each matrix U·S·Vᵀ of a stack [n, rows, columns], by a Newton–Schulz iteration.

    The singular values of the result lie between about 0.7 and 1.2. The polynomial is Jordan's (Jordan et al., 2024).
    The iteration runs in bfloat16 where the processor multiplies it natively.
    """
    coarse = torch.bfloat16 if multiplies_bfloat16(matrices.device) else torch.float32
    is_tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.to(coarse).mT if is_tall else matrices.to(coarse)
    wide = wide / (torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), wide, beta=3.4445)
    return (wide.mT if is_tall else wide).to(matrices.dtype)


class ShardedOptimizer(torch.optim.Optimizer):
    """An optimiser whose state is split over the ranks: each rank moves its share of the parameters for all.

    The moved parameters travel in one collective. Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training
    Trillion Parameter Models", SC 2020 (stage 1).

    Args:
        groups: parameter groups of the optimiser that is split.
        made: its class.
        given: its settings.
    """

    found_inf: Tensor | None = None  # set by move_weights on a card

    def __init__(
        self, groups: list[dict[str, Any]], made: type[torch.optim.Optimizer], ranks: Ranks, given: dict[str, Any]
    ) -> None:
        super().__init__(groups, given)
        self.ranks = ranks
        self.shares = shares([param for group in groups for param in group["params"]], ranks.size)
        own = set(self.shares[ranks.rank])
        self.optim = made([group | {"params": [p for p in group["params"] if p in own]} for group in groups], **given)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move this rank's share, and take over what the other ranks moved."""
        for own, group in zip(self.optim.param_groups, self.param_groups, strict=True):
            own["lr"] = group["lr"]
        if self.found_inf is not None:
            self.optim.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.optim.step()
        sizes = [sum(param.numel() for param in share) for share in self.shares]
        own_share = self.shares[self.ranks.rank]
        moved = self.param_groups[0]["params"][0].new_zeros(max(sizes))
        if own_share:
            moved[: sizes[self.ranks.rank]] = flat(own_share)
        gathered = self.ranks.gather(moved).chunk(self.ranks.size)
        for share, size, theirs in zip(self.shares, sizes, gathered, strict=True):
            if share and share is not own_share:
                fill(share, theirs[:size])


def shares(params: Sequence[Tensor], ranks: int) -> list[list[Tensor]]:
    """Deal parameters to ranks, the largest first, each to the rank that has the fewest numbers."""
    dealt: list[list[Tensor]] = [[] for _ in range(ranks)]
    sizes = [0] * ranks
    for param in sorted(params, key=Tensor.numel, reverse=True):
        least = sizes.index(min(sizes))
        dealt[least].append(param)
        sizes[least] += param.numel()
    return dealt


def by_rate(group: dict[str, Any], rates: Mapping[Tensor, float]) -> list[dict[str, Any]]:
    """Split a parameter group by the shares of its rate that its parameters have, the largest share first."""
    parts: dict[float, list[Tensor]] = defaultdict(list)
    for param in group["params"]:
        parts[rates.get(param, 1.0)].append(param)
    return [group | {"params": parts[share], "lr": share * group["lr"]} for share in sorted(parts, reverse=True)]


def make_optimizers(
    config: Config, backbone: nn.Module, head: Head | None, ranks: Ranks, rates: Mapping[Tensor, float] | None = None
) -> dict[str, torch.optim.Optimizer]:
    """Return the optimisers by name: "backbone", and "head" if there is a class matrix.

    Each parameter group keeps its base rate as ``initial_lr``, like in PyTorch's schedulers. The base rate follows the
    linear scaling rule (Goyal et al., "Accurate, Large Minibatch SGD", 2017).

    Args:
        rates: the share of the base rate of each parameter of the backbone; those that it lacks have all of it.

    Raises:
        ValueError: the head's parameters and ``sharded`` differ, or the method states no class matrix for them.
    """
    optim, scale = config.optim, rate_scale(config)
    trained = [p for p in backbone.parameters() if p.requires_grad]
    matrices = {"params": [p for p in trained if p.ndim > 1], "weight_decay": optim.weight_decay}
    vectors: dict[str, object] = {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}
    given: dict[str, Any] = {"lr": scale * optim.lr, "weight_decay": optim.weight_decay}
    fused = {"fused": any(param.is_cuda for param in trained)}  # takes found_inf of move_weights
    made: type[torch.optim.Optimizer]
    match optim:
        case SGD():
            made, given = torch.optim.SGD, given | fused | {"momentum": optim.momentum, "nesterov": optim.nesterov}
            vectors["weight_decay"] = optim.weight_decay if optim.decay_all else 0.0
        case LARS():
            made, given = LayerwiseSGD, given | {"momentum": optim.momentum, "trust": optim.trust}
            vectors["adapt"] = False
        case AdamW():
            made, given = torch.optim.AdamW, given | fused | {"betas": (optim.beta1, optim.beta2)}
        case Muon():
            made, given = OrthogonalSGD, given | {"momentum": optim.momentum}
            vectors |= {"adapt": False, "lr": scale * optim.sgd.lr, "momentum": optim.sgd.momentum}
            vectors["weight_decay"] = optim.sgd.weight_decay
        case _ as unknown:
            assert_never(unknown)
    groups = [part for group in (matrices, vectors) for part in by_rate(given | group, rates or {})]
    split = optim.shard_state and ranks.size > 1
    body = ShardedOptimizer(groups, made, ranks, given) if split else made(groups, **given)
    optimizers: dict[str, torch.optim.Optimizer] = {"backbone": body}
    matrix = config.method.class_matrix
    names = {name for name, _ in head.named_parameters()} if head else set()
    if names != set(head.sharded if head else ()) or bool(names) != bool(matrix):
        raise ValueError(
            f"{config.method.kind}: the parameters of a head must be named in its `sharded`, and its method must state "
            f"a class_matrix; parameters of this head: {', '.join(sorted(names)) or 'none'}"
        )
    if matrix and head:
        optimizers["head"] = head_optimizer(config, matrix, head, scale)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def head_optimizer(config: Config, method: BigFace, head: nn.Module, scale: float = 1.0) -> torch.optim.Optimizer:
    """Return SGD for the class matrix: :class:`RowSGD` if rows are sampled or the head is fused, else dense SGD."""
    optim, own = config.optim, config.optim.head
    like = optim.sgd if isinstance(optim, Muon) else optim
    momentum, decay = (0.9, 5e-4) if isinstance(like, AdamW) else (like.momentum, like.weight_decay)
    given: dict[str, Any] = {
        "lr": scale * (like.lr if own.lr is None else own.lr),
        "momentum": momentum if own.momentum is None else own.momentum,
        "weight_decay": decay if own.weight_decay is None else own.weight_decay,
    }
    if method.sample_rate < 1 or method.update == "fused":
        return RowSGD(head.parameters(), **given)
    return torch.optim.SGD(head.parameters(), **given, fused=any(param.is_cuda for param in head.parameters()))
