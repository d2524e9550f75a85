"""Every knob of a run: typed, frozen, strict. No torch here.

A recipe is a TOML file of these sections; ``key.path=value`` on the command line overrides single fields.
Choices are tagged unions on ``kind``, so that a knob which does not apply cannot be written.
Recipes state the *global* batch; the number of workers is a fact of the launch and never stands here.
"""

import difflib
import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fr_core.errors import UserError

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Ratio = Annotated[float, Field(gt=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]  # share of the old that a moving average keeps

Channels = Annotated[int, Field(ge=8)]  # below, PyTorch 2.13 writes past memory (conv1×1 of stride 2, channels last)

MAX_LANES = 64
MOBILEFACENET = (64, 128, 64, 256, 128, 512, 256, 128, 512)  # widths of the published net


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _a_flag_is_no_number(cls, tree: Any) -> Any:
        for name, value in tree.items() if isinstance(tree, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field and bool not in (field.annotation, *get_args(field.annotation)):
                raise ValueError(f"{name} = {str(value).lower()}: true and false are no value for it")
        return tree


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


class Residual(Section):
    depth: Literal[10, 18, 34, 50, 100, 120, 140, 200, 240, 600, 1200] = 50
    width: Channels = 64  # of the first stage; the next ones double
    widths: tuple[Channels, Channels, Channels, Channels] | None = None  # of all stages instead: pruned nets
    stem_stride: Literal[1, 2] = 1  # 2: a quarter of the work per image, for small machines
    input_size: Annotated[int, Field(ge=32, multiple_of=16)] = 112  # pixels
    embedding: Annotated[int, Field(ge=2)] = 512
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # before the last linear layer

    @model_validator(mode="before")
    @classmethod
    def _width_of_widths(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and isinstance(tree.get("widths"), list | tuple) and tree["widths"]:
            tree = {"width": tree["widths"][0]} | tree
        return tree

    @model_validator(mode="after")
    def _widths_agree(self) -> "Residual":
        if self.widths and self.width != self.widths[0]:
            raise ValueError(f"net.width = {self.width} is not the first of net.widths = {list(self.widths)}")
        return self

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


class MobileFaceNetNet(Section):
    kind: Literal["mobilefacenet"] = "mobilefacenet"
    input_size: Annotated[int, Field(ge=16, multiple_of=16)] = 112
    embedding: Annotated[int, Field(ge=2)] = 128
    # Channels in the order of the layers, None: MOBILEFACENET. E are inside a bottleneck, O leave it: stem · E and O of
    # stage 3 · E and O of stage 4 · E of stage 5's first, of its others, and O · the last convolution.
    widths: Annotated[tuple[Channels, ...], Field(min_length=9, max_length=9)] | None = None

    @property
    def channels(self) -> tuple[int, ...]:
        return self.widths or MOBILEFACENET


class QuantisedNet(Section):
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
    def input_size(self) -> int:
        return self.net.input_size

    @property
    def embedding(self) -> int:
        return self.net.embedding


Net = Annotated[IResNetNet | MoENet | MobileFaceNetNet | QuantisedNet, Field(discriminator="kind")]


class Margin(Section):
    """s·(cos(m1·θ + m2) − m3) for the positive class (METHODS §1). ArcFace: m2 = .5, m3 = 0. CosFace: m2 = 0, m3 = .4.

    What is not given keeps its default, so name both: m2 alone makes the combination.
    """

    scale: Positive = 64.0
    m1: Annotated[float, Field(ge=1, le=4)] = 1.0
    m2: Annotated[float, Field(ge=0, le=1.5)] = 0.0
    m3: Annotated[float, Field(ge=0, le=1)] = 0.4
    gradient: Literal["exact", "straight_through"] = "exact"
    past_pi: Literal["fallback", "wrap"] = "fallback"  # where m1·θ + m2 > π


class Unlabelled(Section):
    """Images without labels, which add the distillation term alone."""

    path: str  # folder of flat shards; their labels are not looked at
    batch: Annotated[int, Field(ge=1)] | None = None  # global images a step; None: as many as train.global_batch
    embeddings: str | None = None  # of these shards, where the teacher's are given as embeddings too


class Taught(Section):
    """Who teaches."""

    named: ClassVar[str]  # where a recipe names the teacher
    teacher: str | None = None  # run, checkpoint, safetensors or ONNX file; sees the images that the student sees
    teacher_net: str | None = None  # what bare weights are, such as mobilefacenet or iresnet50


class Distill(Taught):
    """Distillation from a teacher's embeddings (METHODS §5). The teacher is named on the command line."""

    named: ClassVar[str] = "method.distill.teacher"
    embeddings: str | None = None  # instead: folder of `bigface embed` on the training shards, of the plain images
    weight: Positive = 9.0  # λ
    form: Literal["euclidean", "angular"] = "euclidean"  # ‖t − s‖² of unit vectors, or ShrinkTeaNet's (1 − cos)²
    adapter: bool = False  # a linear layer from the student's width to the teacher's; not shipped
    unlabelled: Unlabelled | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "Distill":
        if self.teacher and self.embeddings:
            raise ValueError("give a teacher or its embeddings, not both")
        if self.unlabelled and bool(self.unlabelled.embeddings) != bool(self.embeddings):
            raise ValueError(
                "the teacher's embeddings of labelled and unlabelled images go together: give "
                "method.distill.embeddings and method.distill.unlabelled.embeddings, or a teacher"
            )
        return self


class BigFace(Section):
    """Backbone and a class matrix sharded over the ranks (METHODS §2, §5)."""

    kind: Literal["bigface"] = "bigface"
    margin: Margin = Margin()
    sample_rate: Ratio = 1.0  # below 1: Partial FC
    drop_negatives_above: Annotated[float, Field(gt=-1, le=1)] = 1.0  # cosine; 1 keeps all (inter-class filter)
    clip_head: Positive | None = None  # largest norm of the class matrix's gradient
    precision: Literal["float32", "bfloat16"] = "float32"  # of the class matrix's products; their sums are float32
    update: Literal["plain", "fused"] = "plain"  # fused: the class matrix moves tile by tile and has no gradient
    tile: Annotated[int, Field(ge=1)] | None = None  # classes computed at once; None: what fits cache or card
    distill: Distill | None = None


class MarginOfItsOwn(Section):
    """A section whose margin is not that of ``Margin``: parts of it that are not given are the section's."""

    @model_validator(mode="before")
    @classmethod
    def _parts_not_given(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and isinstance(tree.get("margin"), dict):
            tree = tree | {"margin": cls.model_fields["margin"].default.model_dump() | tree["margin"]}
        return tree


class FixedCentres(MarginOfItsOwn):
    """What the methods have in common whose class centres carry no gradient."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of the centres; auto: as the backbone trains
    tile: Annotated[int, Field(ge=1)] | None = None  # centres computed at once; None: what fits cache or card


class AttFC(FixedCentres):
    """A momentum class encoder, attention over class images, a queue of class centres (METHODS §3)."""

    kind: Literal["attfc"] = "attfc"
    margin: Margin = Margin(m2=0.5, m3=0)
    class_images: Annotated[int, Field(ge=1, le=16)] = 2  # K: other images of the same person, beside each image
    strategy: Literal["attention", "constant", "single"] = "attention"  # how class images make a centre
    temperature: Positive = 1.0  # of the attention
    size_ratio: Ratio = 0.3  # slots of the queue by identities
    encoder_momentum: Momentum = 0.999
    order: Literal["paper", "reference"] = "paper"  # a batch's centres enter the queue before or after its loss


class DCQ(FixedCentres):
    """Dynamic Class Queue: AttFC's forerunner with one class image and no attention (METHODS §3)."""

    kind: Literal["dcq"] = "dcq"
    margin: Margin = Margin(scale=50, m3=0.3)
    queue_size: Annotated[int, Field(ge=2)] = 8192
    encoder_momentum: Momentum = 0.999


class F2C(FixedCentres):
    """Faster Face Classification: a pool of classes, least recently used out first (METHODS §3)."""

    kind: Literal["f2c"] = "f2c"
    margin: Margin = Margin(scale=32, m3=0.4)
    pool_size: Annotated[int, Field(ge=2)] = 8192  # classes
    encoder_momentum: Momentum = 0.99


class VirtualFC(FixedCentres):
    """Virtual fully-connected layer: identities share anchors, which a batch takes over (METHODS §3)."""

    kind: Literal["virtual_fc"] = "virtual_fc"
    margin: Margin = Margin(scale=32, m2=0.5, m3=0)
    anchors: Annotated[int, Field(ge=2)] = 8192
    class_images: Annotated[int, Field(ge=1, le=16)] = 1  # K: other images of the same person, trained on too


class PairLoss(Section):
    """What the losses have in common that compare pairs with thresholds (``fr_core/losses/ekd.py``)."""

    hardest: Annotated[int, Field(ge=1)] = 2000  # negative pairs of a batch, by the student's cosine, that count
    pool: Annotated[int, Field(ge=1)] = 2**16  # newest negative pairs that the thresholds are read off
    threshold_momentum: Momentum = 0.99  # of the thresholds' moving average; 0: they are the pool's


class EKD(PairLoss):
    """Evaluation-oriented knowledge distillation: pairs stand among the thresholds as they do for the teacher."""

    kind: Literal["ekd"] = "ekd"
    lambda_pos: NonNegative = 0.02  # weight of pairs of one identity
    lambda_neg: NonNegative = 0.01  # weight of the hardest pairs of two
    temperature: Positive = 0.01  # width of a threshold's edge, in cosine


class RelativeSimilarity(PairLoss):
    """EKD's general form: pairs lie as far from the thresholds as they do for the teacher."""

    kind: Literal["relative_similarity"] = "relative_similarity"
    lambda_pos: NonNegative = 1.0  # weights as EKD's, of squared cosines instead of squared numbers of thresholds
    lambda_neg: NonNegative = 1.0


class EmbeddingMSE(Section):
    """QuantFace's own loss: the squared distance of normalised embeddings, which have one width; mean over images.

    A sum over dimensions: the mean over them too would make its gradient vanish beside EKD's at the same rate.
    """

    kind: Literal["mse"] = "mse"


AgreementLoss = Annotated[EKD | RelativeSimilarity | EmbeddingMSE, Field(discriminator="kind")]


class CrossEntropy(MarginOfItsOwn):
    """A class matrix beside the teacher, with its margin softmax: EKD's ablation."""

    weight: Positive = 1.0  # beside the agreement with the teacher
    margin: Margin = Margin(m2=0.4, m3=0)


class QuantFace(Taught):
    """A net follows a teacher, by the pairs of a batch and without a classifier (METHODS §6).

    Made for a quantised or pruned copy of the teacher, which ``init.backbone`` starts; any net may follow any other.
    """

    kind: Literal["quantface"] = "quantface"
    named: ClassVar[str] = "method.teacher"
    loss: AgreementLoss = EKD()  # a section, or its kind alone: loss = "mse"
    labels: bool = True  # False: every image is an identity of its own, which its views alone share
    cross_entropy: CrossEntropy | None = None  # best with init.head = "prototypes"

    @model_validator(mode="before")
    @classmethod
    def _ekd_unless_told(cls, tree: Any) -> Any:
        """Takes a bare word for the loss's kind."""
        loss = tree.get("loss") if isinstance(tree, dict) else None
        if isinstance(loss, str | dict):
            tree = tree | {"loss": {"kind": loss} if isinstance(loss, str) else {"kind": "ekd"} | loss}
        return tree

    @model_validator(mode="after")
    def _classes_are_labels(self) -> "QuantFace":
        if self.cross_entropy and not self.labels:
            raise ValueError("method.cross_entropy needs labels: method.labels = true, or leave it out")
        return self


Method = Annotated[BigFace | AttFC | DCQ | F2C | VirtualFC | QuantFace, Field(discriminator="kind")]


class ClassMatrix(Section):
    """How the class matrix moves: by SGD with momentum, whatever moves the backbone. None: as the backbone."""

    lr: Positive | None = None  # a run asks for it beside LARS and AdamW, whose rates mean something else
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None  # None beside AdamW: 0.9
    weight_decay: NonNegative | None = None  # None beside AdamW, whose decay means something else: 5e-4


class Optimizer(Section):
    lr: Positive = 0.1
    weight_decay: NonNegative = 5e-4
    clip: Positive | None = 5.0  # largest norm of the backbone's gradient
    reference_batch: Annotated[int, Field(ge=1)] | None = None  # lr is meant for it: × global_batch / reference_batch
    shard_state: bool = False  # the backbone's optimiser state over the ranks (ZeRO, stage 1)
    head: ClassMatrix = ClassMatrix()


class SGD(Optimizer):
    kind: Literal["sgd"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    decay_all: bool = True  # False: norm layers and biases do not decay


class LARS(Optimizer):
    """Layer-wise rates for large batches (You et al., 2017); norm layers and biases neither adapt nor decay."""

    kind: Literal["lars"] = "lars"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    trust: Positive = 1e-3


class AdamW(Optimizer):
    """Norm layers and biases do not decay."""

    kind: Literal["adamw"] = "adamw"
    lr: Positive = 1e-3
    weight_decay: NonNegative = 0.05
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999


class Plain(Section):
    """SGD beside Muon."""

    lr: Positive = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 5e-4


class Muon(Optimizer):
    """Orthogonal steps for matrices and convolutions (Jordan et al., 2024); the rest and the class matrix: ``sgd``."""

    kind: Literal["muon"] = "muon"
    lr: Positive = 0.02
    weight_decay: NonNegative = 0.01  # of lr, as AdamW's
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    sgd: Plain = Plain()


Optim = Annotated[SGD | LARS | AdamW | Muon, Field(discriminator="kind")]


class Warmup(Section):
    warmup_epochs: NonNegative = 0.0  # linear from 0


class Constant(Warmup):
    kind: Literal["constant"] = "constant"


class Cosine(Warmup):
    kind: Literal["cosine"] = "cosine"
    final_ratio: Probability = 0.0  # of the base rate, where the last step ends


class Polynomial(Warmup):
    kind: Literal["polynomial"] = "polynomial"
    power: Positive = 2.0


class MultiStep(Warmup):
    kind: Literal["multistep"] = "multistep"
    milestones: tuple[Positive, ...]  # epochs
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _rising(self) -> "MultiStep":
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("milestones must rise")
        return self


class FastFace(Warmup):
    """The loss decides (METHODS §4): the recurrence of the published code."""

    kind: Literal["fastface"] = "fastface"
    alpha: Annotated[float, Field(gt=0, lt=1)] = 1e-3  # rates of the two moving averages
    beta: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    threshold: Positive = 5e-5  # λ: a loss that falls by less a step is stationary
    patience: Annotated[float, Field(gt=0, lt=1)] = 0.05  # τ: stationary share of all steps before a cut
    delta: Annotated[float, Field(gt=1)] = 2.0  # the rate is divided by it
    max_cuts: Annotated[int, Field(ge=1)] = 8
    start: Literal["published", "consistent"] = "published"
    reference_batch: Annotated[int, Field(ge=1)] | None = None  # alpha, beta, threshold hold for it and are scaled


class FastFaceHaar(Warmup):
    """The loss decides: the window form, which also raises the rate again."""

    kind: Literal["fastface_haar"] = "fastface_haar"
    m: Annotated[int, Field(ge=2)] | None = None  # steps; None: window
    window: Annotated[float, Field(gt=0, lt=1)] = 0.015  # m as a share of all steps
    threshold: Positive = 0.06


Schedule = Annotated[Constant | Cosine | Polynomial | MultiStep | FastFace | FastFaceHaar, Field(discriminator="kind")]


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


class Config(Section):
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: Data = Data()
    net: Net = IResNetNet()
    method: Method = BigFace()
    optim: Optim = SGD()
    schedule: Schedule = Cosine()
    init: Init = Init()
    train: Train = Train()
    verify: Verify = Verify()
    tracking: Tracking = Tracking()

    @model_validator(mode="before")
    @classmethod
    def _kinds_unless_told(cls, tree: Any) -> Any:
        for section, kind in (("net", "iresnet"), ("method", "bigface"), ("optim", "sgd"), ("schedule", "cosine")):
            if isinstance(tree, dict) and isinstance(tree.get(section), dict):
                tree = tree | {section: {"kind": kind} | tree[section]}
        return tree

    def _check_balance(self, balanced: Balanced) -> None:
        batch, wanted = self.train.global_batch, groups(self)
        if self.data.views > 1:
            raise ValueError("data.balanced and data.views = 2 are two ways to positive pairs: data.balanced.share = 0")
        if self.data.variants > 1:
            raise ValueError(
                "data.balanced groups images of one person, of whom data.variants makes several: leave it out"
            )
        if abs(wanted * balanced.images - batch * balanced.share) > 1e-6 * batch or wanted == 0:
            raise ValueError(
                f"data.balanced: {balanced.share:g} of train.global_batch = {batch} is no whole number of groups of "
                f"{balanced.images} images: set share to a multiple of {balanced.images / batch:.6g}"
            )
        if self.data.lanes and wanted % self.data.lanes:
            raise ValueError(
                f"data.lanes = {self.data.lanes} does not divide the {wanted} groups that data.balanced puts in a "
                f"batch: leave it out, or use {math.gcd(wanted, self.data.lanes)}"
            )

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        batch, accumulate = self.train.global_batch, self.train.accumulate
        if batch % accumulate:
            raise ValueError(f"train.accumulate = {accumulate} does not divide train.global_batch = {batch}")
        if batch % self.data.views:
            raise ValueError(f"data.views = 2 shows each image twice: train.global_batch = {batch} must be even")
        rows = step_rows(self)
        if self.data.lanes and rows % self.data.lanes:
            halved = "" if rows == batch else f", which takes {rows} images"
            raise ValueError(f"data.lanes = {self.data.lanes} does not divide train.global_batch = {batch}{halved}")
        balanced = self.data.balanced if self.data.balanced and self.data.balanced.share else None
        if class_images(self) and (balanced or self.data.views > 1):
            name = "data.balanced" if balanced else "data.views = 2"
            raise ValueError(f"{name} is for flat shards, and {self.method.kind} reads grouped ones: leave it out")
        if balanced:
            self._check_balance(balanced)
        if self.data.progressive:
            size, full, stride = self.data.progressive.size, self.net.input_size, net_stride(self.net)
            if not full - (full - 1) % stride <= size < full:
                raise ValueError(
                    f"data.progressive.size = {size}: this net's feature map allows "
                    f"{full - (full - 1) % stride} to {full - 1}"
                )
        if self.train.recompute_blocks and not self.train.recompute:
            raise ValueError("train.recompute_blocks needs train.recompute = true")
        if self.train.recompute and not isinstance(self.net, Residual):
            raise ValueError(f"train.recompute is for residual nets: leave it out with net.kind = {self.net.kind}")
        if self.train.compress_gradients == "float16" and self.train.precision != "float16":
            raise ValueError(
                'train.compress_gradients = "float16" needs the loss scale of train.precision = "float16", or small '
                'gradients vanish: use "bfloat16"'
            )
        if self.verify.pairs and not self.verify.images and not self.verify.pairs.endswith(".bin"):
            raise ValueError("verify.pairs needs verify.images, the folder that its paths are relative to")
        if self.train.verify_every and not self.verify.pairs:
            raise ValueError("train.verify_every needs verify.pairs: name them, or leave it out")
        if self.verify.images and not self.verify.pairs:
            raise ValueError("verify.images needs verify.pairs, which names the images to compare")
        if isinstance(self.method, AttFC) and self.method.order == "paper" and accumulate > 1:
            raise ValueError(
                'method.order = "paper" puts the whole batch\'s centres in the queue first: train.accumulate = 1, '
                'or method.order = "reference"'
            )
        if isinstance(self.method, DCQ) and self.train.ema:
            raise ValueError("dcq ships its key encoder: leave train.ema out")
        if isinstance(self.method, QuantFace) and accumulate > 1:
            raise ValueError("quantface compares the pairs of the whole batch: train.accumulate = 1")
        paired = isinstance(self.method, QuantFace) and not isinstance(self.method.loss, EmbeddingMSE)
        if paired and self.data.views == 1 and not getattr(self.method, "labels", True):
            raise ValueError("method.labels = false has no positive pairs but two views of an image: data.views = 2")
        if self.train.ghost_batch and isinstance(self.net, QuantisedNet):
            raise ValueError("train.ghost_batch is for batch norm, and a quantised net has none: leave it out")
        if self.train.epochs == 0 and not isinstance(self.method, QuantFace):
            raise ValueError(
                f"train.epochs = 0 calibrates a net, which is for quantface; {self.method.kind} takes 1 or more"
            )
        if self.train.epochs == 0:
            for name, asked in (
                ("data.masks", self.data.masks.ratio > 0),
                (f'schedule.kind = "{self.schedule.kind}"', isinstance(self.schedule, FastFace | FastFaceHaar)),
            ):
                if asked:
                    raise ValueError(
                        f"train.epochs = 0 calibrates on plain images and trains nothing: leave {name} out"
                    )
        if self.optim.head != ClassMatrix() and class_matrix(self) is None:
            raise ValueError(f"optim.head moves a class matrix, and {self.method.kind} has none: leave it out")
        if isinstance(self.method, F2C) and batch % 4:
            raise ValueError(f"f2c shares its images out by fours: train.global_batch = {batch} is no multiple of 4")
        if isinstance(self.method, F2C | VirtualFC) and accumulate > 1:
            raise ValueError(f"{self.method.kind} writes its centres once per batch: train.accumulate = 1")
        if isinstance(self.method, BigFace) and self.method.update == "fused":
            if accumulate > 1:
                raise ValueError('method.update = "fused" moves the class matrix once per batch: train.accumulate = 1')
            if self.method.clip_head is not None:
                raise ValueError('method.update = "fused" has no gradient to clip: leave method.clip_head out')
            if self.train.precision == "float16":
                raise ValueError('method.update = "fused" cannot scale the loss: train.precision = "bfloat16"')
        if unlabelled_batch(self) % accumulate:
            raise ValueError(
                f"train.accumulate = {accumulate} does not divide "
                f"method.distill.unlabelled.batch = {unlabelled_batch(self)}"
            )
        distill = distillation(self)
        if distill and distill.embeddings and self.data.variants > 1:
            raise ValueError(
                "method.distill.embeddings are those of the plain faces, of which data.variants makes others: "
                "give method.distill.teacher"
            )
        if self.init.head != "random" and not self.init.backbone:
            raise ValueError(f'init.head = "{self.init.head}" needs init.backbone')
        if self.init.head != "random" and class_matrix(self) is None:
            raise ValueError(f'init.head = "{self.init.head}" is for a class matrix; {self.method.kind} has none')
        return self


def lanes(config: Config) -> int:
    """Lanes that the data is dealt to (fr_core/data/plan.py): ``data.lanes``, or the batch's largest divisor to 64.

    With class images to 16: at the ends of a lane's window, chunks are decoded of which a part is not needed yet.
    Each of them has equally many of a batch's groups of images of one person.
    """
    most = MAX_LANES if class_images(config) == 0 else MAX_LANES // 4
    shared = math.gcd(step_rows(config), groups(config))
    return config.data.lanes or max(n for n in range(1, min(most, shared) + 1) if shared % n == 0)


def step_rows(config: Config) -> int:
    """Rows of the dataset that a step takes, over all ranks."""
    return config.train.global_batch // config.data.views


def groups(config: Config) -> int:
    """Groups of images of one person in a global batch; 0 where ``data.balanced`` is not asked for."""
    balanced = config.data.balanced
    return round(config.train.global_batch * balanced.share / balanced.images) if balanced else 0


def net_stride(net: Net) -> int:
    """Pixels of the input to a pixel of the last feature map; every halving rounds up."""
    net = net.net if isinstance(net, QuantisedNet) else net
    return 16 * net.stem_stride if isinstance(net, Residual) else 16


def input_size(config: Config, epoch: int) -> int:
    """Side of the images that the net trains on in an epoch, pixels."""
    small = config.data.progressive
    return small.size if small and epoch < small.share * config.train.epochs else config.net.input_size


def classes(config: Config, identities: int) -> int:
    """Classes of a run: the dataset's identities, or all their variants."""
    return identities * config.data.variants


def class_images(config: Config) -> int:
    """Class images that come with each image of a batch; 0 where the method needs none."""
    match config.method:
        case BigFace() | QuantFace():
            return 0
        case DCQ() | F2C() | AttFC(strategy="single"):
            return 1
        case method:
            return method.class_images


def class_matrix(config: Config) -> BigFace | None:
    """The settings of the run's class matrix, if it trains one."""
    match config.method:
        case BigFace() as method:
            return method
        case QuantFace(cross_entropy=CrossEntropy(margin=margin)):
            return BigFace(margin=margin)
        case _:
            return None


def distillation(config: Config) -> Distill | None:
    """What a run with a class matrix distils from beside it, if it does."""
    return config.method.distill if isinstance(config.method, BigFace) else None


def taught(config: Config) -> Distill | QuantFace | None:
    """Who teaches the run, if anybody does."""
    return config.method if isinstance(config.method, QuantFace) else distillation(config)


def unlabelled_batch(config: Config) -> int:
    """Unlabelled images that come with each global batch."""
    distill = distillation(config)
    if distill is None or distill.unlabelled is None:
        return 0
    return distill.unlabelled.batch or config.train.global_batch


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Optimiser steps of the whole run."""
    steps = config.train.epochs * steps_per_epoch
    return min(steps, config.train.max_steps or steps)


def load_config(recipe: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The config of a recipe, with ``key.path=value`` overrides (values in TOML; a bare word is a string).

    Args:
        recipe: a TOML file, or the name of a shipped recipe (``pipelines/recipes/NAME.toml``).

    Raises:
        UserError: no such recipe, bad TOML, unknown key (named with its nearest neighbour), value out of bounds.
    """
    path = _find_recipe(str(recipe))
    try:
        tree = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML: {error}") from None
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: Mapping[str, Any], source: str) -> Config:
    """A validated config from nested dictionaries; ``source`` names their origin in errors.

    Raises:
        UserError: as :func:`load_config`.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(_fields(first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = f"unknown key{_nearest(where)}"
        raise UserError(f"{source}: {where or 'config'}: {message}") from None


def _fields(loc: Sequence[str | int]) -> Iterator[str]:
    """The fields on an error's way; a union's tag follows its field, and what follows a tag is a field again."""
    tag = False
    for part in loc:
        tag = not tag and part in _union_tags()
        if not tag:
            yield str(part)


def field_paths(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Dotted names of all fields, through every member of the unions."""
    paths = []
    for name, field in model.model_fields.items():
        paths.append(prefix + name)
        for member in (field.annotation, *get_args(field.annotation)):
            if isinstance(member, type) and issubclass(member, Section):
                paths += field_paths(member, f"{prefix}{name}.")
    return list(dict.fromkeys(paths))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names."""
    names: dict[str, Any] = {}
    for name, value in tree.items():
        names |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return names


def recipes() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in _recipe_folder().glob("*.toml"))


def _recipe_folder() -> Path:
    return Path(__file__).parent.parent / "pipelines" / "recipes"


def _find_recipe(name: str) -> Path:
    for path in (Path(name), _recipe_folder() / f"{name}.toml"):
        if path.is_file():
            return path
    near = difflib.get_close_matches(name, recipes(), 1)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped recipes: {', '.join(recipes())}"
    raise UserError(f"no recipe {name!r}: {hint}")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form key.path=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if not isinstance(value, str | int | float | list | dict):  # a folder may be named like a date
        value = text
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    tree[last] = value


def _union_tags() -> set[str]:
    members = (
        member for union in (Net, Method, AgreementLoss, Optim, Schedule) for member in get_args(get_args(union)[0])
    )
    return {member.model_fields["kind"].default for member in members}


def _nearest(key: str) -> str:
    near = difflib.get_close_matches(key, field_paths(), 1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def steps_of_epochs(epochs: float, steps_per_epoch: int) -> int:
    """Whole steps nearest below a number of epochs."""
    return math.floor(epochs * steps_per_epoch + 1e-9)
