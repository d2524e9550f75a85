"""Sections of the backbone, ``net.kind``."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from fr_core.config.sections import Channels, NonNegative, Positive, Section

# Widths of the published MobileFaceNet (Chen et al., 2018).
MOBILEFACENET = (64, 128, 64, 256, 128, 512, 256, 128, 512)


def function_name(call: str) -> str:
    """Return ``package.module:function`` if it has this form."""
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", call):
        raise ValueError(f"{call}: write package.module:function")
    return call


class BaseNet(Section):
    """Base of the nets' sections; each also has ``input_size`` and ``embedding``, the dimensions of the embedding."""

    kind: str
    """Name of the architecture."""

    @property
    def stride(self) -> int:
        """Return the input pixels per pixel of the last feature map; every halving rounds up."""
        return 16

    @property
    def residual(self) -> bool:
        """Return whether the net has residual blocks that the backward pass can recompute."""
        return False

    @property
    def normed(self) -> bool:
        """Return whether the net has batch norms while it trains."""
        return True


class FloatNet(BaseNet):
    """Base of the nets that training begins with."""

    input_size: Annotated[int, Field(ge=16, multiple_of=16)] = 112
    """Side of the input, in pixels."""
    input_mean: NonNegative = 127.5
    """Mean of the input: x = (pixel − input_mean) / input_std, in RGB."""
    input_std: Positive = 127.5
    """Scale of the input: x = (pixel − input_mean) / input_std."""


class Residual(FloatNet):
    """Base of the IR-ResNets: fields that the plain net and the mixture share."""

    depth: Literal[10, 18, 34, 50, 100, 120, 140, 152, 160, 200, 240, 600, 1200] = 50
    """Depth of the IR-ResNet (ArcFace, Deng et al., 2019; 120, 140 and from 200 on BigFace, MFR-ICCV2021)."""
    width: Channels = 64
    """Channels of the first stage; each later stage has twice the channels of the one before."""
    widths: tuple[Channels, Channels, Channels, Channels] | None = None
    """Channels of all four stages, for pruned nets. None: width and its doubles."""
    stem_stride: Literal[1, 2] = 1
    """Stride of the first convolution; 2 makes an image cost a quarter, for small machines."""
    embedding: Annotated[int, Field(ge=2)] = 512
    """Dimensions of the embedding."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the last linear layer."""
    se: bool = False
    """Squeeze and excitation at the end of each residual block (Hu et al., 2018), as the IR-SE nets have it."""
    inner_norm: bool = True
    """Batch norm between the two convolutions of a residual block. face.evoLVe's nets and their like have none."""
    shortcut: Literal["conv", "pool"] = "conv"
    """Shortcut of the first block, which keeps the width. conv: convolution and norm. pool: every other pixel."""
    norm_eps: Positive = 1e-5
    """ε of the batch norms."""

    @model_validator(mode="before")
    @classmethod
    def _take_width_from_widths(cls, tree: object) -> object:
        if isinstance(tree, dict) and isinstance(tree.get("widths"), list | tuple) and tree["widths"]:
            tree = {"width": tree["widths"][0]} | tree
        return tree

    @model_validator(mode="after")
    def _check_widths(self) -> "Residual":
        if self.widths and self.width != self.widths[0]:
            raise ValueError(f"net.width = {self.width} is not the first of net.widths = {list(self.widths)}")
        return self

    @property
    def stride(self) -> int:
        """Return the input pixels per pixel of the last feature map."""
        return 16 * self.stem_stride

    @property
    def residual(self) -> bool:
        """Return True."""
        return True

    @property
    def channels(self) -> tuple[int, int, int, int]:
        """Return the channels of the four stages; the stem has those of the first."""
        return self.widths or (self.width, 2 * self.width, 4 * self.width, 8 * self.width)


class IResNetNet(Residual):
    """An IR-ResNet (ArcFace, Deng et al., 2019)."""

    kind: Literal["iresnet"] = "iresnet"


class MoENet(Residual):
    """An IR-ResNet whose last stage is a mixture of experts (BigFace, MFR-ICCV2021; docs/methods/bigface.md)."""

    kind: Literal["moe"] = "moe"
    experts: Annotated[int, Field(ge=1, le=64)] = 4
    """Experts: copies of the last stage, from which a gate chooses."""
    active: Annotated[int, Field(ge=1)] = 1
    """Experts that an image uses. With 1, inference costs as much as in the plain net."""
    balance: NonNegative = 0.01
    """Weight of the load-balance term (Switch Transformer, Fedus et al., 2022)."""

    @model_validator(mode="after")
    def _check_active(self) -> "MoENet":
        if self.active > self.experts:
            raise ValueError(f"net.active = {self.active} is more than net.experts = {self.experts}")
        return self


class MobileFaceNetNet(FloatNet):
    """A small net for phones (MobileFaceNet, Chen et al., 2018)."""

    kind: Literal["mobilefacenet"] = "mobilefacenet"
    input_std: Positive = 128.0
    """Scale of the input: x = (pixel − input_mean) / input_std."""
    embedding: Annotated[int, Field(ge=2)] = 128
    """Dimensions of the embedding (MobileFaceNet, 2018: 128)."""
    norm_eps: Positive = 1e-3
    """ε of the batch norms before the embedding."""
    # The order: stem · E and O of stage 3 · E and O of stage 4 · first E, other E and O of stage 5 · last convolution.
    # E are the channels inside a bottleneck, O those that leave it.
    widths: Annotated[tuple[Channels, ...], Field(min_length=9, max_length=9)] | None = None
    """Channels in the order of the layers, for pruned nets. None: the published widths."""

    @property
    def channels(self) -> tuple[int, ...]:
        """Return the channels in the order of the layers."""
        return self.widths or MOBILEFACENET


