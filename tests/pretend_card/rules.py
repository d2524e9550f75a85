"""What PyTorch does with CUDA tensors: what it refuses, launches, waits for, and copies unasked."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from tests.pretend_card.tensor import CardTensor

aten = torch.ops.aten

COPIES = {aten._to_copy, aten.copy_}
READS_INDEXED = {aten.index, aten._unsafe_index}
WRITES_INDEXED = {aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index_put}
INDEXED = READS_INDEXED | WRITES_INDEXED
WAITS = {  # the host must know the answer, or the size of the result
    aten._local_scalar_dense: "item",
    aten._coalesce: "coalesce",
    aten._unique2: "unique",
    aten.bincount: "bincount",
    aten.equal: "equal",
    aten.masked_select: "masked_select",
    aten.nonzero: "nonzero",
    aten.repeat_interleave: "repeat_interleave",
    aten.unique_consecutive: "unique",
    aten.unique_dim: "unique",
}
NO_LAUNCH = {  # they set sizes or allocate memory
    aten._coalesced_,
    aten._sparse_coo_tensor_with_dims_and_tensors,
    aten._unsafe_view,
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten.record_stream,
    aten.resize_,
    aten.set_,
}
UNREPEATABLE = {  # with deterministic algorithms, CUDA refuses them (torch.use_deterministic_algorithms)
    *(getattr(aten, f"_adaptive_avg_pool{n}d_backward") for n in (2, 3)),
    *(getattr(aten, f"adaptive_max_pool{n}d_backward") for n in (2, 3)),
    *(getattr(aten, f"fractional_max_pool{n}d_backward") for n in (2, 3)),
    *(getattr(aten, f"max_unpool{n}d") for n in (2, 3)),
    *(getattr(aten, f"reflection_pad{n}d_backward") for n in (1, 2, 3)),
    *(getattr(aten, f"upsample_{name}_backward") for name in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")),
    aten.avg_pool3d_backward,
    aten.bincount,
    aten.cumsum,
    aten.grid_sampler_2d_backward,
    aten.histc,
    aten.kthvalue,
    aten.median,
    aten.nll_loss_forward,
    aten.nll_loss2d_forward,
    aten.put_,
}
ALL_ALIKE = {aten.cat, aten.stack, aten.searchsorted}  # they take no CPU scalar beside tensors of a card


def goes_to_card(packet: OpOverloadPacket, args: Any, kwargs: Any, from_card: bool) -> bool:
    """Tell whether an operator's results lie on the card: where its ``device`` says, else where its tensors are."""
    if packet is aten.copy_:
        return isinstance(args[0], CardTensor)
    device = kwargs.get("device")
    return from_card if device is None else torch.device(device).type == "cuda"


def refuse_mixture(func: OpOverload, args: Any, kwargs: Any, inputs: list[Tensor]) -> None:
    """Refuse operators that CUDA refuses: of tensors of the host and of the card.

    CUDA takes a CPU scalar beside its tensors in most operators, and CPU indices of its tensors.

    Raises:
        RuntimeError: as PyTorch does.
    """
    packet = func.overloadpacket
    if packet in COPIES:
        return
    stray = [x for x in inputs if not isinstance(x, CardTensor) and (x.dim() > 0 or packet in ALL_ALIKE)]
    if packet in INDEXED and isinstance(args[0], CardTensor):
        stray = [x for x in stray if not any(x is index for index in args[1])]
    if stray:
        shapes = ", ".join(str(tuple(x.shape)) for x in stray)
        raise RuntimeError(f"{func}: tensors on two devices, cuda:0 and cpu; shapes on the cpu: {shapes}")


def hidden_copies(func: OpOverload, args: Any, inputs: list[Tensor]) -> list[Tensor]:
    """List the CPU tensors that an operator on the card first copies there: indices, and scalars of some operators."""
    packet = func.overloadpacket
    if packet not in INDEXED | {aten.where} or is_masked_fill(packet, args):
        return []
    return [x for x in inputs if not isinstance(x, CardTensor)]


def is_masked_fill(packet: OpOverloadPacket, args: Any) -> bool:
    """Tell whether an indexed assignment puts a number where a mask says; it then runs as ``masked_fill_``."""
    if packet not in WRITES_INDEXED:
        return False
    indices, value = [index for index in args[1] if index is not None], args[2]
    return len(indices) == 1 and is_mask(indices[0]) and not isinstance(value, CardTensor) and value.numel() == 1


def is_mask(index: Tensor | None) -> bool:
    """Tell whether an index is boolean; uint8 is PyTorch's older form."""
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def wait_of(packet: OpOverloadPacket, args: Any, kwargs: Any) -> str | None:
    """Return why the host waits for the card's answer in an operator, or None."""
    if packet in INDEXED and any(map(is_mask, args[1])) and not is_masked_fill(packet, args):
        return "boolean index"
    if packet is aten.repeat_interleave and kwargs.get("output_size") is not None:
        return None
    return WAITS.get(packet)


@cache
def is_composite(func: OpOverload) -> bool:
    """Tell whether an operator only calls other operators."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@cache
def launches(func: OpOverload) -> bool:
    """Tell whether an operator starts work on a card: views, allocations and questions about sizes do not."""
    if func.overloadpacket in NO_LAUNCH or is_view(func):
        return False
    gives_tensor = any("Tensor" in str(r.type) for r in func._schema.returns)
    return gives_tensor or func._schema.is_mutable or func.overloadpacket is aten.equal


@cache
def is_view(func: OpOverload) -> bool:
    """Tell whether an operator returns memory that it was given, unchanged."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def written_arguments(func: OpOverload, args: Any, kwargs: Any) -> list[Any]:
    """List the arguments that an operator changes and returns; in-place operators return their own tensor."""
    places = written_places(func)
    return [args[place] if place < len(args) else kwargs[name] for place, name in places]


@cache
def written_places(func: OpOverload) -> list[tuple[int, str]]:
    """List place and name of the arguments that an operator changes and returns."""
    if not any(r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns):
        return []
    arguments = enumerate(func._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]
