"""The memory that a run needs, part by part, computed without a GPU and without allocating it.

Legend: B batch, C channels, H W pixels.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from fr_core.config import Config, class_count, spread, step_images
from fr_core.config.methods import BigFace, FixedCentres, PairLoss
from fr_core.config.nets import Net
from fr_core.config.optim import AdamW
from fr_core.data.plan import held_rows
from fr_core.heads.streamed import kernel_tile_size, tile_size
from fr_core.nets.backbone import Backbone
from fr_core.nets.build import build_net
from fr_core.nets.finetune import freeze, set_mode
from fr_core.nets.iresnet import Stage, recompute
from fr_core.nets.onnx_net import OnnxNet
from fr_core.nets.open import open_net
from fr_core.ranks import Ranks
from fr_core.train.initial import segment_blocks
from fr_core.train.work import backbone_size

FLOAT = 4  # bytes
CONTEXT = 3 * 2**28  # bytes for CUDA, its libraries and the allocator's rounding: assumed, not computed
POOL_COPIES = 4  # copies of the pool: current, before the step, concatenated, sorted
READ_WINDOWS = 3  # tables of a window at one time: being read, waiting, and being split
CARD = torch.device("cuda")
PAIR_TEMPORARIES = 3  # tensors of the size of a global batch's pairs at one time


def memory(config: Config, identities: int, gpus: int) -> dict[str, int]:
    """Return the bytes on rank 0's GPU, part by part; ``total`` is the peak of a step.

    Most parts stay during the whole step. The others live in three phases, and the largest phase counts:

    - before the student's forward pass: ``teacher_features``;
    - in the backward pass: ``activations``, and the largest of ``tile``, ``encoder_features`` and ``recomputed``;
    - in the update: ``update``, the temporaries of the optimisers.

    Raises:
        UserError: the teacher does not open.
    """
    rows = class_count(config, identities)
    images = config.train.global_batch // config.train.accumulate
    precision = "bfloat16" if config.train.precision == "auto" else config.train.precision
    trained_images, encoded_images = step_images(config)
    blocks, frozen = segment_blocks(config), config.finetune.freeze
    own = (config.net, -(-trained_images // gpus), precision, blocks, frozen)
    weights, activations, recomputed = backbone_bytes(*own)
    still = FLOAT * (backbone_size(config.net).numbers - backbone_size(config.net, frozen).numbers)
    trained = weights - still
    moments = 2 if isinstance(config.optim, AdamW) else 1
    apart = gpus > 1 and config.train.accumulate > 1  # micro-batch gradients next to DDP's buckets
    method = config.method
    head = {"update": 0}
    if matrix := config.method.class_matrix:
        head = matrix_bytes(config, matrix, rows, gpus)
    elif isinstance(method, FixedCentres):
        head = centre_bytes(config, method, rows, images // gpus)
    parts = {
        "backbone": weights * (1 + (config.train.ema > 0)) + trained * (1 + apart),  # weights, average, gradient
        "backbone_optimizer": trained * moments // (gpus if config.optim.shard_state else 1),
        **head,
        "activations": activations,
        "context": CONTEXT,
    }
    if blocks:
        parts["recomputed"] = recomputed
    if encoded_images:
        parts["encoder"] = weights
        parts["encoder_features"] = feature_bytes(config.net, -(-encoded_images // gpus), precision)
    if method.facts.class_images:
        parts["class_images"] = class_image_bytes(config, -(-encoded_images // gpus), gpus)
    if isinstance(method.agreement, PairLoss):
        parts["pairs"] = FLOAT * 2 * (POOL_COPIES * method.agreement.pool + PAIR_TEMPORARIES * images**2)
    if (who := config.method.taught) and who.teacher:
        given = (who.teacher, who.teacher_net, -(-trained_images // gpus), precision, config.train.trust_code)
        parts["teacher"], parts["teacher_features"] = teacher_bytes(*given)
    parts["update"] = max(trained, head["update"])
    in_turn = max(parts.get(name, 0) for name in ("tile", "encoder_features", "recomputed"))
    working = max(parts.get("teacher_features", 0), activations + in_turn, parts["update"])
    passing = ("teacher_features", "activations", "tile", "encoder_features", "recomputed", "update")
    return parts | {"total": working + sum(size for name, size in parts.items() if name not in passing)}


def class_image_bytes(config: Config, encoded: int, gpus: int) -> int:
    """Return the bytes of the class images of rank 0: uint8, and float32 copies of what an encoder sees at once.

    Args:
        encoded: images that the momentum encoder sees at once, on one GPU.
    """
    pixels = 3 * config.net.input_size**2
    return pixels * (config.method.facts.class_images * config.train.global_batch // gpus + FLOAT * encoded)


def host_bytes(
    config: Config, identities: int, images: int, chunk: int, image_bytes: float, side: int, gpus: int
) -> dict[str, int]:
    """Return the bytes of grouped shards' images that all workers together hold in main memory, or have read ahead.

    Args:
        identities: identities of the training set.
        images: images of the training set.
        chunk: images of a chunk, at most.
        image_bytes: mean bytes of an encoded image.
        side: side of an image in the shards, in pixels.
        gpus: workers.

    Returns:
        encoded and decoded; both 0 with flat shards.
    """
    apart, window = spread(config, identities), config.data.shuffle_window
    if not apart:
        return {"encoded": 0, "decoded": 0}
    held = held_rows(images, chunk, apart, window)
    encoded = int((held + min(images, READ_WINDOWS * window)) * image_bytes)
    decoded = min(held * 3 * side**2, config.data.decoded_mib * 2**20 * gpus)
    return {"encoded": encoded, "decoded": decoded}


def matrix_bytes(config: Config, method: BigFace, classes: int, gpus: int) -> dict[str, int]:
    """Return the bytes of rank 0's rows of the class matrix, and of what a step needs for them."""
    embedding = config.net.embedding
    lo, hi = Ranks(0, gpus).split(classes)
    rows, sampled = method.subcentres * (hi - lo), method.subcentres * max(1, int(method.sample_rate * (hi - lo)))
    micro = config.train.global_batch // config.train.accumulate
    fused, sparse = method.update == "fused", method.sample_rate < 1
    matrix, gradient = FLOAT * rows * embedding, 0 if fused else FLOAT * sampled * embedding
    number = product_bytes(config, method.precision)
    if method.subcentres == 1:
        size = min(method.tile or kernel_tile_size(micro, embedding), sampled)
        tile = tile_bytes(size, micro, embedding, number, own_products=fused)
    else:
        size = method.subcentres * (method.tile or tile_size(micro, embedding, CARD, method.subcentres))
        tile = eager_tile_bytes(min(size, sampled), method.subcentres, micro, embedding, number)
    return {
        "class_matrix": matrix,
        "class_momentum": matrix,
        "class_gradient": gradient,
        "tile": tile,
        "update": gradient * (3 if sparse else 1),
    }


