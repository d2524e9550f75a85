"""What a run keeps in the memory of one card, by part, computed without a card and without allocating it.

Legend: B images of a rank's micro-batch, G = B × ranks, D embedding, S a rank's rows of the class matrix, T one tile.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from fr_core.config import AdamW, Config, Net
from fr_core.heads.streamed import tile_size
from fr_core.nets.open import Backbone, build_net
from fr_core.ranks import Ranks

FLOAT = 4  # bytes
GPU = torch.device("cuda")
CONTEXT = 3 * 2**28  # bytes that CUDA, its libraries and the allocator's rounding take: assumed, not computed
LOGIT_TEMPORARIES = 3  # tensors of a tile's logits that live at once


def memory(config: Config, identities: int, gpus: int) -> dict[str, int]:
    """Bytes on rank 0's card, by part; their ``total`` is the peak of a step.

    ``activations`` and ``tile`` live in the backward pass, ``update`` (the optimisers' temporaries) after it: the
    larger of the two counts.
    """
    lo, hi = Ranks(0, gpus).split(identities)
    rows, embedding = hi - lo, config.net.embedding
    sampled = max(1, int(config.method.sample_rate * rows))
    micro = config.train.global_batch // config.train.accumulate
    precision = "bfloat16" if config.train.precision == "auto" else config.train.precision
    trained, activations = backbone_bytes(config.net, -(-micro // gpus), precision)
    fused, sparse = config.method.update == "fused", config.method.sample_rate < 1
    moments = 2 if isinstance(config.optim, AdamW) else 1
    matrix, gradient = FLOAT * rows * embedding, 0 if fused else FLOAT * sampled * embedding
    tile = min(config.method.tile or tile_size(micro, embedding, GPU), sampled)
    operands = 2 * tile * (micro + embedding) if config.method.precision == "bfloat16" else 0
    gathered = FLOAT * tile * embedding * (1 + fused) if sparse else 0
    parts = {
        "backbone": trained * (2 + (gpus > 1) + (config.train.ema > 0)),  # weights, gradient, buckets, average
        "backbone_optimizer": trained * moments // (gpus if config.optim.shard_state else 1),
        "class_matrix": matrix,
        "class_momentum": matrix,
        "class_gradient": gradient,
        "activations": activations,
        "tile": FLOAT * LOGIT_TEMPORARIES * micro * tile + operands + gathered,
        "update": max(trained, gradient * (3 if sparse else 1)),
        "context": CONTEXT,
    }
    working = max(parts["activations"] + parts["tile"], parts["update"])
    kept = ("backbone", "backbone_optimizer", "class_matrix", "class_momentum", "class_gradient", "context")
    return parts | {"total": working + sum(parts[name] for name in kept)}


@lru_cache
def backbone_bytes(net: Net, batch: int, precision: str) -> tuple[int, int]:
    """Bytes of a backbone's float32 weights, and of what its forward pass saves for the backward pass.

    Runs the net on fake tensors, which have shapes and no memory.
    """
    with FakeTensorMode():
        module = build_net(net).train()
        images = torch.empty(batch, 3, net.input_size, net.input_size)
        weights = sum(p.nbytes for p in (*module.parameters(), *module.buffers()))
        return weights, saved_bytes(module, images, precision)


def saved_bytes(module: Backbone, images_BCHW: Tensor, precision: str) -> int:
    """Bytes that autograd keeps of one forward pass, each storage once, weights and buffers not counted."""
    own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    saved: dict[int, Tensor] = {}  # holding the tensors keeps their addresses from being used again

    def keep(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    dtype = getattr(torch, precision)
    autocast = torch.autocast(images_BCHW.device.type, dtype, enabled=dtype != torch.float32)
    with saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        module(images_BCHW)
    return sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in own)
