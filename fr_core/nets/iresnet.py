"""IR-ResNet: the plain deep residual backbone of face recognition (METHODS §5).

Module names are those of the widely published IR-ResNet weights, which load as they are (strictly, at width 64,
112×112 and 512 dimensions). Legend: B batch, C channels, H W pixels, D embedding.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fr_core.nets.backbone import Backbone
from fr_core.nets.prelu import PReLU

BLOCKS = {  # depth -> residual blocks of the four stages
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    100: (3, 13, 30, 3),
    120: (3, 13, 40, 3),
    140: (3, 15, 48, 3),
    200: (6, 26, 60, 6),
    240: (3, 25, 88, 3),
    600: (3, 70, 220, 3),
    1200: (3, 80, 512, 3),
}
BN_EPS = 1e-5
STAGE_STRIDES = 16  # pixels after the stem per pixel of the last feature map


class IResBlock(nn.Module):
    """bn – conv3×3 – bn – PReLU – conv3×3(stride) – bn, plus the input (through conv1×1 – bn where shapes differ)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs, eps=BN_EPS)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, eps=BN_EPS)
        self.prelu = PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs, eps=BN_EPS)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs, eps=BN_EPS)
            )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        skip = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        out = self.prelu(self.bn2(self.conv1(self.bn1(x_BCHW))))
        return self.bn3(self.conv2(out)) + skip


class Stage(nn.Sequential):
    """Residual blocks of one width.

    With ``recompute_blocks`` autograd keeps the inputs of segments of that many blocks, and the backward pass makes
    the rest anew, segment by segment (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016).
    """

    recompute_blocks: int | None = None

    def blocks(self) -> list[IResBlock]:
        return [block for block in self if isinstance(block, IResBlock)]

    def segments(self) -> list[nn.Sequential]:
        blocks, each = list(self), self.recompute_blocks or len(self)
        return [nn.Sequential(*blocks[start : start + each]) for start in range(0, len(blocks), each)]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.recompute_blocks is None:
            return super().forward(x_BCHW)
        for segment in self.segments():
            x_BCHW = checkpoint(
                segment,
                x_BCHW,
                use_reentrant=False,
                preserve_rng_state=False,  # no dropout in here
                context_fn=partial(contexts, segment),
            )
        return x_BCHW


def contexts(segment: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of a segment's forward pass and of its repetition."""
    return nullcontext(), statistics_kept(segment)


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Leaves batch norm's statistics as they were: they have seen this batch already."""
    before = [buffer.clone() for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, old in zip(module.buffers(), before, strict=True):
            buffer.copy_(old)


def recompute(net: nn.Module, blocks: int) -> None:
    """Lets a net's residual blocks be recomputed in segments of ``blocks``."""
    for module in net.modules():
        if isinstance(module, Stage):
            module.recompute_blocks = blocks


def make_stage(inputs: int, outputs: int, blocks: int) -> Stage:
    """Blocks of one width; the first halves the map."""
    return Stage(IResBlock(inputs, outputs, 2), *(IResBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


def draw_convolutions(net: nn.Module) -> None:
    """N(0, 0.1), as published."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, 0.1)


class IResNet(Backbone):
    """Images to embeddings.

    Args:
        depth: a key of :data:`BLOCKS`.
        width: channels of the first stage, each stage doubles them; or of all four. The stem has the first's.
        stem_stride: 1 as published; 2 halves every map.
        input_size: side of the square input, pixels; a multiple of 16.
    """

    input_std = 127.5  # x = (pixel − 127.5) / input_std

    def __init__(
        self,
        depth: int = 50,
        width: int | Sequence[int] = 64,
        stem_stride: int = 1,
        input_size: int = 112,
        embedding: int = 512,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.input_size, self.embedding = input_size, embedding
        first, second, third, fourth = (width << i for i in range(4)) if isinstance(width, int) else width
        self.conv1 = nn.Conv2d(3, first, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first, eps=BN_EPS)
        self.prelu = PReLU(first)
        one, two, three, four = BLOCKS[depth]
        self.layer1 = make_stage(first, first, one)
        self.layer2 = make_stage(first, second, two)
        self.layer3 = make_stage(second, third, three)
        self.layer4: nn.Module = make_stage(third, fourth, four)  # or a mixture (fr_core/nets/moe.py)
        self.bn2 = nn.BatchNorm2d(fourth, eps=BN_EPS)
        self.dropout = nn.Dropout(dropout)
        side = -(-input_size // (STAGE_STRIDES * stem_stride))  # each halving rounds up
        self.fc = nn.Linear(fourth * side**2, embedding)
        self.features = nn.BatchNorm1d(embedding, eps=BN_EPS)
        nn.init.constant_(self.features.weight, 1.0)
        self.features.weight.requires_grad = False  # gamma stays 1: the embedding's scale is the head's matter
        draw_convolutions(self)

    @property
    def last_norm(self) -> nn.Module:
        return self.features

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W] to embeddings float32 [B, D] (not L2-normalised).

        The last linear layer and its norm run in float32 under autocast: cosines are made of them.
        """
        x = self.prelu(self.bn1(self.conv1(x_BCHW)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.dropout(torch.flatten(self.bn2(x), 1))
        with torch.autocast(x.device.type, enabled=False):
            return self.features(self.fc(x.float()))
