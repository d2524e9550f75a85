"""The time of a training step, predicted part by part from counted work and a card's figures (docs/cards.md)."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from fr_core.config import Config, step_images, step_rows, unlabelled_batch
from fr_core.config.methods import FixedCentres, TeacherSettings
from fr_core.errors import UserError
from fr_core.nets.open import open_net
from fr_core.ranks import Ranks
from fr_core.train.initial import segment_blocks
from fr_core.train.traffic import (
    BUCKET,
    Exchange,
    buckets,
    checkpoint_bytes,
    exchanges,
    gradient_bytes,
)
from fr_core.train.work import Work, backbone_work, head_work, pair_work, repeated, teacher_work, update_work
from pipelines.experiments.cards import GB, Card, Rates, rates_of

GPU = torch.device("cuda")
COPIED, WRITTEN = 5 * GB, 0.5 * GB  # bytes a second of a checkpoint, to main memory and to the disk; assumed
# Seconds of one core for an image of 112×112, the slowest that docs/results/speed.md has.
DECODED, AUGMENTED, MASKED = 1 / 2800, 1 / 8400, 1 / 1900


class Part(NamedTuple):
    """A part of a step on one rank.

    Args:
        seconds: by which the part lengthens the step.
        hidden: seconds that pass beside another part.
        flops: multiplications and additions.
        bytes: bytes read and written in memory.
        operators: operators, each at least one launch.
        sent: bytes that the rank sends to other ranks.
    """

    seconds: float
    hidden: float = 0.0
    flops: int = 0
    bytes: int = 0
    operators: int = 0
    sent: float = 0.0


Parts = dict[str, Part]


def step_parts(
    config: Config,
    identities: int,
    ranks: Ranks,
    precisions: tuple[str, str],
    rates: Rates,
    device: torch.device = GPU,
    side: int | None = None,
) -> Parts:
    """Predict the parts of a step in which nothing is logged, verified or saved.

    Args:
        identities: identities of the training set.
        ranks: rank 0 among all ranks.
        precisions: of the backbone, and of the head's products.
        rates: speeds of one rank.
        device: a card, where the head's kernels are fused, or a CPU.
        side: side of the images; None: that of the net.

    Returns:
        The parts by name, without those that take no time.
    """
    precision, head_precision = precisions
    micro, side = config.train.accumulate, side or config.net.input_size
    images, encoded = (-(-count // ranks.size) for count in step_images(config))
    frozen = config.finetune.freeze
    passes = backbone_work(config.net, images, side, precision, config.train.ghost_batch, frozen)
    works = {"backbone forward": passes.forward, "backbone backward": passes.backward}
    if segment_blocks(config):
        works["recomputation"] = passes.blocks
    if encoded:
        works["encoder"] = backbone_work(config.net, encoded, side, precision).forward
    if (who := config.method.taught) and who.teacher:
        trust = config.train.trust_code
        works["teacher"] = teacher_work(who.teacher, who.teacher_net, images, precision, trust)
    works = {name: repeated(work, micro) for name, work in works.items()}
    works |= {"head": head_work(config, identities, ranks, head_precision, device), "pairs": pair_work(config)}
    works["update"] = update_work(config, identities, ranks, device)
    parts = {name: computed(work, rates) for name, work in works.items() if work}
    teacher = teacher_width(config.method.taught, config.train.trust_code)
    for exchange in exchanges(config, ranks, teacher or config.net.embedding):
        parts[f"{exchange.collective}: {exchange.carries}"] = exchanged(exchange, ranks.size, rates)
    if ranks.size > 1:
        parts["all_reduce: gradients"] = reduced(config, ranks.size, rates, parts["backbone backward"].seconds / micro)
    return parts


def computed(work: Work, rates: Rates) -> Part:
    """Return the part that some work is."""
    return Part(
        seconds=sum(count * rates.seconds(operator) for operator, count in work.items()),
        flops=sum(count * operator.flops for operator, count in work.items()),
        bytes=sum(count * operator.bytes for operator, count in work.items()),
        operators=sum(work.values()),
    )


def exchanged(exchange: Exchange, ranks: int, rates: Rates) -> Part:
    """Return the part that a collective is. In a ring, a rank sends all but its own share of what all have."""
    shares = {"all_gather": ranks - 1, "reduce_scatter": (ranks - 1) / ranks, "all_reduce": 2 * (ranks - 1) / ranks}
    sent = shares[exchange.collective] * exchange.bytes
    seconds = exchange.times * (sent / rates.ring + rates.hop * math.log2(ranks))
    return Part(seconds, operators=exchange.times, sent=exchange.times * sent)


def reduced(config: Config, ranks: int, rates: Rates, backward: float) -> Part:
    """Return the sum of the backbone's gradients. All buckets but the last travel beside the backward pass.

    Args:
        backward: seconds of the last micro-batch's backward pass.
    """
    gradient = gradient_bytes(config)
    count = buckets(gradient)
    whole = exchanged(Exchange("gradients", "all_reduce", gradient), ranks, rates)
    seconds = whole.seconds + (count - 1) * rates.hop * math.log2(ranks)
    last = exchanged(Exchange("gradients", "all_reduce", min(gradient, BUCKET)), ranks, rates).seconds
    shown = max(last, seconds - backward) if rates.overlaps else seconds
    return whole._replace(seconds=shown, hidden=seconds - shown, operators=count)


@lru_cache
def teacher_width(taught: TeacherSettings | None, trust_code: bool = False) -> int:
    """Return the dimensions of a teacher's embedding; 0 if no net is named."""
    if taught is None or not taught.teacher:
        return 0
    return open_net(taught.teacher, taught.teacher_net, torch.device("cpu"), trust_code=trust_code).net.embedding


