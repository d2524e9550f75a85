"""``bigface plan``: whether a run fits a card, part by part, and which knob to turn first where it does not."""

import itertools
from collections.abc import Iterator, Mapping

from fr_core.config import Config
from fr_core.config.methods import Distill
from fr_core.config.nets import QuantisedNet
from fr_core.errors import UserError
from fr_core.train.check import check_shares
from fr_core.train.memory import memory

GIB = 2**30
Changes = dict[str, dict[str, object]]  # fields by their section
FUSED, WHOLE = {"update": "fused"}, {"accumulate": 1, "precision": "bfloat16"}


def plan(
    config: Config, identities: int, gpus: int, gpu_gib: float
) -> tuple[list[tuple[str, ...]], str, dict[str, float]]:
    """Memory per head and mode.

    Returns:
        A table (header first), the advice in one sentence, and figures: ``fits`` (0 or 1), ``spare_gib``, and every
        part of the recipe as it stands in GiB.

    Raises:
        UserError: a batch that the cards cannot share equally, or a quantised net.
    """
    if isinstance(config.net, QuantisedNet):
        raise UserError(
            "the memory of a quantised net in training is not counted: plan the float net, net.kind=iresnet"
        )
    check_shares(config, gpus)
    here = memory(config, identities, gpus)
    matrix = {"kind": "bigface"} | config.method.model_dump(include={"margin", "distill"})
    modes = {"as written": config}
    if config.method.agreement is None:  # a method that compares pairs has no classes to stand for
        modes |= {
            "full FC, plain": changed(config, {"method": matrix}),
            "full FC, fused": changed(config, {"method": matrix | FUSED, "train": WHOLE}),
            "Partial FC 0.1, plain": changed(config, {"method": matrix | {"sample_rate": 0.1}}),
        }
    columns = {name: memory(mode, identities, gpus) for name, mode in modes.items()}
    table = [("part", *columns)]
    for part in [name for name in dict.fromkeys(itertools.chain(*columns.values())) if name != "total"] + ["total"]:
        sizes = (f"{column[part] / GIB:.2f}" if part in column else "" for column in columns.values())
        table.append((part.replace("_", " "), *sizes))
    table.append(("fits", *("yes" if fits(column, gpu_gib) else "no" for column in columns.values())))
    spare = gpu_gib - here["total"] / GIB
    if spare >= 0:
        advice = f"It fits, with {spare:.2f} GiB to spare."
    else:
        advice = f"It does not fit: {-spare:.2f} GiB too much. {first_knob(config, identities, gpus, gpu_gib)}"
    given = config.method.taught
    if given and not given.teacher and not (isinstance(given, Distill) and given.embeddings):
        advice += f" No teacher is counted: {given.named} names one."
    figures = {"fits": float(spare >= 0), "spare_gib": spare} | {f"{k}_gib": v / GIB for k, v in here.items()}
    return table, advice, figures


def fits(parts: Mapping[str, int], gpu_gib: float) -> bool:
    return parts["total"] <= gpu_gib * GIB


def first_knob(config: Config, identities: int, gpus: int, gpu_gib: float) -> str:
    """The mildest change that makes the run fit."""
    for words, changes, cards in knobs(config, gpus):
        try:
            check_shares(changed(config, changes), cards)
            parts = memory(changed(config, changes), identities, cards)
        except (ValueError, UserError):  # a knob that this recipe excludes
            continue
        if fits(parts, gpu_gib):
            return f"First knob: {words}."
    return "No single knob mends it: use more cards and a smaller batch together."


def knobs(config: Config, gpus: int) -> Iterator[tuple[str, Changes, int]]:
    """Changes from the mildest on: the same training first, then the same in expectation, then another one."""
    batch, method = config.train.global_batch, config.method
    if method.saves_memory:
        yield f"{as_overrides(method.saves_memory)} (the same training)", {"method": method.saves_memory}, gpus
    if not config.train.recompute:
        yield "train.recompute=true (the same training, a forward pass more)", {"train": {"recompute": True}}, gpus
    for factor in (2, 4, 8, 16):
        accumulate = config.train.accumulate * factor
        if batch % (gpus * accumulate) == 0 and batch // (gpus * accumulate) > 1:
            changes: Changes = {"train": {"accumulate": accumulate}}
            looked_at = config.train.ghost_batch or batch // gpus // accumulate
            words = f"train.accumulate={accumulate} (batch norm over {looked_at} images)"
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
    return " ".join(f"method.{name}={value}" for name, value in fields.items())


def changed(config: Config, changes: Mapping[str, Mapping[str, object]]) -> Config:
    """The config with some fields of some sections replaced, validated. A ``kind`` begins its section anew."""
    tree = config.model_dump()
    for section, fields in changes.items():
        tree[section] = dict(fields) if "kind" in fields else tree[section] | fields
    return Config.model_validate(tree)
