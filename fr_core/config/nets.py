"""Sections of the backbone, ``net.kind``."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fr_core.config.sections import Channels, NonNegative, Section

MOBILEFACENET = (64, 128, 64, 256, 128, 512, 256, 128, 512)  # widths of the published net


class BaseNet(Section):
    """What every net's section answers, beside its ``input_size`` (pixels) and ``embedding`` (dimensions)."""

    kind: str

    @property
    def stride(self) -> int:
        """Pixels of the input to a pixel of the last feature map; every halving rounds up."""
        return 16

    @property
    def residual(self) -> bool:
        """Whether it is made of residual blocks that the backward pass can recompute."""
        return False

    @property
    def normed(self) -> bool:
        """Whether it has batch norms while it trains."""
        return True


class Residual(BaseNet):
    depth: Literal[10, 18, 34, 50, 100, 120, 140, 200, 240, 600, 1200] = 50
    width: Channels = 64  # of the first stage; the next ones double
    widths: tuple[Channels, Channels, Channels, Channels] | None = None  # of all stages instead: pruned nets
    stem_stride: Literal[1, 2] = 1  # 2: a quarter of the work per image, for small machines
    input_size: Annotated[int, Field(ge=32, multiple_of=16)] = 112  # pixels
    embedding: Annotated[int, Field(ge=2)] = 512
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # before the last linear layer

    @model_validator(mode="before")
    @classmethod
    def _width_of_widths(cls, tree: object) -> object:
        if isinstance(tree, dict) and isinstance(tree.get("widths"), list | tuple) and tree["widths"]:
            tree = {"width": tree["widths"][0]} | tree
        return tree

    @model_validator(mode="after")
    def _widths_agree(self) -> "Residual":
        if self.widths and self.width != self.widths[0]:
            raise ValueError(f"net.width = {self.width} is not the first of net.widths = {list(self.widths)}")
        return self

    @property
    def stride(self) -> int:
        return 16 * self.stem_stride

    @property
    def residual(self) -> bool:
        return True

    @property
    def channels(self) -> tuple[int, int, int, int]:
        """Of the four stages; the stem has the first's."""
        return self.widths or (self.width, 2 * self.width, 4 * self.width, 8 * self.width)


class IResNetNet(Residual):
    kind: Literal["iresnet"] = "iresnet"


class MoENet(Residual):
    """An IR-ResNet whose last stage is a mixture of experts (METHODS §5; ``fr_core/nets/moe.py``)."""

    kind: Literal["moe"] = "moe"
    experts: Annotated[int, Field(ge=1, le=64)] = 4
    active: Annotated[int, Field(ge=1)] = 1  # experts that an image uses; 1: the plain net's cost at inference
    balance: NonNegative = 0.01  # weight of the load-balance term

    @model_validator(mode="after")
    def _active_are_there(self) -> "MoENet":
        if self.active > self.experts:
            raise ValueError(f"net.active = {self.active} is more than net.experts = {self.experts}")
        return self


class MobileFaceNetNet(BaseNet):
    kind: Literal["mobilefacenet"] = "mobilefacenet"
    input_size: Annotated[int, Field(ge=16, multiple_of=16)] = 112
    embedding: Annotated[int, Field(ge=2)] = 128
    # Channels in the order of the layers, None: MOBILEFACENET. E are inside a bottleneck, O leave it: stem · E and O of
    # stage 3 · E and O of stage 4 · E of stage 5's first, of its others, and O · the last convolution.
    widths: Annotated[tuple[Channels, ...], Field(min_length=9, max_length=9)] | None = None

    @property
    def channels(self) -> tuple[int, ...]:
        return self.widths or MOBILEFACENET


class QuantisedNet(BaseNet):
    """A net in integers (METHODS §6; ``fr_core/nets/quantised.py``), made of the trained one in ``init.backbone``."""

    kind: Literal["quantised"] = "quantised"
    net: Annotated[IResNetNet | MobileFaceNetNet, Field(discriminator="kind")]
    weights: Annotated[int, Field(ge=2, le=8)] = 8  # bits
    activations: Annotated[int, Field(ge=2, le=8)] = 8  # bits
    scheme: Literal["integer", "quantface"] = "integer"  # what integer kernels run, or QuantFace's simulation
    # How activations get their ranges: by the least squared error, or by the extremes seen ...
    ranges: Literal["least_error", "extremes"] = "least_error"
    calibration_batches: Annotated[int, Field(ge=1)] = 32  # ... in this many batches, without augmentation
    equalise: bool = True  # like ranges for the channels between two layers, before ranges are measured

    @property
    def stride(self) -> int:
        return self.net.stride

    @property
    def normed(self) -> bool:
        return False  # they are folded into the layers around

    @property
    def input_size(self) -> int:
        return self.net.input_size

    @property
    def embedding(self) -> int:
        return self.net.embedding


Net = Annotated[IResNetNet | MoENet | MobileFaceNetNet | QuantisedNet, Field(discriminator="kind")]
