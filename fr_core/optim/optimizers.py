"""Optimisers: PyTorch's own, LARS for large batches, Muon for short runs, and SGD on rows for the class matrix."""

from collections.abc import Iterable
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


class RowSGD(torch.optim.Optimizer):
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
        return TileSGD(self._momentum(param), group["lr"], group["momentum"], group["weight_decay"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the rows that have a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                grad = param.grad.coalesce()
                rows, values = grad.indices()[0], grad.values()
                buffer = self._momentum(param)
                current = param[rows]
                moved = buffer[rows].mul_(group["momentum"]).add_(values).add_(current, alpha=group["weight_decay"])
                buffer[rows] = moved
                param[rows] = current.sub_(moved, alpha=group["lr"])

    def _momentum(self, param: Tensor) -> Tensor:
        if "momentum_buffer" not in self.state[param]:
            self.state[param]["momentum_buffer"] = torch.zeros_like(param)
        return self.state[param]["momentum_buffer"]


class LayerwiseSGD(torch.optim.Optimizer):
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
            for param in params:
                if "momentum_buffer" not in self.state[param]:
                    self.state[param]["momentum_buffer"] = torch.zeros_like(param)
            moves = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
            if group["adapt"]:
                weights = torch.stack(torch._foreach_norm(params))
                grads = torch.stack(torch._foreach_norm([p.grad for p in params]))
                rates = group["trust"] * weights / (grads + group["weight_decay"] * weights)
                rates = torch.where((weights > 0) & (grads > 0), rates, 1.0)
                torch._foreach_mul_(moves, list(rates.unbind()))
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, moves, alpha=group["lr"])
            torch._foreach_sub_(params, buffers)


class OrthogonalSGD(torch.optim.Optimizer):
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
            rate, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                if "momentum_buffer" not in self.state[param]:
                    self.state[param]["momentum_buffer"] = torch.zeros_like(param)
                buffer = self.state[param]["momentum_buffer"].mul_(momentum).add_(param.grad)
                if not group["adapt"]:
                    buffer.add_(param, alpha=decay)
                    param.sub_(buffer, alpha=rate)
                    continue
                move = orthogonal(torch.add(param.grad, buffer, alpha=momentum).flatten(1))
                tall = max(1.0, move.shape[0] / move.shape[1]) ** 0.5
                param.mul_(1 - rate * decay).sub_(move.view(param.shape), alpha=rate * tall)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return about U·Vᵀ for the matrix U·S·Vᵀ [m, n], by a Newton–Schulz iteration.

    The singular values of the result lie between about 0.7 and 1.2. The polynomial is Jordan's (Jordan et al., 2024).
    The iteration runs in bfloat16 where the processor multiplies it natively.
    """
    coarse = torch.bfloat16 if multiplies_bfloat16(matrix.device) else torch.float32
    wide = matrix.to(coarse) if matrix.shape[0] <= matrix.shape[1] else matrix.to(coarse).T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), wide, beta=3.4445)
    return (wide if matrix.shape[0] <= matrix.shape[1] else wide.T).to(matrix.dtype)


def make_optimizers(
    config: Config, backbone: nn.Module, head: Head | None, ranks: Ranks
) -> dict[str, torch.optim.Optimizer]:
    """Return the optimisers by name: "backbone", and "head" if there is a class matrix.

    Each parameter group keeps its base rate as ``initial_lr``, like in PyTorch's schedulers. The base rate follows the
    linear scaling rule (Goyal et al., "Accurate, Large Minibatch SGD", 2017).

    Raises:
        ValueError: the head's parameters and ``sharded`` differ, or the method states no class matrix for them.
    """
    optim, scale = config.optim, rate_scale(config)
    trained = [p for p in backbone.parameters() if p.requires_grad]
    matrices = {"params": [p for p in trained if p.ndim > 1], "weight_decay": optim.weight_decay}
    vectors: dict[str, object] = {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}
    given: dict[str, Any] = {"lr": scale * optim.lr, "weight_decay": optim.weight_decay}
    made: type[torch.optim.Optimizer]
    match optim:
        case SGD():
            made, given = torch.optim.SGD, given | {"momentum": optim.momentum, "nesterov": optim.nesterov}
            vectors["weight_decay"] = optim.weight_decay if optim.decay_all else 0.0
        case LARS():
            made, given = LayerwiseSGD, given | {"momentum": optim.momentum, "trust": optim.trust}
            vectors["adapt"] = False
        case AdamW():
            made, given = torch.optim.AdamW, given | {"betas": (optim.beta1, optim.beta2)}
        case Muon():
            made, given = OrthogonalSGD, given | {"momentum": optim.momentum}
            vectors |= {"adapt": False, "lr": scale * optim.sgd.lr, "momentum": optim.sgd.momentum}
            vectors["weight_decay"] = optim.sgd.weight_decay
        case _ as unknown:
            assert_never(unknown)
    groups = [group for group in (matrices, vectors) if group["params"]]
    if optim.shard_state and ranks.size > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # a third of the time in which training is imported

        body: torch.optim.Optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=made, **given)
    else:
        body = made(groups, **given)
    optimizers = {"backbone": body}
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
    by_rows = method.sample_rate < 1 or method.update == "fused"
    return (RowSGD if by_rows else torch.optim.SGD)(head.parameters(), **given)


def squared_norm(params: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return the sum of squares of all gradients, dense or sparse: float32 scalar."""
    grads = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in params if p.grad is not None]
    norms = torch._foreach_norm(grads) if grads else []
    return torch.stack([n.float().square() for n in norms]).sum() if grads else torch.zeros((), device=device)
