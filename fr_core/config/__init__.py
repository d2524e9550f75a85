"""Every knob of a run: typed, frozen, strict. No torch here.

A recipe is a TOML file of these sections; ``key.path=value`` on the command line overrides single fields.
Choices are tagged unions on ``kind``, so that a knob which does not apply cannot be written.
Recipes state the *global* batch; the number of workers is set at launch and never stands here.

The rules below refuse sections that do not fit together. ``fr_core/train/check.py`` checks a config against the data
and the workers. Functions at the end of this file compute the numbers that follow from a config.
"""

import math
from collections.abc import Callable, Iterator
from typing import Annotated

from pydantic import Field, model_validator

from fr_core.config.methods import BigFace, Distill, Method
from fr_core.config.nets import IResNetNet, Net
from fr_core.config.optim import SGD, ClassMatrix, Cosine, Optim, Schedule, steps_of_epochs
from fr_core.config.sections import Balanced, Data, FineTune, Init, Section, Tracking, Train, Verify

MAX_LANES = 64
GROUPED_LANES, IMAGES_PER_LANE = (
    16,
    24,
)  # with class images: lanes of a small batch, and images of each lane of a large one
MOST_SPREAD = 2**19  # images: with chunks of 6 some 17 GB of crops of 112×112 in main memory


class Config(Section):
    """The whole config of a run."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of all random numbers: weights, order of samples, augmentation."""
    data: Data = Data()
    """Dataset, order of samples, augmentation."""
    net: Net = IResNetNet()
    """Backbone."""
    method: Method = BigFace()
    """Training method."""
    optim: Optim = SGD()
    """Optimiser."""
    schedule: Schedule = Cosine()
    """Learning-rate schedule."""
    init: Init = Init()
    """Weights that the run starts from."""
    finetune: FineTune = FineTune()
    """Which weights are trained, when, and how fast."""
    train: Train = Train()
    """Length, batch, precision, memory, checkpoints."""
    verify: Verify = Verify()
    """Pairs on which the net is verified."""
    tracking: Tracking = Tracking()
    """MLflow."""

    @model_validator(mode="after")
    def _check_rules(self) -> "Config":
        for rule in RULES:
            for mistake in rule(self):
                raise ValueError(mistake)
        return self


# Rules: each yields mistakes, each with its mend


def batch_rules(config: Config) -> Iterator[str]:
    """Yield what does not divide the global batch."""
    batch, accumulate, data = config.train.global_batch, config.train.accumulate, config.data
    if batch % accumulate:
        yield f"train.accumulate = {accumulate} does not divide train.global_batch = {batch}"
    if batch % data.views:
        yield f"data.views = 2 shows each image twice: train.global_batch = {batch} must be even"
    rows = step_rows(config)
    if data.lanes and rows % data.lanes:
        halved = "" if rows == batch else f", which takes {rows} images"
        yield f"data.lanes = {data.lanes} does not divide train.global_batch = {batch}{halved}"
    if unlabelled_batch(config) % accumulate:
        yield (
            f"train.accumulate = {accumulate} does not divide "
            f"method.distill.unlabelled.batch = {unlabelled_batch(config)}"
        )
    facts, kind = config.method.facts, config.method.kind
    if accumulate > 1 and facts.whole_batch:
        other = "".join(f", or method.{name} = {value}" for name, value in config.method.to_accumulate.items())
        yield f"{facts.whole_batch}: train.accumulate = 1{other}"
    if batch % facts.batch_multiple:
        yield f"train.global_batch = {batch} must be a multiple of {facts.batch_multiple} for {kind}"


def balance_rules(config: Config) -> Iterator[str]:
    """Yield what keeps groups of one person's images out of the batches."""
    balanced, batch, wanted, data = balance(config), config.train.global_batch, group_count(config), config.data
    if data.sampling < 1 and balanced:
        yield "data.sampling repeats images, and data.balanced shows each once: leave one of both out"
    if config.method.facts.class_images and (balanced or data.views > 1 or data.sampling < 1):
        name = "data.balanced" if balanced else "data.views = 2" if data.views > 1 else "data.sampling"
        yield f"{name} is for flat shards, and {config.method.kind} reads grouped ones: leave it out"
    if balanced is None:
        return
    if data.views > 1:
        yield "data.balanced and data.views = 2 both make positive pairs: data.balanced.share = 0, or data.views = 1"
    if data.variants > 1:
        yield "data.variants makes several people of one, whose images data.balanced groups: leave one of both out"
    if abs(wanted * balanced.images - batch * balanced.share) > 1e-6 * batch or wanted == 0:
        yield (
            f"data.balanced: {balanced.share:g} of train.global_batch = {batch} is not a whole number of groups of "
            f"{balanced.images} images: set share to a multiple of {balanced.images / batch:.6g}"
        )
    if data.lanes and wanted % data.lanes:
        yield (
            f"data.lanes = {data.lanes} does not divide the {wanted} groups that data.balanced puts in a "
            f"batch: leave data.lanes out, or use {math.gcd(wanted, data.lanes)}"
        )


