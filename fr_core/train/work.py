"""The work of one rank in a training step, counted without a card: operators, their FLOPs and their memory traffic.

The operators of nets are counted on fake tensors, which have shapes but no memory. Those of the head and of the update
follow from formulas (docs/cards.md), without those on single numbers.

Legend: B faces of a rank's micro-batch, G those of all ranks, D embedding. S rows or centres of this rank that take
part, T rows of one tile, H W C.
"""

from collections import Counter
from functools import lru_cache, partial
from math import ceil, prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fr_core.config import Config, class_count
from fr_core.config.methods import FixedCentres, PairLoss
from fr_core.config.nets import Net
from fr_core.config.optim import LARS, SGD, AdamW, Muon
from fr_core.heads.streamed import kernel_tile_size, tile_size
from fr_core.nets.backbone import normalised
from fr_core.nets.build import build_net
from fr_core.nets.finetune import freeze, set_mode
from fr_core.nets.ghost import use_ghost_batches
from fr_core.nets.iresnet import Stage
from fr_core.nets.onnx_net import OnnxNet
from fr_core.nets.open import open_net
from fr_core.ranks import Ranks

FLOAT = 4  # bytes
NO_WORK = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
MORE_READS = {"native_batch_norm": 1, "native_batch_norm_backward": 2}  # sums come first, then the inputs once more
FIRST_UNREAD = {"index_put_", "new_full", "new_zeros"}  # operators that take few or no numbers of their first argument
FOREACH_TENSORS, FOREACH_NUMBERS = 48, 320 * 2**16  # of one launch of PyTorch's kernels for lists of tensors, about
MUON_STEPS = 5  # of the Newton–Schulz iteration
PAIR_SWEEPS = 10  # over the cosines of all pairs, in a loss that compares them
# How often the operators of an eager tile read or write its logits [G, T] (fr_core/heads/streamed.py).
SCALED, SUMMED, RAISED, PUSHED = (2,), (1, 2, 2, 1), (2, 2), (2, 3, 1)
EAGER_SMALL, CENTRE_SMALL = 12, 9  # operators on a vector of a tile, in one pass over a matrix or centres

Kind = Literal["convolution", "product", "maps", "weights", "logits"]


class Operator(NamedTuple):
    """One operator. It takes as long as its arithmetic or its memory traffic, whichever is longer, or its launch.

    Args:
        kind: convolution, product of matrices, or sweep over feature maps, over weights, or over a tile of logits.
        precision: type of the operands.
        flops: multiplications and additions.
        bytes: bytes read and written.
    """

    kind: Kind
    precision: str
    flops: int
    bytes: int


Work = Counter[Operator]  # how often each operator runs
SMALL = Operator("weights", "float32", 0, 0)  # its launch is all that counts


class Passes(NamedTuple):
    """The work of a backbone on the images of one rank."""

    forward: Work
    backward: Work
    blocks: Work  # the trained stages' part of the forward pass, which recomputation repeats


class Size(NamedTuple):
    """The size of a backbone."""

    shapes: tuple[tuple[int, ...], ...]  # of the parameters that are trained
    fixed_bytes: int  # of its other parameters and its buffers
    buffers: int  # number of its buffers that training moves

    @property
    def numbers(self) -> int:
        """Return the numbers that are trained."""
        return sum(map(prod, self.shapes))


def repeated(work: Work, times: int) -> Work:
    """Return work that is done several times."""
    return Counter({operator: count * times for operator, count in work.items()})


