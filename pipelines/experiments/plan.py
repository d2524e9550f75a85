"""``bigface plan``: computes whether a run fits its cards, which knob to turn first if not, and how long it takes."""

import itertools
import sys
from collections.abc import Iterator, Mapping

from fr_core.config import Config, class_count, lane_count, lane_multiple, step_rows, total_steps, unlabelled_batch
from fr_core.config.methods import Distill
from fr_core.config.nets import QuantisedNet
from fr_core.data.crops import TEMPLATE_SIZE
from fr_core.data.plan import check_lanes
from fr_core.data.schema import CHUNK_IMAGES, Manifest
from fr_core.errors import UserError
from fr_core.train.check import check_shares, check_warmup
from fr_core.train.memory import host_bytes, memory

GIB = 2**30
CROP_BYTES = 6144  # of a crop of 112×112 as JPEG; assumed where no shards are given
Changes = dict[str, dict[str, object]]  # fields by section
FUSED, WHOLE = {"update": "fused"}, {"accumulate": 1, "precision": "bfloat16"}


def plan(
    config: Config, identities: int, gpus: int, gpu_gib: float
) -> tuple[list[tuple[str, ...]], str, dict[str, float]]:
    """Compute the memory of each card for the recipe and for other heads.

    Args:
        config: config of the recipe.
        identities: identities of the training set.
        gpus: cards, one for each worker.
        gpu_gib: memory of one card in GiB.

    Returns:
        A table with the header first, the advice in a few sentences, and figures. The figures are ``fits`` (0 or 1),
        ``spare_gib``, and the recipe's parts in GiB.

    Raises:
        UserError: the cards cannot share the run's lanes or the batch equally, or the net is quantised.
    """
    if isinstance(config.net, QuantisedNet):
        raise UserError(
            "the memory that trains a quantised net is not computed: plan the float net with net.kind=iresnet"
        )
    check_shares(config, gpus)
    check_lanes(lane_count(config), gpus, lane_multiple(config))
    here = memory(config, identities, gpus)
    matrix = {"kind": "bigface"} | config.method.model_dump(include={"margin", "subcentres", "distill"})
    modes = {"as written": config}
    if config.method.agreement is None:  # a class matrix does not replace a loss that compares pairs
        modes |= {
            "full FC, plain": changed(config, {"method": matrix}),
            "full FC, fused": changed(config, {"method": matrix | FUSED, "train": WHOLE}),
            "Partial FC 0.1, plain": changed(config, {"method": matrix | {"sample_rate": 0.1}}),
        }
    columns = {name: memory(mode, identities, gpus) for name, mode in modes.items()}
    table = [("part", *columns)]
    for part in [name for name in dict.fromkeys(itertools.chain(*columns.values())) if name != "total"] + ["total"]:
        sizes = (gib(column[part]) if part in column else "" for column in columns.values())
        table.append((part_name(part, config, identities), *sizes))
    table.append(("fits", *("yes" if fits(column, gpu_gib) else "no" for column in columns.values())))
    spare = gpu_gib - here["total"] / GIB
    if spare >= 0:
        advice = f"It fits, with {spare:.2f} GiB to spare."
    else:
        advice = f"It does not fit: {-spare:.2f} GiB are missing. {first_knob(config, identities, gpus, gpu_gib)}"
    taught = config.method.taught
    if taught and not taught.teacher and not (isinstance(taught, Distill) and taught.embeddings):
        advice += f" No teacher is counted: give {taught.named}=REF."
    figures = {"fits": float(spare >= 0), "spare_gib": spare} | {f"{k}_gib": v / GIB for k, v in here.items()}
    return table, advice, figures


def gib(size: int) -> str:
    """Return bytes in GiB as text; "<0.01" for what two decimals do not show."""
    return "0" if size == 0 else "<0.01" if size < 0.01 * GIB else f"{size / GIB:.2f}"


def part_name(part: str, config: Config, identities: int) -> str:
    """Return the name of a part of memory for people; class centres come with their number."""
    count = config.method.centres(class_count(config, identities), config.train.global_batch)
    return f"{count:,} class centres" if part == "centres" and count else part.replace("_", " ")


def batch_text(config: Config, gpus: int) -> str:
    """Return the global batch and the batch of each card, with its class images and micro-batches, as one line."""
    batch, facts, accumulate = config.train.global_batch, config.method.facts, config.train.accumulate
    text = f"global batch {batch:,}, {batch // gpus:,} images on each card"
    if accumulate > 1:
        text += f" in {accumulate} micro-batches of {batch // gpus // accumulate:,}"
    if count := facts.class_images:
        text += f", with {count} class image{'s' * (count > 1)} each"
    if unlabelled := unlabelled_batch(config):
        text += f", and {unlabelled // gpus:,} unlabelled images"
    return text


def main_memory(
    config: Config, identities: int, images: int | None, gpus: int, manifest: Manifest | None
) -> tuple[str, dict[str, float]]:
    """Compute the main memory for images of grouped shards (``fr_core/data/plan.py``).

    Args:
        identities: identities of the training set.
        images: images of the training set, if known. Otherwise the set counts as large.
        gpus: workers.
        manifest: manifest of the training set, if known. Otherwise its chunks and images have the usual size, as have
            the chunks of flat shards.

    Returns:
        A line for people and the figures ``encoded_gib`` and ``decoded_gib``. Both are empty for flat shards.
    """
    if not config.method.facts.class_images:
        return "", {}
    chunk, each, side = CHUNK_IMAGES, float(CROP_BYTES), TEMPLATE_SIZE
    if manifest:
        each, side = sum(shard.bytes for shard in manifest.shards) / manifest.images, manifest.image_size
    if manifest and manifest.layout == "grouped":
        chunk = manifest.chunk_images
    held = host_bytes(config, identities, images or sys.maxsize, chunk, each, side, gpus)
    line = (
        f"Main memory of all workers: {gib(held['encoded'])} GiB of images in chunks of {chunk} (data.spread), "
        f"{gib(held['decoded'])} GiB of decoded ones (data.decoded_mib)."
    )
    return line, {f"{name}_gib": size / GIB for name, size in held.items()}


