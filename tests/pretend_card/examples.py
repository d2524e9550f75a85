"""Small programs for the pretend card, of which one knows what a card does: the test of the tool itself."""

from collections.abc import Callable
from typing import Any

import torch

from tests.pretend_card.card import PretendCard
from tests.pretend_card.tensor import CARD


def run_examples(card: PretendCard) -> dict[str, dict[str, Any]]:
    """Return for each program what it counts, or what it is refused."""
    return {name: outcome(card, program) for name, program in PROGRAMS.items()}


def outcome(card: PretendCard, program: Callable[[torch.Tensor, torch.Tensor], object]) -> dict[str, Any]:
    """Run a program on a tensor of the card and one of the host, each [[-2, -1, 0], [1, 2, 3]]."""
    host = torch.arange(-2.0, 4.0).view(2, 3)
    with card:
        there = host.to(CARD)
        card.counts.clear()
        try:
            program(there, host)
        except (RuntimeError, TypeError) as error:
            return {"refused": f"{type(error).__name__}: {error}"}
    counts = card.counts
    return {
        "operators": counts.operators.total(),
        "waits": [event.what for event in counts.waits.elements()],
        "copies": [[event.what, counts.copied[event]] for event in counts.copies],
    }


def train_a_layer(x: torch.Tensor, host: torch.Tensor) -> None:
    """Take two steps with a layer that was made on the host."""
    layer = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(layer.to(x.device).parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()


def assign(x: torch.Tensor, index: Any, value: Any) -> None:
    """Set elements of a tensor."""
    x[index] = value


PROGRAMS: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "mixed devices": lambda x, host: x + host,
    "mixed in a list": lambda x, host: torch.cat([x, host]),
    "a scalar of the host in a list": lambda x, host: torch.stack([x.sum(), host.sum()]),
    "a host's tensor by a card's index": lambda x, host: host[x.argmax(0)],
    "numpy": lambda x, host: x.numpy(),
    "random numbers of the host": lambda x, host: torch.rand(3, device=CARD, generator=torch.Generator()),
    "views": lambda x, host: x.T[1:].unsqueeze(0).expand(4, 2, 2).split(2),
    "memory": lambda x, host: torch.empty_like(x).new_empty(3),
    "arithmetic": lambda x, host: (x * 2).add_(x).sum(),
    "a scalar of the host": lambda x, host: x * host.sum(),
    "item": lambda x, host: x.sum().item(),
    "a condition": lambda x, host: 1 if x.sum() > 0 else 0,
    "tolist": lambda x, host: x.tolist(),
    "nonzero": lambda x, host: x.nonzero(),
    "unique": lambda x, host: x.unique(),
    "equal": lambda x, host: torch.equal(x, x),
    "repeats": lambda x, host: x[:, 0].repeat_interleave(x[1, :2].long()),
    "repeats of known sum": lambda x, host: x[:, 0].repeat_interleave(x[1, :2].long(), output_size=3),
    "boolean index": lambda x, host: x[x > 0],
    "a number by a mask": lambda x, host: assign(x, x > 0, 7.0),
    "values by a mask": lambda x, host: assign(x, x > 0, x[0] + 1),
    "a number by indices": lambda x, host: assign(x, x[0].long().clamp(0, 1), 7.0),
    "a list of indices": lambda x, host: x[[0, 1]],
    "from the host": lambda x, host: host.to(CARD),
    "from pinned memory": lambda x, host: host.pin_memory().to(CARD, non_blocking=True),
    "from pageable memory, not blocking": lambda x, host: host.to(CARD, non_blocking=True),
    "to the host": lambda x, host: x.cpu(),
    "to the host, not blocking": lambda x, host: x.to("cpu", non_blocking=True),
    "a new tensor": lambda x, host: torch.tensor([1, 2], device=CARD),
    "synchronize": lambda x, host: torch.cuda.synchronize(),
    "training": train_a_layer,
}