class Counting(TorchDispatchMode):
    """Counts the operators of a block of code. Views and allocations are none."""

    def __init__(self) -> None:
        super().__init__()
        self.work: Work = Counter()

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it."""
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and name not in NO_WORK:
            leaves = tree_leaves(args[1:] if name in FIRST_UNREAD else (args, kwargs, out))
            tensors = [x for x in leaves if isinstance(x, Tensor) and x.layout == torch.strided]
            again = MORE_READS[name] * args[0].nbytes if name in MORE_READS else 0
            flops = _flops_of(name, args, kwargs or {}, out)
            kind: Kind = "maps" if flops is None else "product"
            self.work[
                Operator(
                    "convolution" if name.startswith("convolution") else kind,
                    str(tensors[0].dtype).removeprefix("torch.") if tensors else "float32",
                    flops or 0,
                    sum(x.nbytes for x in tensors) + again,
                )
            ] += 1
        return out


def _flops_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int | None:
    """Return the FLOPs of an operator, None where PyTorch has no formula for it."""
    listed = name.removesuffix("_").replace("_for_cpu", "")  # it lacks addmm_, and attention on a CPU
    formula = flop_registry.get(getattr(torch.ops.aten, listed, None))
    if formula is None:
        return None
    if listed != "convolution_backward":
        return int(formula(*args, **kwargs, out_val=out))
    *given, groups, (of_input, of_weight, _) = args  # PyTorch's formula for the weight's gradient knows no groups
    parts = (
        formula(*given, groups, (of_input, False, False), out_val=out),
        formula(*given, groups, (False, of_weight, False), out_val=out),
    )
    return int(parts[0] + parts[1] // groups)


# Nets


@lru_cache
def backbone_work(
    net: Net, images: int, side: int, precision: str, ghost: int | None = None, frozen: tuple[str, ...] = ()
) -> Passes:
    """Count a training pass of a backbone.

    A stage's blocks from the third on are like the second. They are not run, so that deep nets are counted in seconds.
    Frozen weights may make blocks unlike; then all are run.

    Args:
        images: images of a rank's micro-batch.
        side: side of the images, in pixels.
        precision: of the forward pass.
        ghost: images that share batch statistics; None: all.
        frozen: patterns of weights that stay as they were.
    """
    with FakeTensorMode():
        module = build_net(net)
        if ghost:
            use_ghost_batches(module, ghost)
        set_mode(module, True, freeze(module, frozen))
        for param in module.parameters():
            if param.ndim == 4:  # as fr_core.nets.build.on_device; .to() takes no fake weights
                param.data = param.data.to(memory_format=torch.channels_last)
        stages = {stage: 0 if frozen else len(stage) - 2 for stage in module.modules() if isinstance(stage, Stage)}
        inputs: dict[nn.Module, tuple[Tensor, ...]] = {}

        def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            inputs.setdefault(module, given)

        for stage, more in stages.items():
            if more > 0:
                del stage[2:]
            for watched in (stage, stage[-1]):
                watched.register_forward_pre_hook(keep)
        pixels_BHWC = torch.empty(images, side, side, 3, dtype=torch.uint8)
        whole = Passes(*passes(module, precision, normalised(pixels_BHWC, module)), Counter())
        for stage, more in stages.items():
            forward, backward = passes(stage, precision, *inputs[stage])
            whole.blocks.update(forward if backward else {})
            if more > 0:
                forward, backward = passes(stage[-1], precision, *inputs[stage[-1]])
                for part, work in zip(whole, (forward, backward, forward), strict=True):
                    part.update(repeated(work, more))
    return whole


def passes(module: nn.Module, precision: str, x: Tensor, *beside: Tensor) -> tuple[Work, Work]:
    """Count the forward and the backward pass of a module; ``x`` gets a gradient if it has a history.

    The backward pass is empty if nothing gets a gradient.
    """
    given, dtype = torch.empty_like(x, requires_grad=x.requires_grad), getattr(torch, precision)
    module.zero_grad()  # else the gradients of an earlier count would be added to
    with Counting() as forward, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = module(given.view_as(given), *beside)
    gradient = torch.empty_like(out)
    with Counting() as backward:
        if out.requires_grad:
            out.backward(gradient)
    return forward.work, backward.work


@lru_cache
def teacher_work(ref: str, net: str | None, images: int, precision: str, trust_code: bool = False) -> Work:
    """Count the forward pass of a teacher. ONNX Runtime runs an ONNX file on the CPU: it counts as no work.

    Raises:
        UserError: as :func:`fr_core.nets.open.open_net`.
    """
    opened = open_net(ref, net, torch.device("cpu"), trust_code=trust_code)
    module, dtype = opened.net, getattr(torch, precision)
    if isinstance(module, OnnxNet):
        return Counter()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), Counting() as counting:
        pixels_BHWC = torch.empty(images, module.input_size, module.input_size, 3, dtype=torch.uint8)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            module(normalised(pixels_BHWC, module))
    return counting.work


@lru_cache
def backbone_size(net: Net, frozen: tuple[str, ...] = ()) -> Size:
    """Return the size of a backbone, of which weights with names like the patterns ``frozen`` are not trained."""
    with torch.device("meta"):
        module = build_net(net)
    set_mode(module, True, freeze(module, frozen))
    params, buffers = list(module.parameters()), list(module.buffers())
    fixed = sum(x.nbytes for x in (*buffers, *(p for p in params if not p.requires_grad)))
    moved = sum(len(list(part.buffers(recurse=False))) for part in module.modules() if part.training)
    return Size(tuple(tuple(p.shape) for p in params if p.requires_grad), fixed, moved)


# The head


def head_work(config: Config, identities: int, ranks: Ranks, precision: str, device: torch.device) -> Work:
    """Count what the head does in a step: products, sweeps over its rows, and sweeps over the logits.

    Fused kernels are counted on a card, where logits stay off memory. The eager tile is counted on a CPU, and on a card
    where classes have several rows.

    Args:
        identities: identities of the training set.
        precision: of the products.
        device: a card or a CPU, which also decides the size of a tile.
    """
    method, micro, embedding = config.method, config.train.accumulate, config.net.embedding
    faces, on_card = config.train.global_batch // micro, device.type == "cuda"
    if isinstance(method, FixedCentres):
        faces = int(faces * method.facts.trained) // ranks.size
    size = kernel_tile_size(faces, embedding) if on_card else tile_size(faces, embedding, device)
    if matrix := method.class_matrix:
        rows, each = sampled_rows(config, identities, ranks), matrix.subcentres
        if each > 1:
            on_card, size = False, tile_size(faces, embedding, device, each)
        tiles = ceil(rows // each / min(matrix.tile or size, rows // each))
        moves, gathers = matrix.update == "fused", matrix.sample_rate < 1
        return repeated(matrix_work(faces, rows, tiles, embedding, precision, moves, gathers, on_card, each), micro)
    if isinstance(method, FixedCentres):
        centres = method.centres(class_count(config, identities), config.train.global_batch)
        tiles = ceil(centres / min(method.tile or size, centres))
        once = centre_work(faces, centres, tiles, embedding, precision, on_card)
        return repeated(once, micro * method.layers)
    return Counter()


def sampled_rows(config: Config, identities: int, ranks: Ranks) -> int:
    """Return the rows of rank 0's part of the class matrix that take part in a step."""
    matrix = config.method.class_matrix
    lo, hi = ranks.split(class_count(config, identities))
    return matrix.subcentres * max(1, int(matrix.sample_rate * (hi - lo))) if matrix else 0


