"""IR-ResNet: the plain deep residual backbone of face recognition (Deng et al., "ArcFace", 2019).

Modules have the names of the widely published IR-ResNet weights. These load strictly at width 64, 112×112 pixels and
512 dimensions. docs/methods/bigface.md lists the sizes that BigFace trains. Other projects publish nets with other
residual blocks (:class:`BlockForm`); docs/weights.md lists them.

Legend: B batch, C channels, H W pixels, D embedding.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fr_core.nets.backbone import Backbone
from fr_core.nets.prelu import PReLU
from fr_core.undo import Undo

BLOCKS = {  # depth -> residual blocks of the four stages
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    100: (3, 13, 30, 3),
    120: (3, 13, 40, 3),
    140: (3, 15, 48, 3),
    152: (3, 8, 36, 3),
    160: (3, 24, 49, 3),
    200: (6, 26, 60, 6),
    240: (3, 25, 88, 3),
    600: (3, 70, 220, 3),
    1200: (3, 80, 512, 3),
}
STAGE_STRIDES = 16  # factor by which the four stages together shrink the stem's map
REDUCTION = 16  # channels of a block for each channel inside its squeeze and excitation


@dataclass(frozen=True)
class BlockForm:
    """Form of the residual blocks, as :class:`fr_core.config.nets.Residual` explains its fields."""

    se: bool = False
    inner_norm: bool = True
    shortcut: Literal["conv", "pool"] = "conv"
    norm_eps: float = 1e-5


class SqueezeExcitation(nn.Module):
    """A gate for each channel, made of the means of all channels (Hu et al., "Squeeze-and-Excitation", 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inside = max(1, channels // REDUCTION)
        self.fc1 = nn.Conv2d(channels, inside, 1, bias=False)
        self.fc2 = nn.Conv2d(inside, channels, 1, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Multiply each channel of [B, C, H, W] by its gate."""
        return x_BCHW * self.gate(x_BCHW.mean((2, 3), keepdim=True))

    def gate(self, mean_BC11: Tensor) -> Tensor:
        """Return the gates of the channels, in (0, 1), for their means."""
        return self.fc2(F.relu(self.fc1(mean_BC11))).sigmoid()


class IResBlock(nn.Module):
    """Residual block: bn – conv3×3 – bn – PReLU – conv3×3(stride) – bn, plus the input.

    Where shapes differ, the input passes through conv1×1 – bn. A :class:`BlockForm` may leave the second norm out, or
    add squeeze and excitation before the sum. Or the shortcut takes every other pixel where only the side differs.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, form: BlockForm) -> None:
        super().__init__()
        eps = form.norm_eps
        self.bn1 = nn.BatchNorm2d(inputs, eps=eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, eps=eps) if form.inner_norm else nn.Identity()
        self.prelu = PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs, eps=eps)
        self.se = SqueezeExcitation(outputs) if form.se else nn.Identity()
        self.downsample: nn.Module | None = None
        if inputs == outputs and stride != 1 and form.shortcut == "pool":
            self.downsample = nn.AvgPool2d(1, stride)  # the published max-pool 1×1 would keep an index for each pixel
        elif stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs, eps=eps))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, ⌈H / stride⌉, ⌈W / stride⌉]."""
        skip = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        out = self.prelu(self.bn2(self.conv1(self.bn1(x_BCHW))))
        return self.se(self.bn3(self.conv2(out))) + skip


class Stage(nn.Sequential):
    """Residual blocks of one width.

    ``recompute_blocks`` cuts the stage into segments of that many blocks. Autograd then keeps only the inputs of the
    segments. The backward pass recomputes each segment (Chen et al., "Training Deep Nets with Sublinear Memory Cost",
    2016).
    """

    recompute_blocks: int | None = None

    def blocks(self) -> list[IResBlock]:
        """Return the residual blocks in order."""
        return [block for block in self if isinstance(block, IResBlock)]

    def segments(self) -> list[nn.Sequential]:
        """Return the segments that the backward pass recomputes one by one."""
        blocks, each = list(self), self.recompute_blocks or len(self)
        return [nn.Sequential(*blocks[start : start + each]) for start in range(0, len(blocks), each)]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Run the blocks, with checkpointed segments if ``recompute_blocks`` is set."""
        if self.recompute_blocks is None:
            return super().forward(x_BCHW)
        for segment in self.segments():
            x_BCHW = checkpoint(
                segment,
                x_BCHW,
                use_reentrant=False,
                preserve_rng_state=False,  # the blocks draw nothing at random
                context_fn=partial(_contexts, segment),
            )
        return x_BCHW


