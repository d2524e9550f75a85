"""GhostFaceNet V1 (Alansari et al., "GhostFaceNets: Lightweight Face Recognition Model From Cheap Operations", 2023).

GhostNet (Han et al., "GhostNet: More Features From Cheap Operations", 2020) with a PReLU for each ReLU. A depthwise
convolution over the whole map takes the place of its mean, as in MobileFaceNet. The published nets are called
WIDTH-STRIDE: 1.3-1 and 1.3-2 are the largest.

Three things depart from the published code, which is in Keras. Convolutions of stride 2 pad all sides. The gate's hard
sigmoid is PyTorch's, as in GhostNet's own code. The gain of the last norm stays 1: the head sets the embedding's scale.

Legend: B batch, C channels, H W pixels, D embedding.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fr_core.nets.backbone import Backbone
from fr_core.nets.mobilefacenet import Part
from fr_core.nets.prelu import PReLU

STRIDES = 16  # factor by which the blocks shrink the stem's map
STEM, LAST = 16, 512  # channels of the first and of the last convolution, at width 1


class Row(NamedTuple):
    """A row of GhostNet's table 1, with the channels of width 1."""

    kernel: int
    inside: int
    outputs: int
    gate: bool
    stride: int


BLOCKS = (
    Row(3, 16, 16, False, 1),
    Row(3, 48, 24, False, 2),
    Row(3, 72, 24, False, 1),
    Row(5, 72, 40, True, 2),
    Row(5, 120, 40, True, 1),
    Row(3, 240, 80, False, 2),
    Row(3, 200, 80, False, 1),
    Row(3, 184, 80, False, 1),
    Row(3, 184, 80, False, 1),
    Row(3, 480, 112, True, 1),
    Row(3, 672, 112, True, 1),
    Row(5, 672, 160, True, 2),
    Row(5, 960, 160, False, 1),
    Row(5, 960, 160, True, 1),
    Row(5, 960, 160, False, 1),
    Row(5, 512, 160, True, 1),
)


def channels(count: float) -> int:
    """Return the nearest multiple of 4 that is at most a tenth smaller than ``count``, as GhostNet rounds."""
    nearest = max(4, int(count + 2) // 4 * 4)
    return nearest + 4 if nearest < 0.9 * count else nearest


class GhostModule(nn.Module):
    """Channels of which a convolution 1×1 makes half; a depthwise convolution 3×3 makes the other half of these."""

    def __init__(self, inputs: int, outputs: int, act: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.primary = Part(inputs, half, 1, act=act)
        self.cheap = Part(half, half, 3, groups=half, act=act)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H, W]."""
        half = self.primary(x_BCHW)
        return torch.cat([half, self.cheap(half)], 1)


class Gate(nn.Module):
    """Squeeze and excitation with a hard sigmoid (Howard et al., "Searching for MobileNetV3", 2019)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        inside = channels(inputs / 4)
        self.fc1 = nn.Conv2d(inputs, inside, 1)
        self.prelu = PReLU(inside)
        self.fc2 = nn.Conv2d(inside, inputs, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Multiply each channel by its gate, which is made of the means of all channels."""
        mean_BC11 = x_BCHW.mean((2, 3), keepdim=True)
        return x_BCHW * F.hardsigmoid(self.fc2(self.prelu(self.fc1(mean_BC11))))


class Bottleneck(nn.Module):
    """Ghost module – depthwise convolution, if it strides – gate – ghost module without PReLU, plus the input.

    Where shapes differ, the input passes through a depthwise convolution and a convolution 1×1.
    """

    def __init__(self, inputs: int, inside: int, outputs: int, row: Row) -> None:
        super().__init__()
        kernel, stride = row.kernel, row.stride
        self.expand = GhostModule(inputs, inside, act=True)
        self.depthwise: nn.Module = nn.Identity()
        if stride > 1:
            self.depthwise = Part(inside, inside, kernel, stride, groups=inside, act=False)
        self.gate = Gate(inside) if row.gate else nn.Identity()
        self.project = GhostModule(inside, outputs, act=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            depthwise = Part(inputs, inputs, kernel, stride, groups=inputs, act=False)
            self.shortcut = nn.Sequential(depthwise, Part(inputs, outputs, 1, act=False))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, ⌈H / stride⌉, ⌈W / stride⌉]."""
        return self.project(self.gate(self.depthwise(self.expand(x_BCHW)))) + self.shortcut(x_BCHW)


class GhostFaceNet(Backbone):
    """GhostFaceNet V1 from normalised pixels to embeddings.

    Args:
        width: Factor of all channels.
        stem_stride: Stride of the first convolution, 1 or 2.
        input_size: Side of the square input, pixels.
        embedding: D.
        norm_eps: ε of the norms.
    """

    def __init__(self, width: float, stem_stride: int, input_size: int, embedding: int, norm_eps: float) -> None:
        super().__init__()
        self.input_size, self.embedding = input_size, embedding
        inputs = channels(STEM * width)
        self.stem = Part(3, inputs, 3, stem_stride)
        bottlenecks = []
        for row in BLOCKS:
            inside, outputs = channels(row.inside * width), channels(row.outputs * width)
            bottlenecks.append(Bottleneck(inputs, inside, outputs, row))
            inputs = outputs
        self.bottlenecks = nn.Sequential(*bottlenecks)
        last, side = channels(LAST * width), -(-input_size // (STRIDES * stem_stride))
        self.expand = Part(inputs, last, 1)
        self.pool = Part(last, last, side, groups=last, act=False, pad=False)
        self.fc = nn.Linear(last, embedding, bias=False)
        self.features = nn.BatchNorm1d(embedding)
        self.features.weight.requires_grad = False
        nn.init.xavier_normal_(self.fc.weight)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # a depthwise filter has one input, and its output has one filter
                nn.init.kaiming_normal_(module.weight, mode="fan_in" if module.groups > 1 else "fan_out")
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.eps = norm_eps

    def blocks(self) -> list[nn.Module]:
        """Return the bottlenecks in order."""
        return list(self.bottlenecks)

    @property
    def last_norm(self) -> nn.Module:
        """Return the batch norm that the embeddings come out of."""
        return self.features

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map normalised pixels [B, 3, H, W] to embeddings float32 [B, D], not L2-normalised."""
        x = self.pool(self.expand(self.bottlenecks(self.stem(x_BCHW)))).flatten(1)
        with torch.autocast(x.device.type, enabled=False):
            return self.features(self.fc(x.float()))