def net_rules(config: Config) -> Iterator[str]:
    """Yield what the net does not support."""
    net, train = config.net, config.train
    if small := config.data.progressive:
        least = net.input_size - (net.input_size - 1) % net.stride
        if least == net.input_size:
            yield f"data.progressive is for nets that take smaller images: leave it out with net.kind = {net.kind}"
        elif not least <= small.size < net.input_size:
            yield (
                f"data.progressive.size = {small.size}: this net's feature map allows {least} to {net.input_size - 1}"
            )
    if train.recompute_blocks and not train.recompute:
        yield "train.recompute_blocks needs train.recompute = true"
    if train.recompute and not net.residual:
        yield f"train.recompute is for residual nets: leave it out with net.kind = {net.kind}"
    if train.ghost_batch and not net.normed:
        yield "train.ghost_batch is for batch norm, which a quantised net has not: leave train.ghost_batch out"


def precision_rules(config: Config) -> Iterator[str]:
    """Yield where float16 cannot be used."""
    if config.train.compress_gradients == "float16" and config.train.precision != "float16":
        yield (
            'train.compress_gradients = "float16" needs the loss scale of train.precision = "float16", or small '
            'gradients vanish: use "bfloat16"'
        )
    if config.train.precision == "float16" and config.method.facts.unscalable:
        yield f'{config.method.facts.unscalable}: train.precision = "bfloat16"'


def verify_rules(config: Config) -> Iterator[str]:
    """Yield which part of a verification is missing."""
    verify = config.verify
    if verify.pairs and not verify.images and not verify.pairs.endswith(".bin"):
        yield "verify.pairs needs verify.images, the folder that its paths are relative to"
    if config.train.verify_every and not verify.pairs:
        yield "train.verify_every needs verify.pairs: give verify.pairs, or leave train.verify_every out"
    if verify.images and not verify.pairs:
        yield "verify.images needs verify.pairs, which names the images to compare"


def method_rules(config: Config) -> Iterator[str]:
    """Yield what the method does not support."""
    method, facts = config.method, config.method.facts
    if facts.encoder == "shipped" and config.train.ema:
        yield f"{method.kind} ships its key encoder: leave train.ema out"
    if facts.only_views and config.data.views == 1:
        yield f"{facts.only_views}: set data.views = 2"
    distill = distillation(config)
    if distill and distill.embeddings and config.data.variants > 1:
        yield (
            "method.distill.embeddings show plain faces, and data.variants changes the faces: "
            "give method.distill.teacher instead"
        )
    if method.class_matrix is None and config.optim.head != ClassMatrix():
        yield f"optim.head optimises a class matrix, and {method.kind} has none: leave optim.head out"


def start_rules(config: Config) -> Iterator[str]:
    """Yield what the start of the run does not support: its weights, or a run of 0 epochs."""
    method = config.method
    if config.init.head != "random" and not config.init.backbone:
        yield f'init.head = "{config.init.head}" needs init.backbone'
    if config.init.net and not config.init.backbone:
        yield f"init.net = {config.init.net} says what init.backbone holds, which is not set: give init.backbone=FILE"
    if config.init.head != "random" and method.class_matrix is None:
        yield f'init.head = "{config.init.head}" is for a class matrix; {method.kind} has none'
    if config.train.epochs > 0:
        return
    if not method.facts.calibrates:
        yield f"train.epochs = 0 trains nothing: {method.kind} takes 1 or more"
    for name, asked in (
        ("data.masks", config.data.masks.ratio > 0),
        (f'schedule.kind = "{config.schedule.kind}"', config.schedule.watches_loss),
    ):
        if asked:
            yield f"train.epochs = 0 only calibrates, on plain images: leave {name} out"


def finetune_rules(config: Config) -> Iterator[str]:
    """Yield what cannot be fine-tuned as asked."""
    finetune, method = config.finetune, config.method
    if finetune != FineTune() and not config.init.backbone:
        yield "finetune says how trained weights move: give init.backbone=FILE, or leave finetune out"
    if finetune.head_epochs and method.class_matrix is None:
        yield f"finetune.head_epochs trains a class matrix alone, and {method.kind} has none: leave it out"
    if finetune.layer_decay < 1 and config.net.kind == "moe":
        yield "finetune.layer_decay is for blocks in a row, and experts lie side by side: leave it out"


