"""Sections of the method, ``method.kind``, and the facts that a method states for other modules.

Plans, checks and counts ask the section (:class:`Facts`). Only ``fr_core/train/methods/`` asks which method runs.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from fr_core.config.sections import Momentum, NonNegative, PathOrURL, Positive, Ratio, Section
from fr_core.errors import UserError

Layout = Literal["flat", "grouped"]


@dataclass(frozen=True)
class Facts:
    """What a method needs and does. Counts are per image of the batch."""

    class_images: int = 0
    """K: other images of the same person that come with each image."""
    trained: float = 1.0
    """Images that the backbone trains on."""
    encoded: float = 0.0
    """Images that a momentum encoder sees without a gradient."""
    batch_multiple: int = 1
    """A worker's images of a step are a multiple of this number."""
    whole_batch: str | None = None
    """Why a step cannot be split into micro-batches. None: a step can be split."""
    unscalable: str | None = None
    """Why a loss scale cannot be removed before the weights move. None: the loss can be scaled."""
    encoder: Literal["none", "kept", "shipped"] = "none"
    """Whether the method has a momentum encoder; "shipped": the encoder is the run's result."""
    only_views: str | None = None
    """Why two views of an image are its only positive pairs. None: labels make more pairs."""
    calibrates: bool = False
    """Whether a run of 0 epochs is useful: it calibrates the net that it starts from."""

    @property
    def layout(self) -> Layout:
        """Return the layout of the shards; class images need all images of a person together."""
        return "grouped" if self.class_images else "flat"


class BaseMethod(Section):
    """Base of the methods' sections. A method overrides the properties in which it differs from plain training."""

    kind: str
    """Name of the method."""
    share_knob: ClassVar[str | None] = None
    """Field that sets which share of the classes takes part in a step."""

    @property
    def facts(self) -> Facts:
        """Return what the method needs and does."""
        return Facts()

    @property
    def saves_memory(self) -> dict[str, object]:
        """Return field values with which the same training needs less memory."""
        return {}

    @property
    def to_accumulate(self) -> dict[str, object]:
        """Return the field values that let a step be split into micro-batches; empty if none are needed."""
        return {}

    @property
    def class_matrix(self) -> "BigFace | None":
        """Return the settings of the class matrix that the run trains, or None."""
        return None

    @property
    def taught(self) -> "TeacherSettings | None":
        """Return the settings of the run's teacher, or None."""
        return None

    @property
    def agreement(self) -> "AgreementLoss | None":
        """Return the loss that compares the student's pairs with the teacher's, or None."""
        return None

    def centres(self, classes: int, global_batch: int) -> int:
        """Return how many class centres without a gradient stand for the classes; 0 for methods without centres.

        Raises:
            UserError: the centres are fewer than a batch needs.
        """
        return 0


class BaseMargin(Section):
    """Base of the margins: what all of them have."""

    kind: str
    """Name of the margin."""
    scale: Positive = 64.0
    """s: factor of the logits."""

    @property
    def sees_cosines(self) -> bool:
        """Tell whether a face's margin depends on the cosines of a step's faces with their classes."""
        return False

    @property
    def sums(self) -> int:
        """Return how many numbers of each face the ranks add up for the loss."""
        return 2