def precisions_on(config: Config, card: Card) -> tuple[str, str]:
    """Return the precision of the backbone and of the head's products on a card; "auto" takes two bytes.

    Raises:
        UserError: the recipe asks for bfloat16, and the card has none.
    """
    method, half = config.method, "bfloat16" if card.bfloat16 else "float16"
    backbone = half if config.train.precision == "auto" else config.train.precision
    asked: str = method.class_matrix.precision if method.class_matrix else "auto"
    if isinstance(method, FixedCentres):
        asked = method.precision
    head = backbone if asked == "auto" else asked
    if not card.bfloat16 and "bfloat16" in (backbone, head):
        raise UserError(f"{card.name} has no bfloat16: give train.precision=auto, and leave method.precision out")
    return backbone, head


class Prediction(NamedTuple):
    """What a card is predicted to do; seconds are of a step of the whole run."""

    parts: Parts
    seconds: float
    images_per_second: float
    decoded_per_second: float  # images that all workers together decode
    cores: float  # that decode them
    checkpoint_bytes: int  # of rank 0
    checkpoint_share: float  # of the run's time, in which the training waits for checkpoints


def predicted(config: Config, identities: int, workers: int, card: Card, per_node: int, network: float) -> Prediction:
    """Predict a step of a run on cards.

    Args:
        identities: identities of the training set.
        workers: number of workers, with a card each.
        per_node: cards of a node.
        network: GB/s of a node's network, one way.

    Raises:
        UserError: the card has no bfloat16, or the teacher does not open.
    """
    ranks, precisions = Ranks(0, workers), precisions_on(config, card)
    given = (config, identities, ranks, precisions, rates_of(card, workers, per_node, network, config.train.tf32))
    parts = step_parts(*given)
    seconds = sum(part.seconds for part in parts.values())
    if small := config.data.progressive:
        less = sum(part.seconds for part in step_parts(*given, side=small.size).values())
        seconds += small.share * (less - seconds)
    images = config.train.global_batch + unlabelled_batch(config)
    decoded = step_rows(config) * (1 + config.method.facts.class_images) + unlabelled_batch(config)
    size = checkpoint_bytes(config, identities, ranks, precisions[1])
    waits = size / COPIED + (0 if config.train.save_beside else size / WRITTEN)
    return Prediction(
        parts,
        seconds,
        images / seconds,
        decoded / seconds,
        decoded / seconds * decode_seconds(config),
        size,
        waits / (config.train.save_every * seconds + waits),
    )


def decode_seconds(config: Config) -> float:
    """Return the seconds that one core takes to decode and change an image."""
    plain = config.data.augment.model_copy(update={"flip": 0.0, "erase_area": 0.0})
    changes = any(value for _, value in plain)
    return DECODED + AUGMENTED * changes + MASKED * config.data.masks.ratio


def time_table(prediction: Prediction) -> list[tuple[str, ...]]:
    """Return the parts of a step as a table with the header first."""
    table: list[tuple[str, ...]] = [("part", "ms", "%", "hidden ms", "TFLOP", "GB in memory", "operators", "MB sent")]
    whole = sum(part.seconds for part in prediction.parts.values())
    for name, part in prediction.parts.items():
        shown = (
            f"{1e3 * part.seconds:.2f}",
            f"{100 * part.seconds / whole:.0f}",
            f"{1e3 * part.hidden:.2f}" if part.hidden else "",
            f"{part.flops / 1e12:.3f}" if part.flops else "",
            f"{part.bytes / GB:.2f}" if part.bytes else "",
            f"{part.operators:,}",
            f"{part.sent / 1e6:.2f}" if part.sent else "",
        )
        table.append((name, *shown))
    return [*table, ("step", f"{1e3 * whole:.2f}", "100", *[""] * 5)]


def time_lines(config: Config, prediction: Prediction, workers: int, per_node: int) -> list[str]:
    """Return what a prediction says about speed, data and checkpoints, a line each."""
    here, each = min(workers, per_node), 1 / workers
    size = prediction.checkpoint_bytes
    return [
        f"Predicted: {prediction.images_per_second:,.0f} images/s, {prediction.images_per_second * each:,.0f} on each "
        "card. No card has checked this: expect a factor of 1.5 either way.",
        f"Data: {prediction.decoded_per_second * each:,.0f} images a second for each card, which keep "
        f"{prediction.cores * each:.1f} cores busy; {math.ceil(prediction.cores * each * here)} on a node.",
        f"A checkpoint of rank 0: {size / 2**30:.2f} GiB, copied in {size / COPIED:.2g} s and written in "
        f"{size / WRITTEN:.2g} s. The training waits {100 * prediction.checkpoint_share:.2g} % of its time, at "
        f"train.save_every = {config.train.save_every}.",
    ]


def time_figures(prediction: Prediction, workers: int) -> dict[str, float]:
    """Return the figures of a prediction; ``ms_PART`` are the milliseconds by which each part lengthens a step."""
    named = {
        name.replace(": ", "_").replace(" ", "_").replace("'", ""): part for name, part in prediction.parts.items()
    }
    return {
        **{f"ms_{name}": 1e3 * part.seconds for name, part in named.items()},
        "ms_step": 1e3 * prediction.seconds,
        "predicted_images_per_second": prediction.images_per_second,
        "decoded_per_second": prediction.decoded_per_second,
        "decoding_cores_per_card": prediction.cores / workers,
        "checkpoint_gib": prediction.checkpoint_bytes / 2**30,
        "checkpoint_share": prediction.checkpoint_share,
    }
