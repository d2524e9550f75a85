"""Sections of the method, ``method.kind``, and the facts that the rest of the house asks of a method.

Plans, checks and counts ask the section (:class:`Facts`); ``fr_core/train/methods/`` alone asks which method runs.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from fr_core.config.sections import Momentum, NonNegative, Positive, Ratio, Section
from fr_core.errors import UserError

Layout = Literal["flat", "grouped"]


@dataclass(frozen=True)
class Facts:
    """What a method needs and does. Counts are per image of the batch."""

    class_images: int = 0  # K: other images of the same person that accompany each image
    trained: float = 1.0  # images that the backbone trains on
    encoded: float = 0.0  # images that a momentum encoder sees without a gradient
    batch_multiple: int = 1  # the images that a worker takes in a step are a multiple of this
    whole_batch: str | None = None  # why a step cannot be cut into micro-batches; None: it can
    unscalable: str | None = None  # why a loss scale cannot be taken out before weights move; None: it can
    encoder: Literal["none", "kept", "shipped"] = "none"  # a momentum encoder; "shipped": it is the result of the run
    only_views: str | None = None  # why two views of an image are its only positive pairs; None: labels make others
    calibrates: bool = False  # a run of no epoch has a use: the net as it starts

    @property
    def layout(self) -> Layout:
        """Of the shards: class images need those of a person together."""
        return "grouped" if self.class_images else "flat"


class BaseMethod(Section):
    """What every method's section answers. A method overrides what differs from a plain one."""

    kind: str
    share_knob: ClassVar[str | None] = None  # the field that says which share of the classes takes part in a step

    @property
    def facts(self) -> Facts:
        return Facts()

    @property
    def saves_memory(self) -> dict[str, object]:
        """Fields with which the same training needs less memory."""
        return {}

    @property
    def to_accumulate(self) -> dict[str, object]:
        """Fields with which a step can be cut into micro-batches, where as it is it cannot."""
        return {}

    @property
    def class_matrix(self) -> "BigFace | None":
        """The settings of the class matrix that the run trains, if it trains one."""
        return None

    @property
    def taught(self) -> "Taught | None":
        """Who teaches the run, if anybody does."""
        return None

    @property
    def agreement(self) -> "AgreementLoss | None":
        """The loss that compares the student's pairs with the teacher's, if the method has one."""
        return None

    def centres(self, classes: int, global_batch: int) -> int:
        """How many class centres without a gradient stand for the classes; 0 where none do.

        Raises:
            UserError: fewer than a batch needs.
        """
        return 0


class Margin(Section):
    """s·(cos(m1·θ + m2) − m3) for the positive class (METHODS §1). ArcFace: m2 = .5, m3 = 0. CosFace: m2 = 0, m3 = .4.

    What is not given keeps its default, so name both: m2 alone makes the combination.
    """

    kind: Literal["fixed"] = "fixed"
    scale: Positive = 64.0
    m1: Annotated[float, Field(ge=1, le=4)] = 1.0
    m2: Annotated[float, Field(ge=0, le=1.5)] = 0.0
    m3: Annotated[float, Field(ge=0, le=1)] = 0.4
    gradient: Literal["exact", "straight_through"] = "exact"
    past_pi: Literal["fallback", "wrap"] = "fallback"  # where m1·θ + m2 > π


AnyMargin = Margin  # of a class matrix; a tagged union on ``kind`` once there are more


class Unlabelled(Section):
    """Images without labels, which add the distillation term alone."""

    path: str  # folder of flat shards; their labels are not looked at
    batch: Annotated[int, Field(ge=1)] | None = None  # global images a step; None: as many as train.global_batch
    embeddings: str | None = None  # of these shards, where the teacher's are given as embeddings too


class Taught(Section):
    """Who teaches."""

    named: ClassVar[str]  # where a recipe names the teacher
    embeddings_named: ClassVar[str | None] = None  # where it names the teacher's embeddings instead, if it can
    teacher: str | None = None  # run, checkpoint, safetensors or ONNX file; sees the images that the student sees
    teacher_net: str | None = None  # what bare weights are, such as mobilefacenet or iresnet50

    @property
    def width_mend(self) -> str | None:
        """The mend where student and teacher must have embeddings of one width and have not; None: they need not."""
        return None


class Distill(Taught):
    """Distillation from a teacher's embeddings (METHODS §5). The teacher is named on the command line."""

    named: ClassVar[str] = "method.distill.teacher"
    embeddings_named: ClassVar[str | None] = "method.distill.embeddings"
    embeddings: str | None = None  # instead: folder of `bigface embed` on the training shards, of the plain images
    weight: Positive = 9.0  # λ
    form: Literal["euclidean", "angular"] = "euclidean"  # ‖t − s‖² of unit vectors, or ShrinkTeaNet's (1 − cos)²
    adapter: bool = False  # a linear layer from the student's width to the teacher's; not shipped
    unlabelled: Unlabelled | None = None

    @property
    def width_mend(self) -> str | None:
        return None if self.adapter else "method.distill.adapter=true"

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