def tile_bytes(tile: int, faces: int, embedding: int, number: int, own_products: bool) -> int:
    """Return the bytes of a tile by Triton's kernels: operands, exponentials, and products if no gradient has a place.

    Args:
        number: bytes of a number of the products.
    """
    operands = number * (tile + faces) * embedding
    return operands + number * faces * tile + (FLOAT * tile * embedding if own_products else 0)


def eager_tile_bytes(tile: int, subcentres: int, faces: int, embedding: int, number: int) -> int:
    """Return the bytes of a tile by PyTorch's operators: operands, logits of rows and of classes, and a product.

    Args:
        tile: rows.
        subcentres: rows of a class. The place of the nearest one takes 8 bytes.
        number: bytes of a number of the products.
    """
    of_rows, of_classes = faces * tile * (2 * FLOAT + number), faces * tile // subcentres * (2 * FLOAT + 8)
    return number * (tile + faces) * embedding + of_rows + of_classes + FLOAT * tile * embedding


def product_bytes(config: Config, given: str) -> int:
    """Return the bytes of an operand's number; ``given`` is the ``precision`` of a method. ``auto`` counts as 2."""
    return FLOAT if (config.train.precision if given == "auto" else given) == "float32" else FLOAT // 2


def centre_bytes(config: Config, method: FixedCentres, classes: int, faces: int) -> dict[str, int]:
    """Return the bytes of fixed centres, and of what a step needs for them. Every rank holds all centres."""
    embedding = config.net.embedding
    precision = config.train.precision if method.precision == "auto" else method.precision
    each = embedding * (FLOAT if precision in ("float32", "float16") else 2)  # float16 products, float32 centres
    centres = method.centres(classes, config.train.global_batch)
    tile = min(method.tile or kernel_tile_size(faces, embedding), centres)
    return {
        "centres": centres * each * method.layers,
        "tile": tile_bytes(tile, faces, embedding, product_bytes(config, method.precision), own_products=False),
        "update": 0,
    }


