"""Nets that people bring and bigface does not know: what a file holds, by the names and shapes of its tensors."""

import re
from collections.abc import Mapping

from torch import Tensor

# Patterns of a tensor's name, after any wrapping; the first that fits tells.
NETS = {
    r"layers\.1\.layer\.weight$": "a quantised net of bigface, without its section",
    r"layer4\.experts\.": "a mixture of experts of bigface, without its section",
    r"tower\.0\.qkv\.weight$": "a vision transformer of bigface, without its section",
    r"(mixed_6a|mixed_7a|repeat_1\.0|block8)\.": "an InceptionResnetV1 (facenet-pytorch)",
    r"(relative_position_bias_table|attn\.relative_position_index)$": "a Swin transformer",
    r"(patch_embed(ding)?s?|attn\.qkv|encoder_layer_\d+|\bvit|patch_to_embedding)\.": "a vision transformer (ViT)",
    r"ghost\d?\.(primary_conv|cheap_operation)\.": "a GhostNet",
    r"(_conv_stem|conv_stem|_depthwise_conv|se_module|\bse\.conv_reduce)\b": "an EfficientNet or MobileNet",
    r"rbr_(dense|reparam|identity)\b": "a RepVGG",
    r"attention_module\d": "a residual attention network",
    r"stage\d\.\d+\.(fuse_layers|branches)\.": "an HRNet",
    r"conv_sep\.layers\.0\.weight$": "insightface's mobilefacenet (mbf), whose second layer is not depthwise",
    r"\b(BboxHead|ClassHead|LandmarkHead|ssh\d|bbox_head|fpn)\b": "a face detector",
    r"\bconv1_1\.weight$": "a SphereFace net or a VGG",
    r"\bfilter\.weight$": "a LightCNN",
    r"layer1\.0\.bn1\.weight$": "a ResNet without PReLU",
    r"denseblock\d": "a DenseNet",
    r"features\.\d+\.(conv|weight)": "a VGG or MobileNetV2",
    r"(exp_avg|momentum_buffer)$": "the state of an optimiser",
    r"^(weight|kernel|head\.(weight|kernel))$": "a class matrix without its net",
}


def stranger(tensors: Mapping[str, Tensor]) -> str | None:
    """Return what net some tensors belong to, with its article; None if nobody knows."""
    return next((net for pattern, net in NETS.items() if any(re.search(pattern, name) for name in tensors)), None)