class BigFace(BaseMethod):
    """Backbone and a class matrix sharded over the ranks (METHODS §2, §5)."""

    kind: Literal["bigface"] = "bigface"
    share_knob: ClassVar[str | None] = "sample_rate"
    margin: AnyMargin = Margin()
    sample_rate: Ratio = 1.0  # below 1: Partial FC
    drop_negatives_above: Annotated[float, Field(gt=-1, le=1)] = 1.0  # cosine; 1 keeps all (inter-class filter)
    clip_head: Positive | None = None  # largest norm of the class matrix's gradient
    precision: Literal["float32", "bfloat16"] = "float32"  # of the class matrix's products; their sums are float32
    update: Literal["plain", "fused"] = "plain"  # fused: the class matrix moves tile by tile and has no gradient
    tile: Annotated[int, Field(ge=1)] | None = None  # classes computed at once; None: what fits cache or card
    distill: Distill | None = None

    @property
    def facts(self) -> Facts:
        if self.update == "plain":
            return Facts()
        moves = 'method.update = "fused" moves the class matrix once per batch'
        return Facts(whole_batch=moves, unscalable='method.update = "fused" cannot scale the loss')

    @property
    def saves_memory(self) -> dict[str, object]:
        return {"update": "fused"} if self.update == "plain" else {}

    @property
    def to_accumulate(self) -> dict[str, object]:
        return {"update": "plain"} if self.update == "fused" else {}

    @property
    def class_matrix(self) -> "BigFace":
        return self

    @property
    def taught(self) -> Distill | None:
        return self.distill

    @model_validator(mode="after")
    def _fused_has_no_gradient(self) -> "BigFace":
        if self.update == "fused" and self.clip_head is not None:
            raise ValueError('method.update = "fused" has no gradient to clip: leave method.clip_head out')
        return self


class MarginOfItsOwn(Section):
    """A section whose margin is not that of ``Margin``: parts of it that are not given are the section's."""

    @model_validator(mode="before")
    @classmethod
    def _parts_not_given(cls, tree: object) -> object:
        if isinstance(tree, dict) and isinstance(tree.get("margin"), dict):
            tree = tree | {"margin": cls.model_fields["margin"].default.model_dump() | tree["margin"]}
        return tree


class FixedCentres(MarginOfItsOwn, BaseMethod):
    """What the methods have in common whose class centres carry no gradient."""

    layers: ClassVar[int] = 1  # of centres
    margin: Margin
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of the centres; auto: as the backbone trains
    tile: Annotated[int, Field(ge=1)] | None = None  # centres computed at once; None: what fits cache or card


class AttFC(FixedCentres):
    """A momentum class encoder, attention over class images, a queue of class centres (METHODS §3)."""

    kind: Literal["attfc"] = "attfc"
    share_knob: ClassVar[str | None] = "size_ratio"
    margin: Margin = Margin(m2=0.5, m3=0)
    class_images: Annotated[int, Field(ge=1, le=16)] = 2  # K: other images of the same person, beside each image
    strategy: Literal["attention", "constant", "single"] = "attention"  # how class images make a centre
    temperature: Positive = 1.0  # of the attention
    size_ratio: Ratio = 0.3  # slots of the queue by identities
    encoder_momentum: Momentum = 0.999
    order: Literal["paper", "reference"] = "paper"  # a batch's centres enter the queue before or after its loss

    @property
    def facts(self) -> Facts:
        count = 1 if self.strategy == "single" else self.class_images
        first = 'method.order = "paper" puts the whole batch\'s centres in the queue first'
        whole = first if self.order == "paper" else None
        return Facts(class_images=count, encoded=count, encoder="kept", whole_batch=whole)

    @property
    def to_accumulate(self) -> dict[str, object]:
        return {"order": "reference"} if self.order == "paper" else {}

    def centres(self, classes: int, global_batch: int) -> int:
        return queue_slots(self.size_ratio * classes, global_batch, "method.size_ratio")


class DCQ(FixedCentres):
    """Dynamic Class Queue: AttFC's forerunner with one class image and no attention (METHODS §3)."""

    kind: Literal["dcq"] = "dcq"
    margin: Margin = Margin(scale=50, m3=0.3)
    queue_size: Annotated[int, Field(ge=2)] = 8192
    encoder_momentum: Momentum = 0.999

    @property
    def facts(self) -> Facts:
        return Facts(class_images=1, encoded=1, encoder="shipped")

    def centres(self, classes: int, global_batch: int) -> int:
        return queue_slots(self.queue_size, global_batch, "method.queue_size")


