"""Tensors of the pretend card, and how arguments of operators change between card and host."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

CARD = torch.device("cuda", 0)
HOST = torch.device("cpu")


class CardTensor(Tensor):
    """A tensor of the pretend card; ``held`` is the CPU tensor that has its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> "CardTensor":
        """Wrap a CPU tensor."""
        kind: dict[str, Any] = {"dtype": held.dtype, "layout": held.layout, "device": CARD}
        if held.layout == torch.strided:
            kind |= {"strides": held.stride(), "storage_offset": held.storage_offset()}
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.shape, **kind)
        tensor.held = held
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CardTensor({tuple(self.shape)}, {self.dtype})"

    def __format__(self, form: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), form)

    def tolist(self) -> Any:
        """Copy to the host and wait, as CUDA does."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse to show a card's memory to NumPy, as CUDA does."""
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy: copy it to the host first")
        return self.detach().cpu().numpy()

    def __array__(self, *_: Any) -> Any:
        return self.numpy()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func} on a tensor of the pretend card, but no PretendCard is active in this thread")


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield all tensors among an operator's arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return an operator's arguments or results, with each value changed."""
    if isinstance(value, list | tuple):
        return type(value)(mapped(item, change) for item in value)
    if isinstance(value, dict):
        return {name: mapped(item, change) for name, item in value.items()}
    return change(value)


def held(value: Any) -> Any:
    """Return what the CPU computes with instead: the held tensor, the CPU."""
    if isinstance(value, CardTensor):
        return value.held
    return HOST if isinstance(value, torch.device) and value.type == "cuda" else value


def on_card(value: Any) -> Any:
    """Wrap a result."""
    return CardTensor(value) if isinstance(value, Tensor) else value