class Margin(BaseMargin):
    """Margin of the positive class: s·(cos(m1·θ + m2) − m3) (ArcFace, Deng et al., 2019, eq. 4).

    ArcFace is m2 = 0.5, m3 = 0; CosFace (Wang et al., 2018) is m2 = 0, m3 = 0.4. A field that is not given keeps its
    default. So give both m2 and m3: m2 alone makes a combined margin.
    """

    kind: Literal["fixed"] = "fixed"
    """The margin is the same for every face."""
    m1: Annotated[float, Field(ge=1, le=4)] = 1.0
    """Factor of the angle (SphereFace, Liu et al., 2017); 1: none."""
    m2: Annotated[float, Field(ge=0, le=1.5)] = 0.0
    """Margin added to the angle, in radians. ArcFace uses 0.5."""
    m3: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Margin subtracted from the cosine. CosFace uses 0.4."""
    gradient: Literal["exact", "straight_through"] = "exact"
    """Gradient of the margin. straight_through: as if the margin were a constant, like the public ArcFace code."""
    past_pi: Literal["fallback", "wrap"] = "fallback"
    """Where m1·θ + m2 > π, fallback lets the value fall on (ArcFace, 2019), and wrap lets the cosine rise again."""


class AdaFaceMargin(BaseMargin):
    """AdaFace: the longer an embedding, the more its margin is one of the cosine (Kim et al., CVPR 2022).

    s·(cos(θ − m·z) − m − m·z), where z = h·(length − mean) / (deviation + 0.001) within ±1 (docs/methods/margins.md).
    """

    kind: Literal["adaface"] = "adaface"
    """The margin depends on the length of the embedding, which tells the quality of the image."""
    m: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Margin (AdaFace, 2022)."""
    h: Positive = 0.333
    """Concentration: how fast the margin changes with the length (AdaFace, 2022)."""
    momentum: Momentum = 0.99
    """Share of its old value that the moving average of the lengths' mean and deviation keeps (AdaFace, 2022)."""
    statistics: Literal["batch", "public"] = "batch"
    """Where the average begins: with the first batch. public: with mean 20 and deviation 100, and lengths are clipped
    to 0.001 at least and 100 at most, like the public code."""
    past_ends: Literal["clamp", "wrap"] = "clamp"
    """Where θ − m·z is below 0 or above π, clamp holds the angle there, without a gradient, like the public code. wrap
    lets the cosine turn, as the formula does."""


class MagFaceMargin(BaseMargin):
    """MagFace: the longer an embedding, the greater its margin, and a term that lengthens (Meng et al., CVPR 2021).

    s·cos(θ + m(a)), plus λ·g(a) a face: m grows linearly with the length a, and g(a) = a / high² + 1 / a.
    """

    kind: Literal["magface"] = "magface"
    """The margin grows with the length of the embedding, which has a gradient through it."""
    low_length: Positive = 10.0
    """Least length that counts; shorter embeddings count as this one (MagFace, 2021)."""
    high_length: Positive = 110.0
    """Greatest length that counts (MagFace, 2021)."""
    low_margin: Annotated[float, Field(ge=0, le=1.5)] = 0.45
    """Margin of the least length, in radians (MagFace, 2021)."""
    high_margin: Annotated[float, Field(ge=0, le=1.5)] = 0.8
    """Margin of the greatest length, in radians (MagFace, 2021)."""
    weight: NonNegative = 35.0
    """λ: weight of g, which lengthens embeddings (MagFace, 2021)."""
    past_pi: Literal["fallback", "easy"] = "fallback"
    """Where θ + m > π, fallback lets the value fall on. easy: faces beyond 90° have no margin, the public code's
    default."""

    @model_validator(mode="after")
    def _check_ends(self) -> "MagFaceMargin":
        if self.low_length >= self.high_length:
            raise ValueError("low_length must be less than high_length")
        if self.low_margin > self.high_margin:
            raise ValueError("low_margin must not be more than high_margin")
        return self


class ElasticMargin(BaseMargin):
    """Base of ElasticFace: each face draws its margin from N(m, σ²) in each step (Boutros et al., CVPRW 2022)."""

    sigma: NonNegative = 0.05
    """σ: standard deviation of the margins (ElasticFace, 2022, public config)."""
    plus: Literal["off", "paper", "public"] = "off"
    """ElasticFace+ gives the greater margins of a batch to the faces farther from their class. public: like the public
    code, which deals them out by a permutation that it does not invert."""

    @property
    def sees_cosines(self) -> bool:
        """Tell whether a face's margin depends on the other faces' cosines."""
        return self.plus != "off"


