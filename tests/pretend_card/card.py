"""A pretend CUDA card: tensors that say ``cuda:0``, hold a CPU tensor, and refuse what a card refuses.

:class:`PretendCard` runs every operator on the held tensors, and counts what it would cost a card. It follows what
PyTorch does for CUDA. So a blocking copy makes the host wait, and an indexed assignment of a number copies it to the
card. It does not know times, kernels, streams, NCCL or a card's rounding.

It changes torch for the whole process, which must have loaded the library of ``build.py`` before torch.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.optim.optimizer import _foreach_supported_types
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretend_card.counts import Counts
from tests.pretend_card.rules import (
    COPIES,
    UNREPEATABLE,
    goes_to_card,
    hidden_copies,
    is_composite,
    is_view,
    launches,
    refuse_mixture,
    wait_of,
    written_arguments,
)
from tests.pretend_card.tensor import CardTensor, held, mapped, on_card, tensors

aten = torch.ops.aten


class PretendCard(TorchDispatchMode):
    """The context in which the pretend card works; ``counts`` has what it did."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.pinned: dict[int, torch.UntypedStorage] = {}  # by address; kept, so that no other storage takes the place

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, on the card if its tensors or its device say so."""
        kwargs = kwargs or {}
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") of this thread copies by an operator
        if is_composite(func):  # in inference mode they come whole
            with self:
                return func.decompose(*args, **kwargs)
        packet = func.overloadpacket
        inputs = list(tensors([args, kwargs]))
        from_card = any(isinstance(x, CardTensor) for x in inputs)
        to_card = goes_to_card(packet, args, kwargs, from_card)
        if not from_card and not to_card:
            return self.on_host(func, args, kwargs)
        if generator := kwargs.get("generator"):
            CardGenerator.refuse_the_host(generator)
        refuse_mixture(func, args, kwargs, inputs)
        self.count(func, args, kwargs, inputs, to_card)
        own = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        found = run_held(func, mapped(args, held), mapped(own, held))
        if written := written_arguments(func, args, kwargs):
            return written[0] if len(written) == 1 else tuple(written)
        if not to_card:
            return found
        if is_view(func) and torch.is_inference_mode_enabled():  # a view of a trained weight must stay a normal tensor
            with torch.inference_mode(inputs[0].is_inference()):
                return mapped(found, on_card)
        return mapped(found, on_card)

    def on_host(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """Run an operator that concerns the host alone; pinned memory is pretended."""
        packet = func.overloadpacket
        if packet is aten.is_pinned:
            return self.is_pinned(args[0])
        if packet is aten._pin_memory:
            return self.pin(args[0].clone())
        if kwargs.get("pin_memory"):
            return self.pin(func(*args, **{**kwargs, "pin_memory": False}))
        return func(*args, **kwargs)

    def pin(self, x: torch.Tensor) -> torch.Tensor:
        """Remember that the memory of a host's tensor is pinned."""
        storage = x.untyped_storage()
        self.pinned[storage.data_ptr()] = storage
        return x

    def is_pinned(self, x: torch.Tensor) -> bool:
        """Tell whether the memory of a host's tensor is pinned."""
        return x.untyped_storage().data_ptr() in self.pinned

    def count(self, func: OpOverload, args: Any, kwargs: Any, inputs: list[torch.Tensor], to_card: bool) -> None:
        """Count the operator, its waits and its copies."""
        packet = func.overloadpacket
        source = args[1] if packet is aten.copy_ else args[0] if packet in COPIES else None
        if source is not None and isinstance(source, CardTensor) != to_card:
            beside = self.runs_beside(packet, args, kwargs, to_card)
            self.counts.copy(("to card" if to_card else "to host") + (", pinned" if beside else ""), source.nbytes)
            if not to_card and not beside:
                self.counts.wait("copy to host")
            return
        for x in hidden_copies(func, args, inputs):
            self.counts.copy("to card", x.nbytes)
        if wait := wait_of(packet, args, kwargs):
            self.counts.wait(wait)
        if packet in UNREPEATABLE:
            self.counts.unrepeatable.add(str(packet))
        if launches(func):
            self.counts.operator(str(packet))

    def runs_beside(self, packet: OpOverloadPacket, args: Any, kwargs: Any, to_card: bool) -> bool:
        """Tell whether a copy between host and card runs beside the host, from or to pinned memory.

        A new tensor on the host gets pinned memory from PyTorch if the copy shall not block.
        """
        in_place = packet is aten.copy_
        if not (kwargs.get("non_blocking") or (in_place and args[2:] == (True,))):
            return False
        if in_place:
            return self.is_pinned(args[1] if to_card else args[0])
        return not to_card or self.is_pinned(args[0])


def run_held(func: OpOverload, args: Any, kwargs: Any) -> Any:
    """Run an operator on CPU tensors; CUDA's product of bfloat16 with float32 sums has no CPU kernel."""
    if func is aten.mm.dtype:
        left, right, wide = args
        return left.to(wide) @ right.to(wide)
    return func(*args, **kwargs)


class CardGenerator(torch.Generator):
    """A generator of random numbers; that of the card draws on the host, and is known by its address."""

    of_card: ClassVar[dict[int, torch.Generator]] = {}

    def __new__(cls, device: torch.device | str = "cpu") -> "CardGenerator":
        """Make a generator of a device."""
        made = super().__new__(cls)
        if torch.device(device).type == "cuda":
            cls.of_card[made._cdata] = made
        return made

    @classmethod
    def refuse_the_host(cls, given: torch.Generator) -> None:
        """Refuse a generator of the host, as CUDA does."""
        if given._cdata not in cls.of_card:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


class CardQueue:
    """The queue of a card, which does everything at once; it stands for streams and events.

    Who asks for an event in the step that recorded it waits for all of the step. In a later step the card has more to
    do meanwhile, and nothing is counted.
    """

    counts: Counts

    def __init__(self, *_: Any) -> None:
        self.recorded: int | None = None

    def record_event(self) -> "CardQueue":
        """Mark the place that the queue has reached."""
        event = CardQueue()
        event.recorded = self.counts.period
        return event

    def synchronize(self) -> None:
        """Wait for an event."""
        if self.recorded == self.counts.period:
            self.counts.wait("event")

    def wait_stream(self, other: "CardQueue") -> None:
        """Let the card wait; the host does not."""


def plug_in() -> PretendCard:
    """Change torch in this process as if it had a card of the newest kind; return the card, to be entered."""
    card = PretendCard()
    CardQueue.counts = card.counts
    answers: dict[str, Callable[..., Any]] = {
        "_lazy_init": lambda: None,
        "current_device": lambda: 0,
        "current_stream": CardQueue,
        "device_count": lambda: 1,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "pretend card",
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "max_memory_allocated": lambda *_: 0,
        "stream": nullcontext,
        "Stream": CardQueue,
        "synchronize": lambda *_: card.counts.wait("synchronize"),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.Generator = CardGenerator  # type: ignore[misc]
    torch.Tensor.pin_memory = lambda x: x if card.is_pinned(x) else card.pin(x.clone())  # type: ignore[method-assign]
    torch.Tensor.record_stream = lambda x, queue: None  # type: ignore[method-assign, assignment]
    torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to cannot fill a CPU parameter with a card's
    _foreach_supported_types.append(CardTensor)  # as for torch.Tensor
    return card