class F2C(FixedCentres):
    """Faster Face Classification: a pool of classes, least recently used out first (METHODS §3)."""

    kind: Literal["f2c"] = "f2c"
    layers: ClassVar[int] = 2
    margin: Margin = Margin(scale=32, m3=0.4)
    pool_size: Annotated[int, Field(ge=2)] = 8192  # classes
    encoder_momentum: Momentum = 0.99

    @property
    def facts(self) -> Facts:
        sides = 1.5  # of four images two are pairs, which both sides have, and each side has one more
        whole = "f2c writes its centres once per batch"
        return Facts(class_images=1, trained=sides, encoded=sides, batch_multiple=4, encoder="kept", whole_batch=whole)

    def centres(self, classes: int, global_batch: int) -> int:
        written = 3 * global_batch // 4
        if self.pool_size < written:
            raise UserError(
                f"method.pool_size = {self.pool_size} cannot hold the {written} faces that a batch of {global_batch} "
                "writes: raise it"
            )
        return self.pool_size


class VirtualFC(FixedCentres):
    """Virtual fully-connected layer: identities share anchors, which a batch takes over (METHODS §3)."""

    kind: Literal["virtual_fc"] = "virtual_fc"
    margin: Margin = Margin(scale=32, m2=0.5, m3=0)
    anchors: Annotated[int, Field(ge=2)] = 8192
    class_images: Annotated[int, Field(ge=1, le=16)] = 1  # K: other images of the same person, trained on too

    @property
    def facts(self) -> Facts:
        whole = "virtual_fc writes its centres once per batch"
        return Facts(class_images=self.class_images, trained=self.class_images + 1, whole_batch=whole)

    def centres(self, classes: int, global_batch: int) -> int:
        if self.anchors < global_batch:
            raise UserError(f"method.anchors = {self.anchors} is less than a batch of {global_batch}: raise it")
        return self.anchors


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


class QuantFace(Taught, BaseMethod):
    """A net follows a teacher, by the pairs of a batch and without a classifier (METHODS §6).

    Made for a quantised or pruned copy of the teacher, which ``init.backbone`` starts; any net may follow any other.
    """

    kind: Literal["quantface"] = "quantface"
    named: ClassVar[str] = "method.teacher"
    loss: AgreementLoss = EKD()  # a section, or its kind alone: loss = "mse"
    labels: bool = True  # False: every image is an identity of its own, which its views alone share
    cross_entropy: CrossEntropy | None = None  # best with init.head = "prototypes"

    @property
    def facts(self) -> Facts:
        whole = "quantface compares the pairs of the whole batch"
        views = "method.labels = false has no positive pairs but two views of an image"
        only = views if isinstance(self.loss, PairLoss) and not self.labels else None
        return Facts(whole_batch=whole, only_views=only, calibrates=True)

    @property
    def class_matrix(self) -> BigFace | None:
        return BigFace(margin=self.cross_entropy.margin) if self.cross_entropy else None

    @property
    def taught(self) -> Taught:
        return self

    @property
    def agreement(self) -> AgreementLoss:
        return self.loss

    @property
    def width_mend(self) -> str | None:
        return "method.loss.kind=ekd, which compares cosines" if isinstance(self.loss, EmbeddingMSE) else None

    @model_validator(mode="before")
    @classmethod
    def _a_word_is_the_kind(cls, tree: object) -> object:
        if isinstance(tree, dict) and isinstance(tree.get("loss"), str):
            tree = tree | {"loss": {"kind": tree["loss"]}}
        return tree

    @model_validator(mode="after")
    def _classes_are_labels(self) -> "QuantFace":
        if self.cross_entropy and not self.labels:
            raise ValueError("method.cross_entropy needs labels: method.labels = true, or leave it out")
        return self


Method = Annotated[BigFace | AttFC | DCQ | F2C | VirtualFC | QuantFace, Field(discriminator="kind")]


def queue_slots(wanted: float, global_batch: int, knob: str) -> int:
    """S = ⌊wanted/G⌋·G slots of a queue that whole batches enter and leave; AttFC wants r·N of them.

    Args:
        knob: the field that says how many.

    Raises:
        UserError: fewer than one batch.
    """
    slots = int(wanted / global_batch + 1e-9) * global_batch
    if slots == 0:
        raise UserError(
            f"a queue of {wanted:g} class centres cannot hold a batch of {global_batch}: raise {knob}, or lower "
            "train.global_batch"
        )
    return slots
