"""Optimisers of a run: PyTorch's SGD for dense gradients, and SGD on single rows for Partial FC."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fr_core.config import Method, Optim
from fr_core.heads.streamed import TileSGD


class RowSGD(torch.optim.Optimizer):
    """SGD with momentum and weight decay that moves only the rows which a sparse gradient names.

    A dense update would let the rows that were not sampled drift by their momentum and weight decay. In the fused
    mode the head moves the rows itself (:meth:`tile_sgd`) and ``step`` finds no gradient.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def tile_sgd(self) -> TileSGD:
        """This step's settings, for the head to apply."""
        (group,) = self.param_groups
        (param,) = group["params"]
        return TileSGD(self._momentum(param), group["lr"], group["momentum"], group["weight_decay"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
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


def make_optimizers(config: Optim, method: Method, backbone: nn.Module, head: nn.Module) -> dict[str, Any]:
    """The optimisers of backbone and head, by these names."""
    settings: dict[str, Any] = config.model_dump(include={"lr", "momentum", "weight_decay"})
    trained = [p for p in backbone.parameters() if p.requires_grad]
    head_sgd = RowSGD if method.sample_rate < 1 or method.update == "fused" else torch.optim.SGD
    return {"backbone": torch.optim.SGD(trained, **settings), "head": head_sgd(head.parameters(), **settings)}


def squared_norm(params: Iterable[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of the gradients, dense or sparse: float32 scalar."""
    grads = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in params if p.grad is not None]
    norms = torch._foreach_norm(grads) if grads else []
    return torch.stack([n.float().square() for n in norms]).sum() if grads else torch.zeros((), device=device)
