"""MobileFaceNet (Chen et al., "MobileFaceNets", 2018), in the form of the published `y1` weights.

conv3×3/2 64 – depthwise 64 – three stages of bottlenecks – conv1×1 512 – depthwise over the whole map, linear –
fc – bn1d. A PReLU follows every convolution that is not marked as linear.

Legend: B batch, C channels, H W pixels, D embedding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fr_core.config.nets import MOBILEFACENET
from fr_core.nets.backbone import Backbone
from fr_core.nets.prelu import PReLU

STRIDES = 16  # factor by which the net shrinks the input to the last feature map
LAST_EPS = 2e-5  # ε of the norm of the embedding
LAYERS = (  # layers whose output channels are the entries of ``widths``, in order
    "stem.conv",
    *(f"stage{stage}.0.{part}.conv" for stage in (3, 4) for part in ("expand", "project")),
    *("stage5.0.expand.conv", "stage5.1.expand.conv", "stage5.0.project.conv"),
    "expand.conv",
)


class Part(nn.Sequential):
    """Layers conv – bn – PReLU, or conv – bn if ``act`` is false."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
        pad: bool = True,
    ) -> None:
        super().__init__()
        padding = kernel // 2 if pad else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.prelu = PReLU(outputs) if act else None


class Bottleneck(nn.Module):
    """Block expand 1×1 – depthwise 3×3 – project 1×1 (linear), plus the input if shapes are equal."""

    def __init__(self, inputs: int, expanded: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.expand = Part(inputs, expanded, 1)
        self.depthwise = Part(expanded, expanded, 3, stride, groups=expanded)
        self.project = Part(expanded, outputs, 1, act=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, ⌈H / stride⌉, ⌈W / stride⌉]."""
        out = self.project(self.depthwise(self.expand(x_BCHW)))
        return out + x_BCHW if self.residual else out


def make_stage(inputs: int, first: int, inside: int, outputs: int, blocks: int) -> nn.Sequential:
    """Return a stage of bottlenecks. The first halves the map.

    Args:
        inputs: Channels before the stage.
        first: Expanded channels of the first bottleneck.
        inside: Expanded channels of the other bottlenecks.
        outputs: Channels after each bottleneck.
        blocks: Number of bottlenecks.
    """
    others = (Bottleneck(outputs, inside, outputs, 1) for _ in range(blocks - 1))
    return nn.Sequential(Bottleneck(inputs, first, outputs, 2), *others)


class MobileFaceNet(Backbone):
    """MobileFaceNet from normalised pixels to embeddings, about a million parameters.

    Args:
        input_size: Side of the square input, pixels; a multiple of 16.
        embedding: D.
        widths: Channels of :data:`LAYERS`, as :class:`fr_core.config.nets.MobileFaceNetNet` orders them.
        norm_eps: ε of the norms before the embedding.
    """

    input_std = 128.0

    def __init__(
        self,
        input_size: int = 112,
        embedding: int = 128,
        widths: Sequence[int] = MOBILEFACENET,
        norm_eps: float = 1e-3,
    ) -> None:
        super().__init__()
        self.input_size, self.embedding = input_size, embedding
        side = input_size // STRIDES
        stem, inside3, out3, inside4, out4, first5, inside5, out5, last = widths
        self.stem = Part(3, stem, 3, 2)
        self.stem_depthwise = Part(stem, stem, 3, groups=stem)
        self.stage3 = make_stage(stem, inside3, inside3, out3, 5)
        self.stage4 = make_stage(out3, inside4, inside4, out4, 7)
        self.stage5 = make_stage(out4, first5, inside5, out5, 3)
        self.expand = Part(out5, last, 1)
        self.pool = Part(last, last, side, groups=last, act=False, pad=False)
        self.fc = nn.Linear(last, embedding)
        self.features = nn.BatchNorm1d(embedding, eps=LAST_EPS)
        nn.init.constant_(self.features.weight, 1.0)
        self.features.weight.requires_grad = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if isinstance(module, nn.BatchNorm2d):
                module.eps = norm_eps

    def blocks(self) -> list[Bottleneck]:
        """Return the bottlenecks of all stages in order."""
        return [module for module in self.modules() if isinstance(module, Bottleneck)]

    @property
    def last_norm(self) -> nn.Module:
        """Return the batch norm that the embeddings come out of."""
        return self.features

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map normalised pixels [B, 3, H, W] to embeddings float32 [B, D], not L2-normalised."""
        x = self.stem_depthwise(self.stem(x_BCHW))
        x = self.stage5(self.stage4(self.stage3(x)))
        x = self.pool(self.expand(x)).flatten(1)
        with torch.autocast(x.device.type, enabled=False):
            return self.features(self.fc(x.float()))


def from_mxnet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the published `y1` weights, which have MXNet names, under this module's names.

    - ``conv_1`` and ``conv_2_dw`` become ``stem`` and ``stem_depthwise``.
    - ``dconv_23``, ``dconv_34`` and ``dconv_45`` become the first bottleneck of stages 3, 4 and 5.
    - ``res_S_blockI`` becomes bottleneck I + 1 of stage S.
    - ``conv_sep``, ``conv_dw`` and ``conv_proj`` of a bottleneck become ``expand``, ``depthwise`` and ``project``.
    - ``conv_6sep`` and ``conv_6dw7_7`` become ``expand`` and ``pool``.
    - ``fc1_weight`` and ``pre_fc1_bias`` become ``fc``, the other tensors of ``fc1`` the last norm.

    Raises:
        KeyError: A tensor has another name.
    """
    layers = {"conv_1": "stem", "conv_2_dw": "stem_depthwise", "conv_6sep": "expand", "conv_6dw7_7": "pool"}
    blocks = {"dconv_23": "stage3.0", "dconv_34": "stage4.0", "dconv_45": "stage5.0"}
    blocks |= {f"res_{stage}_block{i}": f"stage{stage}.{i + 1}" for stage in (3, 4, 5) for i in range(6)}
    parts = {"conv_sep": "expand", "conv_dw": "depthwise", "conv_proj": "project"}
    layers |= {f"{b}_{p}": f"{block}.{part}" for b, block in blocks.items() for p, part in parts.items()}
    bn = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_var": "running_var"}
    fields = {"conv2d_weight": "conv.weight", "relu_gamma": "prelu.weight"}
    fields |= {f"batchnorm_{theirs}": f"bn.{ours}" for theirs, ours in bn.items()}
    names = {f"{layer}_{field}": f"{layers[layer]}.{fields[field]}" for layer in layers for field in fields}
    names |= {"fc1_weight": "fc.weight", "pre_fc1_bias": "fc.bias"}
    names |= {f"fc1_{theirs}": f"features.{ours}" for theirs, ours in bn.items()}
    return {names[name]: tensor for name, tensor in state.items()}