def matrix_work(
    faces: int,
    rows: int,
    tiles: int,
    embedding: int,
    precision: str,
    moves: bool,
    gathers: bool,
    on_card: bool,
    subcentres: int = 1,
) -> Work:
    """Count the streamed softmax over a class matrix: four products of 2·G·S·D, one of them in the forward pass.

    Args:
        faces: G.
        rows: S.
        tiles: S / T.
        moves: the rows move in the backward pass; else their gradient is written.
        gathers: the rows are gathered from the matrix first.
        on_card: kernels of a card compute the tiles; they take one row of a class.
        subcentres: rows of a class.
    """
    size, flops = bytes_of(precision), 2 * faces * rows * embedding // tiles
    logits, tile, unit = faces * rows // tiles, rows * embedding // tiles, faces * embedding
    kept = (size if on_card else FLOAT) * logits  # what a product writes of the logits, or reads
    product = partial(Operator, "product", precision, flops)
    operands, again = size * (unit + tile), product(size * (unit + tile) + kept)
    to_faces = product(kept + size * tile + 2 * FLOAT * unit)
    to_rows = product(kept + size * unit + FLOAT * tile)
    if on_card:  # rows become unit operands; their gradient takes its radial part, and moves them or is written
        read, finished = sweeps(tile, FLOAT + size), sweeps(FLOAT * tile, 5 if moves else 3)
        return repeated(Counter([*read, product(operands), *read, again, SMALL, to_faces, to_rows, *finished]), tiles)
    rounded = sweeps(tile, FLOAT + size) if size < FLOAT else []
    read = rounded + (sweeps(FLOAT * tile, 3) if gathers else [])
    scaled, classes = [again, *logit_sweeps(logits, *SCALED)], logits // subcentres
    spread: list[Operator] = []  # from the logits of classes to those of rows
    if subcentres > 1:  # the place of a nearest row takes 8 bytes
        scaled += [Operator("logits", "float32", 0, FLOAT * (logits + 3 * classes))]
        spread = [*logit_sweeps(logits, 1), Operator("logits", "float32", 0, FLOAT * (2 * logits + 3 * classes))] * 2
    there = [*read, *sweeps(FLOAT * tile, 1), *scaled, *logit_sweeps(classes, *SUMMED)]
    back = [*read, *scaled, *logit_sweeps(classes, *RAISED), *spread, *logit_sweeps(logits, *PUSHED)]
    back += [to_faces, to_rows]
    back += sweeps(FLOAT * tile, *((1, 3, 3) if moves else (3,)))  # the gradient adds to momentum, which is read too
    back += sweeps(FLOAT * tile, 2, 2, 2) if moves and gathers else []  # gathers the momentum, writes both back
    return repeated(Counter(there + back + [SMALL] * 2 * EAGER_SMALL), tiles)


