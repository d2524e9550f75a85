"""Restores a run's state from a checkpoint that any number of ranks may have saved (``fr_core/train/save.py``)."""

import logging
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from fr_core.config import Config, lane_count
from fr_core.config.recipes import flat, stored_config
from fr_core.data.store import AnyPath, atomic_file, find_paths, remove_folder
from fr_core.errors import UserError
from fr_core.nets.checkpoint_files import (
    BACKBONE,
    CHECKPOINTS,
    FORMAT,
    DamagedCheckpoint,
    Summary,
    checkpoints,
    read_head,
    read_summary,
    read_tensors,
    step_name,
    write_signed,
)
from fr_core.ranks import Ranks
from fr_core.train.reading import known_reading
from fr_core.train.save import raise_together, rank_optimizer, sharded_params, unlabelled_stamp, unshipped_nets
from fr_core.train.state import TrainState

RESUMABLE = ("train.", "optim.", "schedule.", "data.augment.", "data.masks.")  # settings that a resumed run may change
SET_ASIDE = "damaged.json"  # new name of checkpoint.json in a damaged checkpoint

log = logging.getLogger("bigface")


def resume(config: Config, state: TrainState, out: AnyPath, ranks: Ranks) -> bool:
    """Load the newest whole checkpoint of a run into ``state``. Log damaged checkpoints and set them aside.

    Returns:
        Whether the run has a checkpoint.

    Raises:
        UserError: no checkpoint is whole, or it belongs to a run with other settings.
    """
    damaged: list[tuple[AnyPath, DamagedCheckpoint]] = []
    # Rank 0 alone lists the folder, so that all ranks agree even if it changes meanwhile.
    for marker in reversed(ranks.broadcast_object(find_paths(out, CHECKPOINTS) if ranks.rank == 0 else None)):
        try:
            with raise_together(ranks):
                load_checkpoint(config, state, marker.parent, ranks)
        except DamagedCheckpoint as error:
            damaged.append((marker, error))
            continue
        with raise_together(ranks):
            for bad, what in damaged if ranks.rank == 0 else ():
                log.warning("damaged checkpoint: %s; going on from %s", what, marker.parent.name)
                with atomic_file(bad.with_name(SET_ASIDE)) as aside:
                    aside.write_bytes(bad.read_bytes())
                bad.unlink()
        log.info("resumed", extra={"facts": {"step": state.step, "checkpoint": str(marker.parent)}})
        return True
    if damaged:
        raise UserError(f"no whole checkpoint in {out}: {damaged[0][1]}; --overwrite starts over")
    return False


def adopt_checkpoint(donor: Path, out: Path, run_id: str | None) -> None:
    """Replace all checkpoints of a run by a copy of another run's checkpoint.

    Args:
        donor: checkpoint folder of the other run.
        out: folder of the run.
        run_id: id of this run's MLflow run, which the copy carries.

    Raises:
        DamagedCheckpoint: the donor's ``checkpoint.json`` is damaged.
    """
    summary = read_summary(donor) | {"run_id": run_id}
    folder = out / "checkpoints" / step_name(summary["step"])
    remove_folder(folder.parent)
    shutil.copytree(donor, folder, ignore=shutil.ignore_patterns("checkpoint.json"))
    write_signed(folder, summary)


def load_checkpoint(config: Config, state: TrainState, folder: AnyPath, ranks: Ranks) -> None:
    """Load a run's checkpoint into ``state``. Any number of ranks may have written it.

    Raises:
        DamagedCheckpoint: a file is damaged; the error names it.
        UserError: the checkpoint belongs to a run with other data, net, method, batch, fine-tuning or seed.
    """
    summary = read_summary(folder)
    if summary["format"] != FORMAT:
        raise UserError(f"{folder}: checkpoint format {summary['format']}, this program reads {FORMAT}")
    _check_same_run(config, state, summary, folder)
    _check_end(config, state, summary, folder)
    states = [name for name in summary["files"] if name.startswith("backbone_state")]
    extra = {name: tensor for file in states for name, tensor in read_tensors(folder, summary, file).items()}
    state.usable.load_state_dict(read_tensors(folder, summary, BACKBONE))
    for name, net in unshipped_nets(state).items():
        net.load_state_dict(_select_prefix(f"{name}/", extra))
    _load_optimizer(state.optimizers["backbone"], state.trained, _select_prefix("optimizer/", extra))
    _load_head(state, folder, summary)
    state.step = summary["step"]
    if 1 not in (state.loss_scale, summary["loss_scale"]):  # a scale of 1 is none: a precision that needs none had it
        state.loss_scale = summary["loss_scale"]
    state.began = time.monotonic() - summary.get("seconds", 0.0)
    state.good_steps, state.bad_steps, state.run_id = summary["good_steps"], summary["bad_steps"], summary["run_id"]
    state.dropped_steps = summary.get("dropped_steps", 0)
    state.unread = [known_reading(**reading) for reading in summary.get("unread", ())]
    if state.watcher and summary["watcher"]:
        state.watcher.load_state_dict(summary["watcher"])