def _contexts(segment: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a segment's forward pass and of its recomputation."""
    return nullcontext(), statistics_kept(segment)


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Restore a module's running statistics on exit: the recomputed batch has updated them already."""
    before = Undo(module.buffers())
    try:
        yield
    finally:
        before.restore()


def recompute(net: nn.Module, blocks: int) -> None:
    """Make the backward pass recompute a net's residual blocks in segments of ``blocks``."""
    for module in net.modules():
        if isinstance(module, Stage):
            module.recompute_blocks = blocks


def make_stage(inputs: int, outputs: int, blocks: int, form: BlockForm) -> Stage:
    """Return a stage of blocks of one width; the first block halves the map."""
    first, others = IResBlock(inputs, outputs, 2, form), range(blocks - 1)
    return Stage(first, *(IResBlock(outputs, outputs, 1, form) for _ in others))


def draw_convolutions(net: nn.Module) -> None:
    """Draw the weights of all convolutions from N(0, 0.1²), as the published training code of IR-ResNet does."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, 0.1)


class IResNet(Backbone):
    """IR-ResNet from normalised pixels to embeddings.

    Args:
        depth: Key of :data:`BLOCKS`.
        width: Channels of the first stage, which every next stage doubles, or channels of all four stages. The stem
            has the channels of the first stage.
        stem_stride: 1 as published; 2 halves every map.
        input_size: Side of the square input, pixels; a multiple of 16.
        embedding: D.
        dropout: Share of the last map's values that training sets to 0, before the last linear layer.
        form: Form of the residual blocks.
    """

    def __init__(
        self,
        depth: int = 50,
        width: int | Sequence[int] = 64,
        stem_stride: int = 1,
        input_size: int = 112,
        embedding: int = 512,
        dropout: float = 0.0,
        form: BlockForm = BlockForm(),
    ) -> None:
        super().__init__()
        self.input_size, self.embedding = input_size, embedding
        first, second, third, fourth = (width << i for i in range(4)) if isinstance(width, int) else width
        self.conv1 = nn.Conv2d(3, first, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first, eps=form.norm_eps)
        self.prelu = PReLU(first)
        one, two, three, four = BLOCKS[depth]
        self.layer1 = make_stage(first, first, one, form)
        later = replace(form, shortcut="conv")
        self.layer2 = make_stage(first, second, two, later)
        self.layer3 = make_stage(second, third, three, later)
        self.layer4: nn.Module = make_stage(third, fourth, four, later)  # or a mixture (fr_core/nets/moe.py)
        self.bn2 = nn.BatchNorm2d(fourth, eps=form.norm_eps)
        self.dropout = nn.Dropout(dropout)
        side = -(-input_size // (STAGE_STRIDES * stem_stride))  # each halving rounds up
        self.fc = nn.Linear(fourth * side**2, embedding)
        self.features = nn.BatchNorm1d(embedding, eps=form.norm_eps)
        nn.init.constant_(self.features.weight, 1.0)
        self.features.weight.requires_grad = False  # gain stays 1: the head sets the embedding's scale
        draw_convolutions(self)

    def blocks(self) -> list[IResBlock]:
        """Return the residual blocks."""
        return [module for module in self.modules() if isinstance(module, IResBlock)]

    @property
    def last_norm(self) -> nn.Module:
        """Return the batch norm that the embeddings come out of."""
        return self.features

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map normalised pixels [B, 3, H, W] to embeddings float32 [B, D], not L2-normalised.

        The last linear layer and its norm run in float32 under autocast too: cosines need the precision.
        """
        x = self.prelu(self.bn1(self.conv1(x_BCHW)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.dropout(torch.flatten(self.bn2(x), 1))
        with torch.autocast(x.device.type, enabled=False):
            return self.features(self.fc(x.float()))