class GhostFaceNetNet(FloatNet):
    """A net of cheap operations for phones (GhostFaceNet V1, Alansari et al., 2023)."""

    kind: Literal["ghostfacenet"] = "ghostfacenet"
    input_std: Positive = 128.0
    """Scale of the input (GhostFaceNets, 2023: 128): x = (pixel − input_mean) / input_std."""
    width: Annotated[float, Field(ge=0.5, le=8)] = 1.3
    """Factor of all channels (GhostFaceNets, 2023: 1.3 for its best nets)."""
    stem_stride: Literal[1, 2] = 1
    """Stride of the first convolution; with 2 an image costs a quarter (GhostFaceNets, 2023: both)."""
    embedding: Annotated[int, Field(ge=2)] = 512
    """Dimensions of the embedding (GhostFaceNets, 2023: 512)."""
    norm_eps: Positive = 1e-5
    """ε of all batch norms."""

    @property
    def stride(self) -> int:
        """Return the input pixels per pixel of the last feature map."""
        return 16 * self.stem_stride


class FactoryNet(FloatNet):
    """A net that a function of your own code makes (docs/extending.md)."""

    kind: Literal["factory"] = "factory"
    call: Annotated[str, AfterValidator(function_name)]
    """The function: package.module:function. It returns a torch.nn.Module from normalised pixels, float32
    [B, 3, H, W], to embeddings [B, D]. Every worker must be able to import it."""
    arguments: dict[str, object] = Field({})
    """Keyword arguments of the function."""
    input_size: Annotated[int, Field(ge=16)] = 112
    """Side of the input, in pixels."""
    embedding: Annotated[int, Field(ge=2)] = 512
    """Dimensions of the embedding that the function's net returns."""

    def __hash__(self) -> int:
        """Hash the section, whose arguments are a dictionary."""
        return hash(self.model_dump_json())

    @property
    def stride(self) -> int:
        """Return 1: nothing is known of the net's feature maps."""
        return 1


class ViTNet(FloatNet):
    """A vision transformer of all patches of a face, in the form that insightface trains (docs/vit.md)."""

    kind: Literal["vit"] = "vit"
    depth: Annotated[int, Field(ge=1)] = 12
    """Blocks of the transformer (insightface: 12 in ViT-T and ViT-S, 24 in ViT-B and ViT-L)."""
    width: Channels = 512
    """Channels of a token (insightface: 256 in ViT-T, 512 in ViT-S and ViT-B, 768 in ViT-L)."""
    heads: Annotated[int, Field(ge=1)] = 8
    """Heads of the attention, which share the channels of a token."""
    patch: Annotated[int, Field(ge=2)] = 9
    """Side of a patch, in pixels. Rows and columns that fill no patch are left out."""
    mlp_ratio: Annotated[int, Field(ge=1)] = 4
    """Channels between the two linear layers of a block, for each channel of a token."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Stochastic depth (Huang et al., 2016): probability that an image skips a branch of the last block."""
    mask: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the patches that training leaves out of the blocks."""
    embedding: Annotated[int, Field(ge=2)] = 512
    """Dimensions of the embedding (insightface: 512)."""

    @model_validator(mode="after")
    def _check_sizes(self) -> "ViTNet":
        if self.width % self.heads:
            raise ValueError(f"net.heads = {self.heads} does not divide net.width = {self.width}")
        if self.patch > self.input_size:
            raise ValueError(f"net.patch = {self.patch} is more than net.input_size = {self.input_size}")
        if int((self.input_size // self.patch) ** 2 * (1 - self.mask)) < 1:
            raise ValueError(f"net.mask = {self.mask:g} leaves no patch: lower it")
        return self

    @property
    def stride(self) -> int:
        """Return 1: a patch has its position, so all images have one size."""
        return 1

    @property
    def residual(self) -> bool:
        """Return True."""
        return True


class QuantisedNet(BaseNet):
    """A net in integers, quantised from the trained net in ``init.backbone`` (docs/quantisation.md)."""

    kind: Literal["quantised"] = "quantised"
    net: Annotated[IResNetNet | MobileFaceNetNet, Field(discriminator="kind")]
    """The float net that is quantised."""
    weights: Annotated[int, Field(ge=2, le=8)] = 8
    """Bits of the weights (Ef-QuantFace, 2024: 8 and 6)."""
    activations: Annotated[int, Field(ge=2, le=8)] = 8
    """Bits of the activations (Ef-QuantFace, 2024: 8 and 6)."""
    scheme: Literal["integer", "quantface"] = "integer"
    """integer: a scheme that integer kernels run. quantface: the simulation of QuantFace (Boutros et al., 2022)."""
    ranges: Literal["least_error", "extremes"] = "least_error"
    """Ranges of the activations: those of least squared error, or the extremes seen (QuantFace, 2022)."""
    calibration_batches: Annotated[int, Field(ge=1)] = 32
    """Batches, without augmentation, on which the ranges are measured."""
    equalise: bool = True
    """Equalise channel ranges between two layers before the ranges are measured (Nagel et al., 2019)."""

    @property
    def stride(self) -> int:
        """Return the stride of the float net."""
        return self.net.stride

    @property
    def normed(self) -> bool:
        """Return False: batch norms are folded into the layers around them."""
        return False

    @property
    def input_size(self) -> int:
        """Return the input side of the float net, in pixels."""
        return self.net.input_size

    @property
    def embedding(self) -> int:
        """Return the dimensions of the float net's embedding."""
        return self.net.embedding


Net = Annotated[
    IResNetNet | MoENet | MobileFaceNetNet | GhostFaceNetNet | ViTNet | FactoryNet | QuantisedNet,
    Field(discriminator="kind"),
]