def _load_head(state: TrainState, folder: AnyPath, summary: Summary) -> None:
    if state.head is None:
        if state.agreement and summary["head"]:  # a loss without thresholds has no file
            state.agreement.load_state_dict(read_tensors(folder, summary, summary["head"][0]["file"]))
    elif state.head.sharded:
        common = sorted(state.head.state_dict().keys() - set(state.head.sharded))
        rows, same = read_head(folder, summary, state.head.lo, state.head.hi, common)
        own = {name: tensor for name, tensor in rows.items() if name in state.head.sharded}
        state.head.load_state_dict(own | same)
        _load_optimizer(state.optimizers["head"], sharded_params(state.head), _select_prefix("optimizer/", rows))
    else:
        state.head.load_state_dict(read_tensors(folder, summary, summary["head"][0]["file"]))


MOVABLE = {"method.teacher"} | {
    f"method.distill.{name}" for name in ("teacher", "embeddings", "unlabelled.path", "unlabelled.embeddings")
}


def _check_same_run(config: Config, state: TrainState, summary: Summary, folder: AnyPath) -> None:
    old = stored_config(summary["config"], str(folder))  # a field that an older config lacks had its default
    now, then = config.model_dump(mode="json"), old.model_dump(mode="json")
    facts: dict[str, tuple[object, object]] = {
        "seed": (config.seed, old.seed),
        "train.global_batch": (config.train.global_batch, old.train.global_batch),
        "train.ema on": (config.train.ema > 0, old.train.ema > 0),
        "data.balanced": (config.data.balanced, old.data.balanced),
        "data.sampling": (config.data.sampling, old.data.sampling),
        "data.views": (config.data.views, old.data.views),
        "data.lanes": (lane_count(config), summary["lanes"]),
        "data.shuffle_window": (config.data.shuffle_window, old.data.shuffle_window),
        "data.variants": (config.data.variants, old.data.variants),
        "data.spread": (state.plan.spread, summary.get("spread", 0)),  # earlier versions spread no chunks
        "optim.kind": (config.optim.kind, old.optim.kind),
        "schedule.kind": (config.schedule.kind, old.schedule.kind),
        "data.variant_strength": (config.data.variant_strength, old.data.variant_strength),
        "the number of identities": (state.plan.dataset.manifest.identities, summary["identities"]),
        "the number of images": (state.plan.dataset.manifest.images, summary["images"]),
    }
    for name, stamp in (("data", state.plan.dataset.stamp), ("unlabelled", unlabelled_stamp(config))):
        facts[f"the {name}"] = (stamp, summary.get(name, stamp))  # older checkpoints lack it
    if config.data.variants == old.data.variants == 1:
        del facts["data.variant_strength"]
    if not (config.schedule.watches_loss or old.schedule.watches_loss):
        del facts["schedule.kind"]  # these schedules have no state: they are interchangeable
    for section in ("net", "method", "finetune"):
        ours, theirs = flat(now[section], f"{section}."), flat(then[section], f"{section}.")
        facts |= {name: (ours.get(name), theirs.get(name)) for name in ours | theirs if name not in MOVABLE}
    differing = [name for name, (here, there) in facts.items() if here != there]
    if differing:
        first, *more = differing
        here, there = facts[first]
        others = f" (others differ too, such as {', '.join(more[:3])}: another recipe, or other data?)" if more else ""
        raise UserError(
            f"{folder}: cannot resume, {first} differs: {there} there, {here} now{others}; use another folder"
        )


def _check_end(config: Config, state: TrainState, summary: Summary, folder: AnyPath) -> None:
    if summary["step"] > state.total_steps:
        changes = ", ".join(_changes(config, summary, folder, ("train.epochs", "train.max_steps")))
        raise UserError(
            f"{folder}: cannot resume, it is beyond the run's end at step {state.total_steps} ({changes}): "
            "repeat the earlier values, or give larger ones"
        )


def changed_settings(config: Config, out: AnyPath) -> list[str]:
    """Return what a resumed run changes against its newest checkpoint, such as ``optim.lr=0.2 (was 0.1)``."""
    saved = checkpoints(out)[-1:]
    with suppress(DamagedCheckpoint):  # resuming falls back to an older one, and says so
        return [change for folder in saved for change in _changes(config, read_summary(folder), folder)]
    return []


def _changes(config: Config, summary: Summary, folder: AnyPath, names: tuple[str, ...] = RESUMABLE) -> list[str]:
    now = flat(config.model_dump(mode="json"))
    then = flat(stored_config(summary["config"], str(folder)).model_dump(mode="json"))
    different = [name for name in now | then if now.get(name) != then.get(name)]
    return [f"{name}={now.get(name)} (was {then.get(name)})" for name in different if name.startswith(names)]


def _load_optimizer(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> None:
    optimizer = rank_optimizer(optimizer)
    optimizer.state.clear()  # it may hold parts of a damaged checkpoint
    own = {param for group in optimizer.param_groups for param in group["params"]}
    for key_name, value in tensors.items():
        key, name = key_name.split("/", 1)
        param = named[name]
        if param in own:  # with optim.shard_state, other ranks hold the rest
            # A momentum takes the memory layout of its parameter. A step count is a scalar and stays on the CPU.
            same_shape = value.shape == param.shape
            optimizer.state[param][key] = torch.empty_like(param).copy_(value) if same_shape else value


def _select_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, named without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
