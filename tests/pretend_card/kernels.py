"""Runs Triton's kernels on the pretend card, by Triton's interpreter on the held tensors; each is one launch."""

from typing import Any

from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from fr_core.heads import kernels
from tests.helpers.interpreter import mend_interpreter
from tests.pretend_card.card import PretendCard
from tests.pretend_card.tensor import CardTensor, held


def run_kernels(card: PretendCard) -> None:
    """Let kernels take tensors of the card, and count them; ``TRITON_INTERPRET`` must be set."""
    mend_interpreter()
    kernels.block_sizes = lambda _: (32, 64)  # few large blocks: the interpreter runs one program after the other
    run = GridExecutor.__call__

    def launch(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        given = [*args, *kwargs.values()]
        if any(isinstance(x, Tensor) and not isinstance(x, CardTensor) for x in given):
            raise RuntimeError(f"{executor.fn.__name__}: a kernel got a tensor of the host")
        card.counts.operator(f"triton {executor.fn.__name__}")
        run(executor, *map(held, args), **{name: held(value) for name, value in kwargs.items()})

    GridExecutor.__call__ = launch
