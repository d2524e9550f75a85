"""Builds the untrained backbone of a section."""

from typing import assert_never

import torch

from fr_core.config.nets import (
    FactoryNet,
    FloatNet,
    GhostFaceNetNet,
    IResNetNet,
    MobileFaceNetNet,
    MoENet,
    Net,
    QuantisedNet,
    Residual,
    ViTNet,
)
from fr_core.nets.backbone import Backbone
from fr_core.nets.factory import own_net
from fr_core.nets.ghostfacenet import GhostFaceNet
from fr_core.nets.iresnet import BlockForm, IResNet, Stage
from fr_core.nets.mobilefacenet import MobileFaceNet
from fr_core.nets.moe import Mixture
from fr_core.nets.vit import ViT


def build_net(config: Net) -> Backbone:
    """Build the untrained backbone of a section."""
    net = _built(config)
    if isinstance(config, FloatNet):
        net.input_mean, net.input_std = config.input_mean, config.input_std
    return net


def build_float_net(config: IResNetNet | MobileFaceNetNet) -> IResNet | MobileFaceNet:
    """Build an untrained net of a kind that can be quantised and pruned."""
    net = build_net(config)
    assert isinstance(net, IResNet | MobileFaceNet)
    return net


def on_device(net: Backbone, device: torch.device) -> Backbone:
    """Move a net to a device, in channels-last order, in which bf16 convolutions run fastest."""
    return net.to(device=device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # no stub has it


def _built(config: Net) -> Backbone:
    match config:
        case IResNetNet():
            return _residual(config)
        case MoENet():
            net = _residual(config)
            assert isinstance(net.layer4, Stage)
            net.layer4 = Mixture(net.layer4, *config.channels[2:], config.experts, config.active, _form(config))
            return net
        case MobileFaceNetNet():
            return MobileFaceNet(config.input_size, config.embedding, config.channels, config.norm_eps)
        case GhostFaceNetNet():
            sizes = (config.width, config.stem_stride, config.input_size, config.embedding)
            return GhostFaceNet(*sizes, config.norm_eps)
        case FactoryNet():
            return own_net(config)
        case ViTNet():
            blocks = (config.depth, config.width, config.heads, config.patch, config.mlp_ratio)
            return ViT(*blocks, config.drop_path, config.mask, config.input_size, config.embedding)
        case QuantisedNet():
            from fr_core.nets.quantised import Quantised

            return Quantised(build_float_net(config.net), config)
        case _ as unknown:
            assert_never(unknown)


def _residual(config: Residual) -> IResNet:
    """Build the IR-ResNet of a section, for a mixture of experts its plain net."""
    sizes = (config.stem_stride, config.input_size, config.embedding, config.dropout)
    return IResNet(config.depth, config.channels, *sizes, _form(config))


def _form(config: Residual) -> BlockForm:
    return BlockForm(config.se, config.inner_norm, config.shortcut, config.norm_eps)