class ElasticArcMargin(ElasticMargin):
    """ElasticFace-Arc: s·cos(θ + margin)."""

    kind: Literal["elastic_arc"] = "elastic_arc"
    """Each face draws a margin of its angle."""
    m: Annotated[float, Field(ge=0, le=1.5)] = 0.5
    """Mean margin, in radians (ElasticFace, 2022)."""
    past_pi: Literal["fallback", "wrap"] = "fallback"
    """Where θ + margin > π, fallback lets the value fall on, and wrap lets the cosine rise again, like the public
    code."""


class ElasticCosMargin(ElasticMargin):
    """ElasticFace-Cos: s·(cos θ − margin)."""

    kind: Literal["elastic_cos"] = "elastic_cos"
    """Each face draws a margin of its cosine."""
    m: Annotated[float, Field(ge=0, le=1)] = 0.35
    """Mean margin (ElasticFace, 2022)."""


class CurricularMargin(BaseMargin):
    """CurricularFace: ArcFace whose hard negatives count less at first, later more (Huang et al., CVPR 2020).

    A negative is hard if its cosine is above cos(θ + m) of the face. Its logit is s·cos·(t + cos). t is the moving
    average of the mean positive cosine.
    """

    kind: Literal["curricular"] = "curricular"
    """ArcFace, and hard negatives weigh by how far the training is."""
    m: Annotated[float, Field(ge=0, le=1.5)] = 0.5
    """Margin added to the angle, in radians (CurricularFace, 2020)."""
    momentum: Momentum = 0.99
    """Share of its old value that t keeps (CurricularFace, 2020)."""

    @property
    def sees_cosines(self) -> bool:
        """Return true: hard negatives and t depend on the positive cosines."""
        return True


class UniFaceMargin(BaseMargin):
    """UniFace: one learned threshold decides every pair of a face and a class (Zhou et al., ICCV 2023).

    The loss of a face is softplus(b − s·(cos θ − m)) + λ·Σ softplus(s·cos θ_j − b) over the other classes j.
    """

    kind: Literal["uniface"] = "uniface"
    """A sum over the classes, with a threshold that all faces share, instead of a softmax."""
    m: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Margin subtracted from the cosine (UniFace, 2023)."""
    balance: Annotated[float, Field(gt=0, le=10)] = 1.0
    """λ: weight of the negatives (UniFace, 2023)."""
    rate: NonNegative = 0.1
    """Learning rate of the threshold b, which begins at ln(10 · classes of a step). 0: b stays there."""
    momentum: Momentum = 0.9
    """Share of its last move that b repeats."""

    @property
    def sums(self) -> int:
        """Return 3: also the threshold's gradient is a sum over the classes."""
        return 3


