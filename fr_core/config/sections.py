"""Sections that every run has: data, start, training, verification, tracking; and what all sections share."""

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Ratio = Annotated[float, Field(gt=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]  # share of the old that a moving average keeps
Channels = Annotated[int, Field(ge=8)]  # below, PyTorch 2.13 writes past memory (conv1×1 of stride 2, channels last)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _a_flag_is_no_number(cls, tree: object) -> object:
        for name, value in tree.items() if isinstance(tree, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field and bool not in (field.annotation, *get_args(field.annotation)):
                raise ValueError(f"{name} = {str(value).lower()}: true and false are no value for it")
        return tree

    @model_validator(mode="before")
    @classmethod
    def _kinds_unless_told(cls, tree: object) -> object:
        """A choice that does not name its kind is of the default's."""
        if not isinstance(tree, dict):
            return tree
        told: dict[str, object] = {}
        for name, value in tree.items():
            field = cls.model_fields.get(name)
            if isinstance(value, dict) and field and field.discriminator and isinstance(field.default, Section):
                told[name] = {"kind": vars(field.default)["kind"]} | value
        return tree | told


class Augment(Section):
    """Random changes of a training image, drawn from (seed, epoch, sample id). All off but the flip by default."""

    flip: Probability = 0.5
    shift: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # of the image's side, each axis, uniform in ±shift
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.0  # zoom, log-uniform in 1/(1+scale) … 1+scale
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0  # degrees, uniform in ±rotate
    light: Annotated[float, Field(ge=0, lt=1)] = 0.0  # brightness and contrast, each uniform in 1 ± light
    colour: Annotated[float, Field(ge=0, lt=1)] = 0.0  # gain of each channel, uniform in 1 ± colour
    grey: Probability = 0.0  # chance to lose the colour
    blur: Probability = 0.0  # chance to be shrunk by up to 3 and enlarged again
    erase: Probability = 0.0  # chance that one rectangle is overwritten with one grey
    erase_area: Annotated[float, Field(gt=0, le=0.9)] = 0.25  # largest share of the image that a rectangle covers


class Masks(Section):
    """Synthetic face masks on training images (METHODS §5). Kinds are weights; they need not sum to 1."""

    ratio: Probability = 0.0  # of the images, class images included
    rendered: Probability = 0.5  # of the masks by the 3D tool, the others by the 2D one
    surgical: NonNegative = 0.45
    kn95: NonNegative = 0.2
    cloth: NonNegative = 0.2
    dark: NonNegative = 0.15

    @model_validator(mode="after")
    def _some_kind(self) -> "Masks":
        if self.surgical + self.kn95 + self.cloth + self.dark == 0:
            raise ValueError("the weights of all kinds are 0; for no masks, ratio = 0")
        return self


class Progressive(Section):
    """Progressive resizing: a run's first epochs train on smaller images, which cost less (EfficientNetV2, 2021, §4).

    The net must end in a feature map of the same side for both sizes, since its last linear layer is fixed to it.
    """

    size: Annotated[int, Field(ge=16)]  # pixels
    share: Annotated[float, Field(gt=0, lt=1)]  # of train.epochs, whatever train.max_steps says


class Balanced(Section):
    """Batches of which one part is groups of one person's images, and the other random.

    Every image still comes once in an epoch. Groups are made within ``shuffle_window``; a window whose whole groups
    are used up goes on at random.
    """

    images: Annotated[int, Field(ge=2, le=64)] = 4  # of one person together
    share: Probability = 0.5  # of the batch; 0: none


class Data(Section):
    path: str = ""  # folder of shards, as `bigface ingest` leaves it
    lanes: Annotated[int, Field(ge=1)] | None = None  # None: the batch's largest divisor to 64; with class images, 16
    shuffle_window: Annotated[int, Field(ge=1)] = 16384  # images shuffled together, over all lanes
    check_sha256: bool = True  # of every shard, once before the run; sizes are always checked
    augment: Augment = Augment()
    masks: Masks = Masks()
    progressive: Progressive | None = None
    balanced: Balanced | None = None
    # Augmented copies of each image in a batch, side by side; a batch of 64 then takes 32 images, and an epoch twice as
    # many steps.
    views: Literal[1, 2] = 1
    variants: Annotated[int, Field(ge=1, le=64)] = 1  # identities made of each real one (fr_core/data/virtual.py)
    variant_strength: Annotated[float, Field(gt=0, le=0.1)] = 0.022  # how far its features move, share of the side


class Init(Section):
    """Warm start: fine-tune a trained backbone, on new identities if need be."""

    backbone: str | None = None  # run, checkpoint or safetensors file with weights of this same net
    # prototypes: mean embedding of each identity's images; names: rows of identities that the backbone's run knew, by
    # their names, and prototypes for the new ones
    head: Literal["random", "prototypes", "names"] = "random"


class Train(Section):
    epochs: Annotated[int, Field(ge=0)] = 20  # 0, for quantface: the net as it starts, calibrated but not trained
    # Stop early: the schedule ends there, but what it states in epochs stays.
    max_steps: Annotated[int, Field(ge=1)] | None = None
    global_batch: Annotated[int, Field(ge=2)] = 128
    accumulate: Annotated[int, Field(ge=1)] = 1  # micro-batches per rank and step
    # Of the backbone; weights stay float32. auto: bfloat16 where the processor has it, else float32.
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # Activation checkpointing: the backward pass makes the maps inside segments of residual blocks anew.
    recompute: bool = False
    recompute_blocks: Annotated[int, Field(ge=1)] | None = None  # of a segment; None: √(their number / 6)
    # Ghost batch norm: batch statistics per group of this many images of a rank's micro-batch; None: of all of it.
    ghost_batch: Annotated[int, Field(ge=2)] | None = None
    # Precision in which the backbone's gradients travel between ranks and are summed; None: float32.
    compress_gradients: Literal["bfloat16", "float16"] | None = None
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0  # averages the weights; the average is what is verified and used
    max_bad_steps: Annotated[int, Field(ge=1)] = 10  # non-finite steps in a row before the run stops
    log_every: Annotated[int, Field(ge=1)] = 20  # steps
    save_every: Annotated[int, Field(ge=1)] = 1000
    keep: Annotated[int, Field(ge=1)] = 3  # newest checkpoints that stay on disk
    verify_every: Annotated[int, Field(ge=1)] | None = None  # None: at the end only


class Verify(Section):
    images: str | None = None  # folder that the pairs' paths are relative to; a .bin brings its own
    pairs: str | None = None  # our CSV, LFW's pairs.txt or a .bin; None: training ends without verification


class Tracking(Section):
    uri: str | None = None  # None: sqlite:///mlflow.db beside the runs, of a run at a URL none; "off": none
    experiment: str = "bigface"
    parent: str | None = None  # the MLflow run that this one is shown under
