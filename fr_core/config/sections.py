"""Sections that every run has: data, start, training, verification, tracking; and what all sections share."""

import os
import re
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def expand_home(ref: str) -> str:
    """Return a path with the home folder for ``~``, also that of an SQLite address; URLs stay."""
    database, scheme, path = ref.rpartition("sqlite:///")
    return f"{database}{scheme}{os.path.expanduser(path)}"


def registered_name(name: str) -> str:
    """Return a name for MLflow's model registry, with or without an alias, if MLflow takes it."""
    if not re.fullmatch(r"[^/:@]+(@(?!v\d+$|latest$)[\w-]+)?", name):
        raise ValueError(
            f"{name}: write NAME or NAME@ALIAS, such as faces@champion; MLflow keeps v1, v2 and latest for itself"
        )
    return name


Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Ratio = Annotated[float, Field(gt=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]  # share of the old value that a moving average keeps
PathOrURL = Annotated[str, AfterValidator(expand_home)]
Channels = Annotated[int, Field(ge=8)]  # below 8, PyTorch 2.13 writes past memory (conv 1×1, stride 2, channels last)


class Section(BaseModel):
    """A table of a recipe: frozen, strict, and every field with a docstring that ``bigface knobs`` prints."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_flags_as_numbers(cls, tree: object) -> object:
        """Refuse true and false for other fields: pydantic would read them as 1 and 0."""
        for name, value in tree.items() if isinstance(tree, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field and bool not in (field.annotation, *get_args(field.annotation)):
                raise ValueError(f"{name} = {str(value).lower()}: this field takes neither true nor false")
        return tree

    @model_validator(mode="before")
    @classmethod
    def _add_kinds(cls, tree: object) -> object:
        """Give a choice that names no kind the default's kind, and read a word as a kind."""
        if not isinstance(tree, dict):
            return tree
        added: dict[str, object] = {}
        for name, value in tree.items():
            field = cls.model_fields.get(name)
            if not (field and field.discriminator):
                continue
            if isinstance(value, str):
                added[name] = {"kind": value}
            elif isinstance(value, dict) and isinstance(field.default, Section):
                added[name] = {"kind": vars(field.default)["kind"]} | value
        return tree | added


class Augment(Section):
    """Random changes of a training image, drawn from (seed, epoch, sample id). All but the flip are off by default."""

    flip: Probability = 0.5
    """Chance of a horizontal flip."""
    shift: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest shift along each axis, as a share of the image's side; uniform in ±shift."""
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Zoom, log-uniform between 1/(1 + scale) and 1 + scale."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation in degrees; uniform in ±rotate."""
    light: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Brightness and contrast, each uniform in 1 ± light."""
    colour: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Gain of each colour channel, uniform in 1 ± colour."""
    grey: Probability = 0.0
    """Chance that the image loses its colour."""
    blur: Probability = 0.0
    """Chance that the image is shrunk by a factor of up to 3 and enlarged again."""
    erase: Probability = 0.0
    """Chance that one rectangle is overwritten with one grey."""
    erase_area: Annotated[float, Field(gt=0, le=0.9)] = 0.25
    """Largest share of the image that an erased rectangle covers."""


class Masks(Section):
    """Synthetic face masks on training images (BigFace, MFR-ICCV2021; docs/methods/bigface.md).

    The weights of the kinds need not sum to 1.
    """

    ratio: Probability = 0.0
    """Share of the images that get a mask, class images included. BigFace (2021) uses 0.35."""
    rendered: Probability = 0.5
    """Share of the masks that the 3D tool renders; the 2D tool draws the others."""
    surgical: NonNegative = 0.45
    """Weight of surgical masks."""
    kn95: NonNegative = 0.2
    """Weight of KN95 masks."""
    cloth: NonNegative = 0.2
    """Weight of cloth masks."""
    dark: NonNegative = 0.15
    """Weight of dark masks."""

    @model_validator(mode="after")
    def _refuse_no_kind(self) -> "Masks":
        if self.surgical + self.kn95 + self.cloth + self.dark == 0:
            raise ValueError("the weights of all kinds are 0: for no masks set ratio = 0")
        return self


class Progressive(Section):
    """Progressive resizing: the first epochs train on smaller images, which cost less (EfficientNetV2, 2021, §4).

    Both sizes must end in a feature map of the same side, because the net's last linear layer is fixed to that side.
    """

    size: Annotated[int, Field(ge=16)]
    """Side of the smaller images, in pixels."""
    share: Annotated[float, Field(gt=0, lt=1)]
    """Share of train.epochs that trains on the smaller images, whatever train.max_steps says."""


class Balanced(Section):
    """Batches of which one part is groups of images of one person, and the other part is random.

    Every image still comes once in an epoch. Groups are formed within ``shuffle_window``. When a window has no whole
    group left, its remaining images come at random.
    """

    images: Annotated[int, Field(ge=2, le=64)] = 4
    """Images of one person in a group."""
    share: Probability = 0.5
    """Share of the batch that is groups; 0: no groups. EKD (Huang et al., 2022) uses 0.5."""


class Data(Section):
    """Where the images come from, their order, and what happens to them before the net sees them."""

    path: PathOrURL = ""
    """Folder of shards, as `bigface ingest` writes it; a URL works too."""
    lanes: Annotated[int, Field(ge=1)] | None = None
    """Parts the dataset is dealt to; the order of samples depends on it, and the number of workers divides it. None:
    the batch's largest divisor up to 64. With class images at most one lane for 24 images, but 16 at least."""
    shuffle_window: Annotated[int, Field(ge=1)] = 16384
    """Images that are shuffled together, over all lanes."""
    spread: Annotated[int, Field(ge=1)] | None = None
    """Images, about, that lie between two images of a chunk of grouped shards; in the main memory for the time between.
    None: as many as the method's queue has slots, up to 524,288. With fewer, the queue holds a person several times."""
    decoded_mib: Annotated[int, Field(ge=0)] = 1024
    """Mebibytes of decoded images of grouped shards that a worker keeps; for a moment twice as many where a new epoch
    begins. Other images are decoded at each use."""
    check_sha256: bool = True
    """Check every shard's SHA-256 once before the run. Sizes are always checked."""
    augment: Augment = Augment()
    """Random changes of training images."""
    masks: Masks = Masks()
    """Synthetic face masks on training images."""
    progressive: Progressive | None = None
    """Smaller images in the first epochs. None: one size."""
    balanced: Balanced | None = None
    """Groups of images of one person in each batch. None: all images at random."""
    sampling: Annotated[float, Field(ge=0, le=1)] = 1.0
    """q: an identity of n images gets a share of the samples in proportion to n^q (Kang et al., 2020, eq. 1). 1: every
    image once an epoch. 0: all identities equally often. Between them, 0.5 is usual."""
    views: Literal[1, 2] = 1
    """Augmented copies of each image in a batch. With 2, a batch of 64 takes 32 images and an epoch has twice as many
    steps."""
    variants: Annotated[int, Field(ge=1, le=64)] = 1
    """Classes made of each identity by changing its face's proportions, the real face included; 1: no new ones."""
    variant_strength: Annotated[float, Field(gt=0, le=0.1)] = 0.022
    """How far a variant's facial features move: a standard deviation, as a share of the image's side."""


class Init(Section):
    """Warm start: fine-tune a trained backbone, also on new identities."""

    backbone: PathOrURL | None = None
    """Run, checkpoint or file of weights, also of other projects (docs/weights.md). Its net takes the place of the
    recipe's; overrides of net still count. None: random weights."""
    net: str | None = None
    """What that file holds where it does not tell: a family of weights such as adaface, or a net such as iresnet50."""
    head: Literal["random", "prototypes", "names"] = "random"
    """Start of the class matrix. prototypes: mean embedding of each identity's images. names: the backbone's run gives
    the rows of identities that it knows by name, and prototypes fill the others."""


class FineTune(Section):
    """Fine-tuning of ``init.backbone``: which of its weights move, when, and how fast (docs/finetuning.md)."""

    freeze: tuple[str, ...] = ()
    """Weights of the backbone that stay as they were, as patterns of their names, such as ["conv1*", "layer1.*"]. Batch
    norms without a trained weight keep their statistics too."""
    layer_decay: Ratio = 1.0
    """Layer-wise decay of the learning rate: each block has this share of the rate of the block above it (BEiT, Bao et
    al., 2022). 1: one rate for all."""
    head_epochs: NonNegative = 0.0
    """First epochs, in which the class matrix alone is trained. Weights and batch-norm statistics of the backbone stay
    as they were. 0: none."""


class Train(Section):
    """Length, batch, precision, memory and checkpoints of the training."""

    epochs: Annotated[int, Field(ge=0)] = 20
    """Epochs of the run. 0 is for quantface: it calibrates the net and trains nothing."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many steps. The schedule ends there, but what it states in epochs stays. None: all epochs."""
    global_batch: Annotated[int, Field(ge=2)] = 128
    """Images of an optimiser step, over all workers and micro-batches."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Micro-batches that each worker accumulates per step; more need less memory."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the backbone's forward and backward pass; weights stay float32. auto: bfloat16 where the processor
    has it, else float32."""
    tf32: bool = True
    """On a card, convolutions in float32 may use TensorFloat-32. Verification never does."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the net's blocks by torch.compile, which takes minutes at the start. auto: on a card with Triton."""
    deterministic: bool = False
    """Let a card compute the same numbers in every run, at some cost in speed. A CPU always does."""
    recompute: bool = False
    """Activation checkpointing (Chen et al., 2016): the backward pass recomputes activations inside segments of
    residual blocks."""
    recompute_blocks: Annotated[int, Field(ge=1)] | None = None
    """Residual blocks of a segment that is recomputed. None: √(blocks / 6)."""
    ghost_batch: Annotated[int, Field(ge=2)] | None = None
    """Ghost batch norm (Hoffer et al., 2017): images that share batch statistics. None: a worker's whole
    micro-batch."""
    compress_gradients: Literal["bfloat16", "float16"] | None = None
    """Precision in which workers exchange and sum the backbone's gradients. None: float32."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average of the weights, per step; the average is what is verified and used. 0: no average."""
    max_bad_steps: Annotated[int, Field(ge=1)] = 10
    """Consecutive steps with a non-finite loss or gradient after which the run stops."""
    log_every: Annotated[int, Field(ge=1)] = 20
    """Steps between two log lines."""
    save_every: Annotated[int, Field(ge=1)] = 1000
    """Steps between two checkpoints."""
    keep: Annotated[int, Field(ge=1)] = 3
    """Newest checkpoints that stay on disk."""
    save_beside: bool = True
    """Write checkpoints while the training goes on. It takes main memory for a copy of the state."""
    verify_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between two verifications. None: only at the end."""
    trust_code: bool = False
    """Run the code that init.backbone or the teacher names, if it is a net of net.kind = factory."""


class Verify(Section):
    """Pairs of faces on which the run verifies its net."""

    images: PathOrURL | None = None
    """Folder that the pairs' paths are relative to. None: for a .bin, which holds its images."""
    pairs: PathOrURL | None = None
    """bigface's CSV, LFW's pairs.txt, or a .bin. None: training ends without verification."""


class Tracking(Section):
    """Where MLflow records the run."""

    uri: PathOrURL | None = None
    """MLflow's address; "off": no tracking. None: sqlite:///mlflow.db beside the run, or no tracking if the run lies at
    a URL."""
    experiment: str = "bigface"
    """MLflow experiment that the run belongs to."""
    parent: str | None = None
    """MLflow run id under which this run is shown. None: at the top."""
    net: bool = True
    """Log the trained net as an MLflow model, which `mlflow models serve` serves. Never with net.kind = factory."""
    register_as: Annotated[str, AfterValidator(registered_name)] | None = None
    """Register that model as NAME, or NAME@ALIAS. None: not registered."""