def duration(config: Config, images: int | None, images_per_second: float | None) -> tuple[str, dict[str, float]]:
    """Estimate how long a run trains, from a throughput that the user has measured.

    Args:
        config: config of the recipe.
        images: images of the training set, if known.
        images_per_second: throughput of all cards together, as a run's report on these cards has it. It counts the
            images of the batch, without their class images.

    Returns:
        A line for people and the figures ``steps`` and ``hours``, those that are known.

    Raises:
        UserError: the training set has fewer images than a batch, or no step follows the warm-up.
    """
    if images is None:
        check_warmup(config, config.train.epochs)
        speed = "" if images_per_second else ", and --images-per-second or --gpu"
        return f"Steps and hours: give data.path=SHARDS or --images{speed}.", {}
    steps_per_epoch = images // step_rows(config)
    if not steps_per_epoch:
        raise UserError(f"{images:,} images are fewer than a batch of {step_rows(config):,}: lower train.global_batch")
    steps = total_steps(config, steps_per_epoch)
    check_warmup(config, steps / steps_per_epoch)
    if images_per_second is None:
        line = f"{steps:,} steps. Hours: give --images-per-second, which a short run on these cards reports, or --gpu."
        return line, {"steps": steps}
    hours = steps * (config.train.global_batch + unlabelled_batch(config)) / images_per_second / 3600
    line = f"{steps:,} steps, about {time_in_words(hours)} at {images_per_second:,.0f} images/s, without verifications."
    return line, {"steps": steps, "hours": hours}


def time_in_words(hours: float) -> str:
    """Return a time in hours, minutes or seconds, whichever reads best."""
    if hours >= 1:
        return f"{hours:,.1f} hours"
    if 60 * hours >= 1:
        return f"{60 * hours:.2g} minutes"
    seconds = max(1, round(3600 * hours))
    return "a second" if seconds == 1 else f"{seconds} seconds"


def fits(parts: Mapping[str, int], gpu_gib: float) -> bool:
    """Return whether the parts fit a card."""
    return parts["total"] <= gpu_gib * GIB


def first_knob(config: Config, identities: int, gpus: int, gpu_gib: float) -> str:
    """Return the mildest change that makes the run fit, as a sentence."""
    for words, changes, cards in knobs(config, gpus):
        try:
            turned = changed(config, changes)
            check_lanes(lane_count(turned), cards, lane_multiple(turned))
            check_shares(turned, cards)
            parts = memory(turned, identities, cards)
        except (ValueError, UserError):  # the recipe excludes this knob
            continue
        if fits(parts, gpu_gib):
            return f"First knob: {words}."
    return "No single knob is enough: use more cards and a smaller batch together."


def knobs(config: Config, gpus: int) -> Iterator[tuple[str, Changes, int]]:
    """Yield changes with their words and number of cards, the mildest first.

    First come changes that keep the training the same, then the same in expectation, then changes to another training.
    """
    batch, method = config.train.global_batch, config.method
    if method.saves_memory:
        yield f"{as_overrides(method.saves_memory)} (the same training)", {"method": method.saves_memory}, gpus
    if not config.train.recompute:
        yield "train.recompute=true (the same training, one more forward pass)", {"train": {"recompute": True}}, gpus
    for factor in (2, 4, 8, 16):
        accumulate = config.train.accumulate * factor
        if batch % (gpus * accumulate) == 0 and batch // (gpus * accumulate) > 1:
            changes: Changes = {"train": {"accumulate": accumulate}}
            normalised = config.train.ghost_batch or batch // gpus // accumulate
            words = f"train.accumulate={accumulate} (batch norm over {normalised} images)"
            if method.to_accumulate:
                changes["method"] = method.to_accumulate
                words += f" with {as_overrides(method.to_accumulate)}"
            yield words, changes, gpus
    for factor in (2, 4, 8, 16):
        if batch % (gpus * factor * config.train.accumulate) == 0:
            yield f"{gpus * factor} cards", {}, gpus * factor
    for count in range(config.method.facts.class_images - 1, 0, -1):
        yield f"method.class_images={count} (another training)", {"method": {"class_images": count}}, gpus
    for rate in (0.5, 0.3, 0.1):
        if method.share_knob and rate < getattr(method, method.share_knob):
            changes = {"method": {method.share_knob: rate, **method.saves_memory}}
            yield f"method.{method.share_knob}={rate} (another training)", changes, gpus
    for factor in (2, 4, 8):
        if batch % (gpus * factor) == 0:
            yield f"train.global_batch={batch // factor}", {"train": {"global_batch": batch // factor}}, gpus


def as_overrides(fields: Mapping[str, object]) -> str:
    """Return fields of the method as overrides for the command line."""
    return " ".join(f"method.{name}={value}" for name, value in fields.items())


def changed(config: Config, changes: Mapping[str, Mapping[str, object]]) -> Config:
    """Return the config with some fields changed, validated. A ``kind`` among them replaces the whole section."""
    tree = config.model_dump()
    for section, fields in changes.items():
        tree[section] = dict(fields) if "kind" in fields else tree[section] | fields
    return Config.model_validate(tree)