RULES: tuple[Callable[[Config], Iterator[str]], ...] = (
    *(batch_rules, balance_rules, net_rules, precision_rules, verify_rules, method_rules, start_rules),
    finetune_rules,
)


# Numbers that follow from a config


def balance(config: Config) -> Balanced | None:
    """Return ``data.balanced``, or None if its share is 0."""
    balanced = config.data.balanced
    return balanced if balanced and balanced.share else None


def lane_count(config: Config) -> int:
    """Return the lanes that the data is dealt to (``fr_core/data/plan.py``).

    The default is the largest divisor of :func:`lane_multiple` up to 64. With class images the limit is one lane for 24
    images of the batch, but at least 16 and at most 64. There lanes cost memory: a reader holds whole row groups at the
    ends of each lane's strands.
    """
    multiple, most = lane_multiple(config), MAX_LANES
    if config.method.facts.class_images:
        most = min(MAX_LANES, max(GROUPED_LANES, config.train.global_batch // IMAGES_PER_LANE))
    return config.data.lanes or max(n for n in range(1, min(most, multiple) + 1) if multiple % n == 0)


def lane_multiple(config: Config) -> int:
    """Return the number that the lanes divide: every lane gives a step equally many rows, and equally many groups."""
    return math.gcd(step_rows(config), group_count(config))


def spread(config: Config, identities: int) -> int:
    """Return the samples that lie between two images of a chunk (``fr_core/data/plan.py``); 0: flat shards.

    Raises:
        UserError: the method's centres are fewer than a batch needs.
    """
    if not config.method.facts.class_images:
        return 0
    if config.data.spread:
        return config.data.spread
    return min(MOST_SPREAD, config.method.centres(class_count(config, identities), config.train.global_batch))


def step_rows(config: Config) -> int:
    """Return the rows of the dataset that a step takes, over all ranks."""
    return config.train.global_batch // config.data.views


def step_images(config: Config) -> tuple[int, int]:
    """Return the images of a micro-batch, over all ranks: those trained on, and those a momentum encoder sees."""
    accumulate, facts = config.train.accumulate, config.method.facts
    images = config.train.global_batch // accumulate
    return int(images * facts.trained) + unlabelled_batch(config) // accumulate, int(images * facts.encoded)


def group_count(config: Config) -> int:
    """Return the groups of one person's images in a global batch; 0 without ``data.balanced``."""
    balanced = config.data.balanced
    return round(config.train.global_batch * balanced.share / balanced.images) if balanced else 0


def image_side(config: Config, epoch: int) -> int:
    """Return the side, in pixels, of the images that an epoch trains on."""
    small = config.data.progressive
    return small.size if small and epoch < small.share * config.train.epochs else config.net.input_size


def class_count(config: Config, identities: int) -> int:
    """Return the classes of a run: the dataset's identities times ``data.variants``."""
    return identities * config.data.variants


def class_rows(config: Config) -> int:
    """Return the rows of each class in the class matrix, which neighbour each other; 0 without a class matrix."""
    matrix = config.method.class_matrix
    return matrix.subcentres if matrix else 0


def distillation(config: Config) -> Distill | None:
    """Return the settings of a distillation beside a class matrix, or None."""
    taught = config.method.taught
    return taught if isinstance(taught, Distill) else None


def unlabelled_batch(config: Config) -> int:
    """Return the unlabelled images that come with each global batch."""
    distill = distillation(config)
    if distill is None or distill.unlabelled is None:
        return 0
    return distill.unlabelled.batch or config.train.global_batch


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Return the optimiser steps of the whole run."""
    steps = config.train.epochs * steps_per_epoch
    return min(steps, config.train.max_steps or steps)


def rate_scale(config: Config) -> float:
    """Return what the global batch multiplies learning rates by (Goyal et al., 2017); 1 without a reference batch."""
    return config.train.global_batch / (config.optim.reference_batch or config.train.global_batch)


def warmup_steps(config: Config, steps_per_epoch: int) -> int:
    """Return the optimiser steps of the warm-up."""
    return steps_of_epochs(config.schedule.warmup_epochs, steps_per_epoch)


def head_steps(config: Config, steps_per_epoch: int) -> int:
    """Return the optimiser steps at the start that train the class matrix alone."""
    return steps_of_epochs(config.finetune.head_epochs, steps_per_epoch)


def unwatched_steps(config: Config, steps_per_epoch: int) -> int:
    """Return the optimiser steps at the start whose losses FastFace does not see: the warm-up, and the head alone."""
    return max(warmup_steps(config, steps_per_epoch), head_steps(config, steps_per_epoch))
