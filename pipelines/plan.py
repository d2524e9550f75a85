"""``bigface plan``: whether a run fits a card, part by part, and which knob to turn first where it does not."""

from collections.abc import Iterator, Mapping
from typing import Any

from fr_core.config import Config
from fr_core.errors import UserError
from fr_core.train.memory import memory

GIB = 2**30


def plan(
    config: Config, identities: int, gpus: int, gpu_gib: float
) -> tuple[list[tuple[str, ...]], str, dict[str, float]]:
    """Memory per head and mode.

    Returns:
        A table (header first), the advice in one sentence, and figures: ``fits`` (0 or 1), ``spare_gib``, and every
        part of the recipe as it stands in GiB.

    Raises:
        UserError: a batch that the cards cannot share equally.
    """
    share = gpus * config.train.accumulate
    if config.train.global_batch % share:
        raise UserError(
            f"train.global_batch = {config.train.global_batch} is not a multiple of "
            f"{gpus} GPUs × train.accumulate = {config.train.accumulate}"
        )
    here = memory(config, identities, gpus)
    fused = {"sample_rate": 1.0, "update": "fused", "clip_head": None}
    whole = {"accumulate": 1, "precision": "bfloat16"}
    modes = {
        "as written": config,
        "full FC, plain": changed(config, {"method": {"sample_rate": 1.0, "update": "plain"}}),
        "full FC, fused": changed(config, {"method": fused, "train": whole}),
        "Partial FC 0.1, plain": changed(config, {"method": {"sample_rate": 0.1, "update": "plain"}}),
    }
    columns = {name: memory(mode, identities, gpus) for name, mode in modes.items()}
    table = [("part", *columns)]
    for part in here:
        table.append((part.replace("_", " "), *(f"{column[part] / GIB:.2f}" for column in columns.values())))
    table.append(("fits", *("yes" if fits(column, gpu_gib) else "no" for column in columns.values())))
    spare = gpu_gib - here["total"] / GIB
    if spare >= 0:
        advice = f"It fits, with {spare:.2f} GiB to spare."
    else:
        advice = f"It does not fit: {-spare:.2f} GiB too much. {first_knob(config, identities, gpus, gpu_gib)}"
    figures = {"fits": float(spare >= 0), "spare_gib": spare} | {f"{k}_gib": v / GIB for k, v in here.items()}
    return table, advice, figures


def fits(parts: Mapping[str, int], gpu_gib: float) -> bool:
    return parts["total"] <= gpu_gib * GIB


def first_knob(config: Config, identities: int, gpus: int, gpu_gib: float) -> str:
    """The mildest change that makes the run fit."""
    for words, changes, cards in knobs(config, gpus):
        try:
            candidate = changed(config, changes)
        except ValueError:  # a knob that this recipe excludes
            continue
        if fits(memory(candidate, identities, cards), gpu_gib):
            return f"First knob: {words}."
    return "No single knob mends it: use more cards and a smaller batch together."


def knobs(config: Config, gpus: int) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Changes from the mildest on: the same training first, then the same in expectation, then another one."""
    batch = config.train.global_batch
    if config.method.update == "plain":
        yield "method.update=fused (the same training)", {"method": {"update": "fused"}}, gpus
    for factor in (2, 4, 8, 16):
        accumulate = config.train.accumulate * factor
        if batch % (gpus * accumulate) == 0 and batch // (gpus * accumulate) > 1:
            changes = {"train": {"accumulate": accumulate}, "method": {"update": "plain"}}
            yield f"train.accumulate={accumulate} (batch norm over {batch // gpus // accumulate} images)", changes, gpus
    for factor in (2, 4, 8, 16):
        if batch % (gpus * factor * config.train.accumulate) == 0:
            yield f"{gpus * factor} cards", {}, gpus * factor
    for rate in (0.5, 0.3, 0.1):
        if rate < config.method.sample_rate:
            changes = {"method": {"sample_rate": rate, "update": "fused"}}
            yield f"method.sample_rate={rate} (Partial FC, another training)", changes, gpus
    for factor in (2, 4, 8):
        if batch % (gpus * factor) == 0:
            yield f"train.global_batch={batch // factor}", {"train": {"global_batch": batch // factor}}, gpus


def changed(config: Config, changes: Mapping[str, Mapping[str, Any]]) -> Config:
    """The config with some fields of some sections replaced, validated."""
    tree = config.model_dump()
    for section, fields in changes.items():
        tree[section] |= fields
    return Config.model_validate(tree)