class LDAMMargin(BaseMargin):
    """LDAM: the fewer images an identity has, the greater its margin (Cao et al., NeurIPS 2019).

    s·(cos(θ + m2·c) − m3·c), where c is in proportion to n^(−power) for an identity of n images.
    """

    kind: Literal["ldam"] = "ldam"
    """The margin follows the number of images of the identity, for long-tailed sets."""
    m2: Annotated[float, Field(ge=0, le=1.5)] = 0.0
    """Margin added to the angle, in radians."""
    m3: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Margin subtracted from the cosine (LDAM's public code)."""
    power: Annotated[float, Field(ge=0, le=1)] = 0.25
    """How fast the margin falls with the number of images (LDAM, 2019: 1/4). 0: the same for all."""
    stated: Literal["largest", "mean"] = "largest"
    """Which identity m2 and m3 are for: the one with the fewest images, as in LDAM's public code, or the mean one."""
    gradient: Literal["exact", "straight_through"] = "exact"
    """Gradient of the margin; see the fixed margin."""
    past_pi: Literal["fallback", "wrap"] = "fallback"
    """Where θ + m2·c > π; see the fixed margin."""


AnyMargin = Annotated[
    Margin
    | AdaFaceMargin
    | MagFaceMargin
    | ElasticArcMargin
    | ElasticCosMargin
    | CurricularMargin
    | UniFaceMargin
    | LDAMMargin,
    Field(discriminator="kind"),
]


class Unlabelled(Section):
    """Images without labels, which add only the distillation term (BigFace-Distill, MFR-ICCV2021)."""

    path: PathOrURL
    """Folder of flat shards; their labels are ignored."""
    batch: Annotated[int, Field(ge=1)] | None = None
    """Unlabelled images of a step, over all workers. None: as many as train.global_batch."""
    embeddings: PathOrURL | None = None
    """The teacher's embeddings of these shards; needed when method.distill.embeddings is given. None: the teacher net
    embeds the images."""


class TeacherSettings(Section):
    """Settings of the teacher net."""

    named: ClassVar[str]
    """Field in which a recipe names the teacher."""
    embeddings_named: ClassVar[str | None] = None
    """Field in which a recipe names the teacher's embeddings instead."""
    teacher: PathOrURL | None = None
    """Teacher: a run, a checkpoint, or a file of weights, also of other projects. It sees the same images as the
    student. None: no net is named."""
    teacher_net: str | None = None
    """What the teacher's file holds where it does not tell: a family such as adaface, or a net such as iresnet50."""

    @property
    def width_mend(self) -> str | None:
        """Return the mend for embeddings of unequal widths, or None if the widths may differ."""
        return None


class Distill(TeacherSettings):
    """Distillation from a teacher's embeddings (BigFace-Distill, MFR-ICCV2021; docs/methods/bigface.md).

    The command line names the teacher.
    """

    named: ClassVar[str] = "method.distill.teacher"
    embeddings_named: ClassVar[str | None] = "method.distill.embeddings"
    embeddings: PathOrURL | None = None
    """Teacher's embeddings instead of a teacher: folder of `bigface embed` on the training shards, of plain images.
    None: the teacher net embeds the images."""
    weight: Positive = 9.0
    """λ: weight of the distillation term beside the margin loss. BigFace-Distill (2021) uses 9."""
    form: Literal["euclidean", "angular"] = "euclidean"
    """Distance of unit embeddings. euclidean: ‖t − s‖² (BigFace-Distill, 2021). angular: (1 − cos)² (ShrinkTeaNet,
    Duong et al., 2019)."""
    adapter: bool = False
    """Learn a linear layer from the student's width to the teacher's. The shipped net does not have it."""
    unlabelled: Unlabelled | None = None
    """More images, without labels. None: labelled images only."""

    @property
    def width_mend(self) -> str | None:
        """Return the mend for embeddings of unequal widths, or None if an adapter joins them."""
        return None if self.adapter else "method.distill.adapter=true"

    @model_validator(mode="after")
    def _check_sources(self) -> "Distill":
        if self.teacher and self.embeddings:
            raise ValueError("give a teacher or its embeddings, not both")
        if self.unlabelled and bool(self.unlabelled.embeddings) != bool(self.embeddings):
            raise ValueError(
                "the teacher's embeddings of labelled and unlabelled images go together: give both "
                "method.distill.embeddings and method.distill.unlabelled.embeddings, or give a teacher"
            )
        return self


class BigFace(BaseMethod):
    """A backbone and a class matrix sharded over the ranks (BigFace, MFR-ICCV2021; docs/methods/bigface.md)."""

    kind: Literal["bigface"] = "bigface"
    share_knob: ClassVar[str | None] = "sample_rate"
    margin: AnyMargin = Margin()
    """Margin of the positive class; CosFace by default, as in BigFace (2021)."""
    subcentres: Annotated[int, Field(ge=1, le=16)] = 1
    """K: rows of a class, of which the one nearest to a face counts (sub-centre ArcFace, Deng et al., 2020). The paper
    uses 3 for noisy labels. 1: one row."""
    sample_rate: Ratio = 1.0
    """Share of the classes in each step's softmax; below 1 it is Partial FC (An et al., 2022). 1: all classes."""
    drop_negatives_above: Annotated[float, Field(gt=-1, le=1)] = 1.0
    """Inter-class filter for noisy labels (Partial FC, An et al., 2022): drop negatives of a greater cosine. 1: keep
    all."""
    clip_head: Positive | None = None
    """Largest norm of the class matrix's gradient. None: no clipping."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of products with the class matrix; their sums are float32. auto: as the backbone trains. float16 is for
    cards; a CPU takes float32 instead."""
    update: Literal["plain", "fused"] = "plain"
    """fused: update the class matrix tile by tile, without storing its gradient; needs less memory."""
    tile: Annotated[int, Field(ge=1)] | None = None
    """Classes computed at once. None: as many as fit the cache or the card."""
    skip_below: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """On a card, leave out the gradients of blocks of classes and faces whose probabilities are all smaller. 0: leave
    out none. docs/methods/bigface.md states the error."""
    distill: Distill | None = None
    """Distillation from a teacher. None: no teacher."""

    @property
    def facts(self) -> Facts:
        """Return what the method needs; a fused update rules out micro-batches and a loss scale."""
        if self.update == "plain":
            return Facts()
        moves = 'method.update = "fused" moves the class matrix once per batch'
        return Facts(whole_batch=moves, unscalable='method.update = "fused" cannot scale the loss')

    @property
    def saves_memory(self) -> dict[str, object]:
        """Return the fused update, unless it is set already."""
        return {"update": "fused"} if self.update == "plain" else {}

    @property
    def to_accumulate(self) -> dict[str, object]:
        """Return the plain update, unless it is set already."""
        return {"update": "plain"} if self.update == "fused" else {}

    @property
    def class_matrix(self) -> "BigFace":
        """Return this section: it describes the class matrix."""
        return self

    @property
    def taught(self) -> Distill | None:
        """Return the settings of the distillation, or None."""
        return self.distill

    @model_validator(mode="after")
    def _check_clip_head(self) -> "BigFace":
        if self.update == "fused" and self.clip_head is not None:
            raise ValueError('method.update = "fused" has no gradient to clip: leave method.clip_head out')
        return self


class SectionMargin(Section):
    """A section with its own default margin: fields that a recipe's margin leaves out keep the section's default."""

    @model_validator(mode="before")
    @classmethod
    def _complete_margin(cls, tree: object) -> object:
        """Fill the fields that the margin leaves out."""
        if isinstance(tree, dict) and isinstance(tree.get("margin"), dict):
            tree = tree | {"margin": cls.model_fields["margin"].default.model_dump() | tree["margin"]}
        return tree


class FixedCentres(SectionMargin, BaseMethod):
    """Base of the methods whose class centres carry no gradient."""

    layers: ClassVar[int] = 1
    """Layers of centres: how many centres a class can have."""
    margin: Margin
    """Margin of the positive class."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of products with the centres; their sums are float32. auto: as the backbone trains. float16 is for
    cards; a CPU takes float32 instead."""
    tile: Annotated[int, Field(ge=1)] | None = None
    """Centres computed at once. None: as many as fit the cache or the card."""


class EncodedCentres(FixedCentres):
    """Base of the methods whose momentum encoder makes the centres: θ_k ← γ_t·θ_k + (1 − γ_t)·θ_q at step t."""

    encoder_momentum: Momentum
    """γ: share of its old weights that the encoder keeps per step."""
    encoder_warmup: bool = True
    """Raise γ_t from 0.1: γ_t = min(γ, (1 + t)/(10 + t)). So the encoder never remembers more than the run so far.
    false: γ from the first step, as in the papers."""

    def momentum_at(self, step: int) -> float:
        """Return γ_t of step t, counted from 0."""
        return min(self.encoder_momentum, (1 + step) / (10 + step)) if self.encoder_warmup else self.encoder_momentum


class AttFC(EncodedCentres):
    """A momentum class encoder, attention over class images, a queue (AttFC, 2025; docs/methods/attfc.md)."""

    kind: Literal["attfc"] = "attfc"
    share_knob: ClassVar[str | None] = "size_ratio"
    margin: Margin = Margin(m2=0.5, m3=0)
    """Margin of the positive class; ArcFace by default, as in AttFC (2025)."""
    class_images: Annotated[int, Field(ge=1, le=16)] = 2
    """K: other images of the same person that come with each image (AttFC, 2025, table 3)."""
    strategy: Literal["attention", "constant", "single"] = "attention"
    """How class images make a centre: attention weights, equal weights, or one image (AttFC, 2025, table 4)."""
    temperature: Positive = 1.0
    """Divisor of the cosines in the attention's softmax. AttFC (2025) has none, which is 1."""
    size_ratio: Ratio = 0.3
    """r: slots of the queue, as a share of the identities. AttFC (2025) uses 0.1 to 0.3."""
    encoder_momentum: Momentum = 0.999
    """γ: share of its old weights that the class encoder keeps per step (AttFC, 2025)."""
    order: Literal["paper", "reference"] = "paper"
    """When a batch's centres enter the queue: before its loss (AttFC, 2025) or after it (AttFC's public code)."""

    @property
    def facts(self) -> Facts:
        """Return the class images and the momentum encoder that the method needs."""
        count = 1 if self.strategy == "single" else self.class_images
        first = 'method.order = "paper" puts the whole batch\'s centres in the queue first'
        whole = first if self.order == "paper" else None
        return Facts(class_images=count, encoded=count, encoder="kept", whole_batch=whole)

    @property
    def to_accumulate(self) -> dict[str, object]:
        """Return the reference's order, unless it is set already."""
        return {"order": "reference"} if self.order == "paper" else {}

    def centres(self, classes: int, global_batch: int) -> int:
        """Return the slots of the queue; see :func:`queue_slots`."""
        return queue_slots(self.size_ratio * classes, global_batch, "method.size_ratio", classes)


class DCQ(EncodedCentres):
    """Dynamic Class Queue: one class image, no attention (Li et al., 2021; docs/methods/baselines.md)."""

    kind: Literal["dcq"] = "dcq"
    margin: Margin = Margin(scale=50, m3=0.3)
    """Margin of the positive class; CosFace with scale 50 by default (DCQ, 2021)."""
    queue_size: Annotated[int, Field(ge=2)] = 8192
    """Slots of the queue of class centres (DCQ, 2021)."""
    encoder_momentum: Momentum = 0.999
    """γ: share of its old weights that the key encoder keeps per step (DCQ, 2021)."""

    @property
    def facts(self) -> Facts:
        """Return the class image and the key encoder, which is the run's result."""
        return Facts(class_images=1, encoded=1, encoder="shipped")

    def centres(self, classes: int, global_batch: int) -> int:
        """Return the slots of the queue; see :func:`queue_slots`."""
        return queue_slots(self.queue_size, global_batch, "method.queue_size")


class F2C(EncodedCentres):
    """Faster Face Classification: a pool of recent classes (Wang et al., 2022; docs/methods/baselines.md)."""

    kind: Literal["f2c"] = "f2c"
    layers: ClassVar[int] = 2
    margin: Margin = Margin(scale=32, m3=0.4)
    """Margin of the positive class; CosFace with scale 32 by default (F2C, 2022)."""
    pool_size: Annotated[int, Field(ge=2)] = 8192
    """Classes in the pool; a new class evicts the least recently used one (F2C, 2022)."""
    encoder_momentum: Momentum = 0.99
    """γ: share of its old weights that the gallery net keeps per step (F2C, 2022)."""

    @property
    def facts(self) -> Facts:
        """Return the images of the probe and the gallery side, which see 1.5 images for each image of the batch."""
        # Of 4 images, 2 have a partner, so that both sides see the pair. Each side sees 1 of the other 2: (3 + 3) / 4.
        sides = 1.5
        whole = "f2c writes its centres once per batch"
        return Facts(class_images=1, trained=sides, encoded=sides, batch_multiple=4, encoder="kept", whole_batch=whole)

    def centres(self, classes: int, global_batch: int) -> int:
        """Return the classes of the pool."""
        written = 3 * global_batch // 4
        if self.pool_size < written:
            raise UserError(
                f"method.pool_size = {self.pool_size} cannot hold the {written} faces that a batch of {global_batch} "
                "writes: raise method.pool_size"
            )
        return self.pool_size


class VirtualFC(FixedCentres):
    """Virtual fully-connected layer: identities share anchors (Li et al., 2021; docs/methods/baselines.md)."""

    kind: Literal["virtual_fc"] = "virtual_fc"
    margin: Margin = Margin(scale=32, m2=0.5, m3=0)
    """Margin of the positive class; ArcFace with scale 32 by default (Virtual FC, 2021)."""
    anchors: Annotated[int, Field(ge=2)] = 8192
    """M: anchors that stand for all identities; an identity of the batch takes an anchor over (Virtual FC, 2021)."""
    class_images: Annotated[int, Field(ge=1, le=16)] = 1
    """K: other images of the same person that come with each image; the backbone trains on them too."""

    @property
    def facts(self) -> Facts:
        """Return the class images that the method needs."""
        whole = "virtual_fc writes its centres once per batch"
        return Facts(class_images=self.class_images, trained=self.class_images + 1, whole_batch=whole)

    def centres(self, classes: int, global_batch: int) -> int:
        """Return the number of anchors."""
        if self.anchors < global_batch:
            raise UserError(
                f"method.anchors = {self.anchors} is less than a batch of {global_batch}: raise method.anchors"
            )
        return self.anchors


class PairLoss(Section):
    """Base of the losses that compare pairs with thresholds (``fr_core/losses/ekd.py``)."""

    hardest: Annotated[int, Field(ge=1)] = 2000
    """Negative pairs of a batch that count: those with the student's highest cosines (EKD, Huang et al., 2022)."""
    pool: Annotated[int, Field(ge=1)] = 2**16
    """Newest negative pairs from which the thresholds are read."""
    threshold_momentum: Momentum = 0.99
    """Share of its old value that the thresholds' moving average keeps per step (EKD, 2022). 0: the pool's thresholds,
    without an average."""


class EKD(PairLoss):
    """Evaluation-oriented distillation: pairs pass the same thresholds as for the teacher (Huang et al., 2022)."""

    kind: Literal["ekd"] = "ekd"
    lambda_pos: NonNegative = 0.02
    """λ1: weight of the pairs of one identity (EKD, 2022)."""
    lambda_neg: NonNegative = 0.01
    """λ2: weight of the hardest pairs of two identities (EKD, 2022)."""
    temperature: Positive = 0.01
    """Width of a threshold's soft edge, in cosine (EKD, 2022)."""


class RelativeSimilarity(PairLoss):
    """EKD's general form: pairs lie as far from the thresholds as for the teacher (Ef-QuantFace, 2024, eq. 1)."""

    kind: Literal["relative_similarity"] = "relative_similarity"
    lambda_pos: NonNegative = 1.0
    """λ1: weight of the pairs of one identity; the loss is a squared difference of cosines."""
    lambda_neg: NonNegative = 1.0
    """λ2: weight of the hardest pairs of two identities; the loss is a squared difference of cosines."""


class EmbeddingMSE(Section):
    """Squared distance of normalised embeddings, averaged over images (QuantFace, Boutros et al., 2022).

    The squares are summed over dimensions. With their mean, the gradient would vanish beside EKD's at the same
    learning rate. Student and teacher need embeddings of one width.
    """

    kind: Literal["mse"] = "mse"


AgreementLoss = Annotated[EKD | RelativeSimilarity | EmbeddingMSE, Field(discriminator="kind")]


class CrossEntropy(SectionMargin):
    """A class matrix and its margin softmax beside the teacher: an ablation of Ef-QuantFace (2024)."""

    weight: Positive = 1.0
    """Weight of the margin softmax beside the agreement with the teacher."""
    margin: Margin = Margin(m2=0.4, m3=0)
    """Margin of the positive class; ArcFace with m2 = 0.4 by default (Ef-QuantFace, 2024)."""


class QuantFace(TeacherSettings, BaseMethod):
    """A student agrees with a teacher on the pairs of a batch (Ef-QuantFace, 2024; docs/methods/quantface.md).

    There is no classifier. The student is a quantised or pruned copy of the teacher, which starts from
    ``init.backbone``; any other net may follow any teacher too.
    """

    kind: Literal["quantface"] = "quantface"
    named: ClassVar[str] = "method.teacher"
    loss: AgreementLoss = EKD()
    """Loss that compares student and teacher."""
    labels: bool = True
    """Use identities as labels. false: only two views of one image make a positive pair (needs data.views = 2)."""
    cross_entropy: CrossEntropy | None = None
    """A margin softmax beside the teacher; works best with init.head = "prototypes". None: no classifier."""

    @property
    def facts(self) -> Facts:
        """Return what the method needs; it compares the pairs of the whole batch."""
        whole = "quantface compares the pairs of the whole batch"
        views = "method.labels = false has no positive pairs but two views of an image"
        only = views if isinstance(self.loss, PairLoss) and not self.labels else None
        return Facts(whole_batch=whole, only_views=only, calibrates=True)

    @property
    def class_matrix(self) -> BigFace | None:
        """Return the settings of the class matrix that cross-entropy trains, or None."""
        return BigFace(margin=self.cross_entropy.margin) if self.cross_entropy else None

    @property
    def taught(self) -> TeacherSettings:
        """Return this section: it names the teacher."""
        return self

    @property
    def agreement(self) -> AgreementLoss:
        """Return the loss that compares student and teacher."""
        return self.loss

    @property
    def width_mend(self) -> str | None:
        """Return the mend for embeddings of unequal widths, or None: pair losses compare cosines."""
        return "method.loss.kind=ekd, which compares cosines" if isinstance(self.loss, EmbeddingMSE) else None

    @model_validator(mode="after")
    def _check_labels(self) -> "QuantFace":
        if self.cross_entropy and not self.labels:
            raise ValueError(
                "method.cross_entropy needs labels: set method.labels = true, or leave method.cross_entropy out"
            )
        return self


Method = Annotated[BigFace | AttFC | DCQ | F2C | VirtualFC | QuantFace, Field(discriminator="kind")]


def queue_slots(wanted: float, global_batch: int, knob: str, most: int | None = None) -> int:
    """Return S = ⌊wanted/G⌋·G, the slots of a queue that whole batches enter and leave (AttFC, 2025).

    Args:
        wanted: slots asked for; AttFC asks for r·N of N identities.
        global_batch: G.
        knob: field that sets the slots, for the error.
        most: slots at the field's largest value. None: any number.

    Raises:
        UserError: the queue cannot hold one batch.
    """
    slots = int(wanted / global_batch + 1e-9) * global_batch
    if slots == 0 and most is not None and most < global_batch:
        raise UserError(
            f"a queue of {wanted:g} class centres cannot hold a batch of {global_batch}, and {knob} = 1 gives only "
            f"{most}: lower train.global_batch to at most {int(wanted) or most}"
        )
    if slots == 0:
        raise UserError(
            f"a queue of {wanted:g} class centres cannot hold a batch of {global_batch}: raise {knob} or lower "
            "train.global_batch"
        )
    return slots