@lru_cache
def feature_bytes(net: Net, batch: int, precision: str) -> int:
    """Estimate the bytes of a forward pass without gradient: three of the largest feature maps.

    They are the input of a block, and the input and output of the layer at work.
    """
    with FakeTensorMode():
        return 3 * largest_feature(build_net(net), batch, precision)


@lru_cache
def teacher_bytes(ref: str, net: str | None, batch: int, precision: str, trust_code: bool = False) -> tuple[int, int]:
    """Return the bytes of a teacher's weights, and of its forward pass as :func:`feature_bytes` estimates it.

    Raises:
        UserError: as :func:`fr_core.nets.open.open_net`.
    """
    module = open_net(ref, net, torch.device("cpu"), trust_code=trust_code).net
    if isinstance(module, OnnxNet):  # ONNX Runtime runs it on the CPU
        return 0, 0
    weights = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    with FakeTensorMode(allow_non_fake_inputs=True):
        return weights, 3 * largest_feature(module, batch, precision)


@torch.no_grad()
def largest_feature(module: Backbone, batch: int, precision: str) -> int:
    """Return the bytes of the largest output of any layer. In a ``FakeTensorMode`` nothing is allocated."""
    largest = 0

    def look(module: nn.Module, given: tuple[Tensor, ...], out: object) -> None:
        nonlocal largest
        largest = max([largest, *(leaf.nbytes for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])

    for layer in module.modules():
        layer.register_forward_hook(look)
    dtype = getattr(torch, precision)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        module(torch.empty(batch, 3, module.input_size, module.input_size))
    return largest


@lru_cache
def backbone_bytes(
    net: Net, batch: int, precision: str, segment: int | None = None, frozen: tuple[str, ...] = ()
) -> tuple[int, int, int]:
    """Return the bytes of a backbone's float32 weights, of its saved activations, and of a recomputed segment.

    The net runs on fake tensors, which have shapes but no memory.

    Args:
        segment: number of residual blocks that the backward pass recomputes at a time; None: it recomputes none.
        frozen: patterns of weights that stay as they were.
    """
    with FakeTensorMode():
        module = build_net(net)
        set_mode(module, True, freeze(module, frozen))
        images = torch.empty(batch, 3, net.input_size, net.input_size)
        weights = sum(p.nbytes for p in (*module.parameters(), *module.buffers()))
        if segment is None:
            return weights, saved_bytes(module, images, precision), 0
        recompute(module, segment)
        return weights, saved_bytes(module, images, precision), segment_bytes(module, images, precision)


def segment_bytes(module: Backbone, images_BCHW: Tensor, precision: str) -> int:
    """Return the bytes that the largest recomputed segment saves, besides its input."""
    segments = [s for stage in module.modules() if isinstance(stage, Stage) for s in stage.segments()]
    inputs: dict[nn.Module, Tensor] = {}
    for segment in segments:
        segment[0].register_forward_pre_hook(lambda block, given: inputs.update({block: given[0]}))
    with torch.no_grad():
        saved_bytes(module, images_BCHW, precision)
    kept = [saved_bytes(segment, inputs[segment[0]], precision) - inputs[segment[0]].nbytes for segment in segments]
    return max(0, *kept)  # a frozen segment keeps nothing, not even its input


def saved_bytes(module: nn.Module, images_BCHW: Tensor, precision: str) -> int:
    """Return the bytes that autograd saves in one forward pass: each storage once, without weights and buffers."""
    own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    saved: dict[int, Tensor] = {}  # keeping the tensors alive keeps their addresses unique

    def keep(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    dtype = getattr(torch, precision)
    autocast = torch.autocast(images_BCHW.device.type, dtype, enabled=dtype != torch.float32)
    with saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        module(images_BCHW)
    return sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in own)
