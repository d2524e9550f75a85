"""Nets of other projects, small: what they compute under their names, written anew from what the projects state."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

WIDTHS = (16, 32, 64, 128)
SIDE = 32  # pixels of the input
EMBEDDING = 24


class InsightBlock(nn.Module):
    """The residual block of insightface and MagFace."""

    def __init__(self, inputs, outputs, stride, eps):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs, eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, eps)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs, eps)
        self.downsample = None
        if stride > 1:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs, eps))

    def forward(self, x):
        out = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return out + (self.downsample(x) if self.downsample else x)


class Insight(nn.Module):
    """``IResNet`` of arcface_torch; MagFace's has another ε and trains the last gain."""

    def __init__(self, blocks=(1, 1, 1, 1), eps=1e-5):
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1, self.prelu = nn.BatchNorm2d(WIDTHS[0], eps), nn.PReLU(WIDTHS[0])
        before = WIDTHS[0]
        for i, (width, count) in enumerate(zip(WIDTHS, blocks, strict=True), 1):
            layers = [InsightBlock(before if j == 0 else width, width, 2 if j == 0 else 1, eps) for j in range(count)]
            setattr(self, f"layer{i}", nn.Sequential(*layers))
            before = width
        self.bn2 = nn.BatchNorm2d(before, eps)
        self.fc = nn.Linear(before * (SIDE // 16) ** 2, EMBEDDING)
        self.features = nn.BatchNorm1d(EMBEDDING, eps)

    def forward(self, x):
        x = self.prelu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.features(self.fc(self.bn2(x).flatten(1)))


class SE(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1, bias=False)

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


class IRBlock(nn.Module):
    """The block of AdaFace, CVLface and TFace, or without ``inner`` that of face.evoLVe, TreB1eN and FaceX-Zoo."""

    def __init__(self, inputs, outputs, stride, inner, se):
        super().__init__()
        self.shortcut_layer = nn.MaxPool2d(1, stride)
        if inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut_layer = nn.Sequential(conv, nn.BatchNorm2d(outputs))
        layers = [nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)]
        layers += [nn.BatchNorm2d(outputs)] if inner else []
        layers += [nn.PReLU(outputs), nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.res_layer = nn.Sequential(*layers)
        if se:
            self.res_layer.add_module("se_block" if inner else "5", SE(outputs))

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


class IR(nn.Module):
    """``Backbone`` of AdaFace and its like."""

    def __init__(self, inner=True, se=False, affine=False, blocks=(1, 1, 1, 1)):
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.PReLU(WIDTHS[0])
        )
        layers, before = [], WIDTHS[0]
        for width, count in zip(WIDTHS, blocks, strict=True):
            layers += [IRBlock(before if j == 0 else width, width, 2 if j == 0 else 1, inner, se) for j in range(count)]
            before = width
        self.body = nn.Sequential(*layers)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(before),
            nn.Dropout(0.4),
            nn.Flatten(),
            nn.Linear(before * (SIDE // 16) ** 2, EMBEDDING),
            nn.BatchNorm1d(EMBEDDING, affine=affine),
        )

    def forward(self, x):
        return self.output_layer(self.body(self.input_layer(x)))


def conv_block(inputs, outputs, kernel=1, stride=1, padding=0, groups=1, act=True):
    block = nn.Sequential()
    block.add_module("conv", nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False))
    block.add_module("bn", nn.BatchNorm2d(outputs))
    if act:
        block.add_module("prelu", nn.PReLU(outputs))
    return block


class DepthWise(nn.Module):
    def __init__(self, inputs, inside, outputs, stride):
        super().__init__()
        self.conv = conv_block(inputs, inside)
        self.conv_dw = conv_block(inside, inside, 3, stride, 1, inside)
        self.project = conv_block(inside, outputs, act=False)
        self.residual = stride == 1

    def forward(self, x):
        out = self.project(self.conv_dw(self.conv(x)))
        return out + x if self.residual else out


class Residual(nn.Module):
    def __init__(self, channels, inside, blocks):
        super().__init__()
        self.model = nn.Sequential(*(DepthWise(channels, inside, channels, 1) for _ in range(blocks)))

    def forward(self, x):
        return self.model(x)


class Mobile(nn.Module):
    """TreB1eN's ``MobileFaceNet``, which face.evoLVe and FaceX-Zoo copied; TFace's has an ``output_layer``."""

    def __init__(self, tface=False):
        super().__init__()
        self.conv1 = conv_block(3, 16, 3, 2, 1)
        self.conv2_dw = conv_block(16, 16, 3, 1, 1, 16)
        self.conv_23, self.conv_3 = DepthWise(16, 24, 16, 2), Residual(16, 24, 4)
        self.conv_34, self.conv_4 = DepthWise(16, 32, 24, 2), Residual(24, 32, 6)
        self.conv_45, self.conv_5 = DepthWise(24, 40, 24, 2), Residual(24, 32, 2)
        self.conv_6_sep = conv_block(24, 48)
        end = self.output_layer = nn.Module() if tface else self
        end.conv_6_dw = conv_block(48, 48, SIDE // 16, groups=48, act=False)
        end.linear = nn.Linear(48, EMBEDDING, bias=False)
        end.bn = nn.BatchNorm1d(EMBEDDING, affine=not tface)
        if not tface:
            del self._modules["output_layer"]

    def forward(self, x):
        x = self.conv_3(self.conv_23(self.conv2_dw(self.conv1(x))))
        x = self.conv_6_sep(self.conv_5(self.conv_45(self.conv_4(self.conv_34(x)))))
        end = self._modules.get("output_layer", self)
        return end.bn(end.linear(end.conv_6_dw(x).flatten(1)))


@torch.no_grad()
def settled(net, gain=True):
    """Give a net random slopes, gains and shifts, and the statistics of noise, as after a training."""
    for module in net.modules():
        if isinstance(module, nn.PReLU):
            module.weight.uniform_(-0.5, 0.8)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
            if module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    if not gain:
        net.features.weight.fill_(1)
    net.train()(torch.randn(32, 3, SIDE, SIDE))
    return net.eval()


def noise(count=6, seed=0):
    """Images with colours: uint8 RGB [N, H, W, 3], whose channels differ."""
    random = np.random.default_rng(seed)
    tint = random.integers(0, 120, (count, 1, 1, 3))
    return (random.integers(0, 136, (count, SIDE, SIDE, 3)) + tint).astype(np.uint8)


@torch.no_grad()
def embedded(net, images, bgr, mean, std):
    """Embed RGB images as the project does: in its channel order and scale."""
    x = torch.from_numpy((images[..., ::-1] if bgr else images).copy()).permute(0, 3, 1, 2).float()
    return F.normalize(net((x - mean) / std)).numpy()