def centre_work(faces: int, centres: int, tiles: int, embedding: int, precision: str, on_card: bool) -> Work:
    """Count the softmax against fixed centres, in one pass over them: two products of 2·B·S·D.

    Args:
        faces: B.
        centres: S.
        tiles: S / T.
    """
    size, flops = bytes_of(precision), 2 * faces * centres * embedding // tiles
    logits, tile, unit = faces * centres // tiles, size * centres * embedding // tiles, faces * embedding
    kept = (size if on_card else FLOAT) * logits
    product = partial(Operator, "product", precision, flops)
    both = [product(size * unit + tile + kept), product(kept + tile + 2 * FLOAT * unit)]
    if on_card:
        first = [product(size * unit + tile)] if precision == "float16" else []  # its range needs each face's maximum
        return repeated(Counter(first + both), tiles)
    swept = logit_sweeps(logits, *SCALED, *SUMMED)
    return repeated(Counter(both + swept + [SMALL] * CENTRE_SMALL), tiles)


def bytes_of(precision: str) -> int:
    """Return the bytes of a number."""
    return torch.finfo(getattr(torch, precision)).bits // 8


def sweeps(size: int, *accesses: int) -> list[Operator]:
    """Return operators on ``size`` bytes of weights, by how often each reads or writes them."""
    return [Operator("weights", "float32", 0, count * size) for count in accesses]


def logit_sweeps(logits: int, *accesses: int) -> list[Operator]:
    """Return operators on a tile of float32 logits, by how often each reads or writes them."""
    return [Operator("logits", "float32", 0, count * FLOAT * logits) for count in accesses]


def pair_work(config: Config) -> Work:
    """Count a loss that compares all pairs of a batch: cosines of student and teacher, and sweeps over them."""
    if not isinstance(config.method.agreement, PairLoss):
        return Counter()
    batch, embedding = config.train.global_batch, config.net.embedding
    flops, size = 2 * batch**2 * embedding, FLOAT * (batch**2 + 2 * batch * embedding)
    products = [Operator("product", "float32", flops, size)] * 4  # cosines of both, and the student's gradient
    return Counter(products + sweeps(FLOAT * batch**2, *[1] * PAIR_SWEEPS))


# The update


def update_work(config: Config, identities: int, ranks: Ranks, device: torch.device) -> Work:
    """Count the end of a step: norms, clipping, optimisers, moving averages, and the copies of what a step may undo.

    Each operator reads or writes all numbers of its tensors. On a card it takes several tensors in one launch, and
    PyTorch's optimisers read and write each number once.

    Args:
        identities: identities of the training set.
        device: a card or a CPU.
    """
    size, optim = backbone_size(config.net, config.finetune.freeze), config.optim
    on_card = device.type == "cuda"
    numbers, tensors = size.numbers, len(size.shapes)
    shares = ranks.size if optim.shard_state else 1
    averages = (config.train.ema > 0) + (config.method.facts.encoder != "none")
    scaled = config.train.precision == "float16"
    sgd: tuple[int, ...] = (5,) if on_card else (3, 2, 3, 3)  # decay, momentum, gradient, weight
    moved: tuple[int, ...]
    match optim:
        case SGD():
            moved = sgd
        case AdamW():
            moved = (7,) if on_card else (2, 3, 2, 3, 2, 2, 2, 4)
        case LARS():
            moved = (3, 1, 1, 2, 2, 3, 3)
        case Muon():
            moved = (2, 3, 3, 2, 2, 3)
    found = foreach(numbers, tensors, on_card, 1, *[2] * scaled, *[2] * (optim.clip is not None))
    whole = backbone_size(config.net)  # frozen weights are averaged too
    found += foreach(whole.numbers, len(whole.shapes), on_card, *[3] * averages)
    found += foreach(numbers // shares, ceil(tensors / shares), on_card, *moved)
    found += muon_products(size.shapes, shares) if isinstance(optim, Muon) else []
    found += [SMALL] * 2 * (ceil(size.buffers / FOREACH_TENSORS) if on_card else size.buffers)
    matrix = config.method.class_matrix
    if matrix and matrix.update == "plain":
        rows = FLOAT * sampled_rows(config, identities, ranks) * config.net.embedding
        found += sweeps(rows, 1, *[2] * (matrix.clip_head is not None))
        found += sweeps(rows, *((3, 3, 3, 3) if matrix.sample_rate < 1 else sgd))  # rows gathered and written back
    return Counter(found)


def foreach(numbers: int, tensors: int, on_card: bool, *accesses: int) -> list[Operator]:
    """Return operators on a list of float32 tensors, by how often each reads or writes them, launch by launch."""
    launches = max(1, ceil(tensors / FOREACH_TENSORS), ceil(numbers / FOREACH_NUMBERS)) if on_card else tensors
    return sweeps(FLOAT * numbers // launches, *accesses) * launches


def muon_products(shapes: tuple[tuple[int, ...], ...], shares: int) -> list[Operator]:
    """Return the products of Muon's iteration for each matrix X: XXᵀ, its square, and their sum times X."""
    found = []
    for shape in shapes:
        if len(shape) > 1:
            short, long = sorted((shape[0], prod(shape[1:])))
            for m, k, n in ((short, long, short), (short, short, short), (short, short, long)):
                given = 2 * m * k * n // shares, 2 * (m * k + k * n + m * n) // shares
                found += [Operator("product", "bfloat16", *given)] * MUON_STEPS
    return found
