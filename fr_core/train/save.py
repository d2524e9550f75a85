"""Saves a run's state in checkpoints, beside the training.

``fr_core/nets/checkpoint_files.py`` describes the files. No random state is saved: every draw is a function of the
seed, the step, and the rank or sample id. The position in the data is the step.
"""

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fr_core.config import Config
from fr_core.data.store import AnyPath, find_paths, remove_folder
from fr_core.data.stream import unlabelled
from fr_core.device import reached
from fr_core.errors import UserError
from fr_core.heads.head import Head
from fr_core.nets.checkpoint_files import (
    BACKBONE,
    FORMAT,
    IDENTITIES,
    Summary,
    checkpoints,
    copy_file,
    step_name,
    write_signed,
    write_tensors,
)
from fr_core.ranks import Ranks
from fr_core.train.notice import Notice
from fr_core.train.state import TrainState
from fr_core.train.statistics import average_statistics

FULL = os.strerror(errno.ENOSPC)

log = logging.getLogger("bigface")


class DiskFull(UserError):
    """The disk has no room for a checkpoint."""


class Saver:
    """Saves the checkpoints of a run, one at a time.

    The training waits while the state is copied. Then a thread of each rank writes the copy; the file that marks a
    checkpoint as whole comes last. The threads have a process group of their own, so that their collectives do not mix
    with those of the training.
    """

    def __init__(self, config: Config, out: AnyPath, ranks: Ranks) -> None:
        self.config, self.out, self.ranks, self.beside = config, out, ranks, ranks.beside()
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.running: Future[None] | None = None

    def save(self, state: TrainState, before: Callable[[], None], after: Callable[[AnyPath], None]) -> None:
        """Copy the state and begin to write the copy, as soon as the last checkpoint is written.

        Args:
            before: what each rank does first, in its thread.
            after: what each rank does when the checkpoint is whole, in its thread; it gets the checkpoint's folder.

        Raises:
            UserError: as :meth:`wait`.
        """
        self.wait()
        average_statistics(state, self.ranks)
        snapshot = take_snapshot(self.config, state, self.ranks)

        def write() -> None:
            with raise_together(self.beside):
                before()
            after(write_checkpoint(snapshot, self.out, self.beside))

        self.running = self.thread.submit(write)
        if not self.config.train.save_beside:
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            UserError: it cannot be written. All ranks raise it, and nothing of the checkpoint is left.
        """
        running, self.running = self.running, None
        if running:
            running.result()

    def notice(self) -> Notice:
        """Ask for a further save if the last one failed. All ranks then meet in it, and raise the error together."""
        failed = self.running and self.running.done() and self.running.exception()
        return Notice.SAVE if failed else Notice.NONE

    def close(self) -> None:
        """Wait until the last checkpoint is written or has failed."""
        self.thread.shutdown()


@dataclass(frozen=True)
class Snapshot:
    """A copy of what a checkpoint holds of this rank."""

    step: int
    keep: int  # number of checkpoints that stay
    files: dict[str, dict[str, Tensor]]  # tensors by name, by file
    rows: tuple[int, int] | None  # rows of the class matrix
    names: AnyPath | None  # file that names the rows; only rank 0 copies it
    net: str  # section of the net, so that a file opens without its folder
    summary: Summary
    copied: torch.cuda.Event | None  # on a card: when the copies have arrived


def take_snapshot(config: Config, state: TrainState, ranks: Ranks) -> Snapshot:
    """Copy this rank's part of the state to main memory."""
    rows = (state.head.lo, state.head.hi) if state.head and state.head.sharded else None
    files = {}
    if head := _head_tensors(state, ranks):
        files[head_file(ranks.rank)] = head
    if ranks.rank == 0:
        files[BACKBONE] = dict(state.usable.state_dict())
    if ranks.rank == 0 or config.optim.shard_state:
        files[f"backbone_state_{ranks.rank:05d}.safetensors"] = _backbone_tensors(state, ranks)
    if config.train.save_beside:
        files = {file: {name: copied(tensor) for name, tensor in own.items()} for file, own in files.items()}
    return Snapshot(
        state.step,
        config.train.keep,
        files,
        rows,
        state.plan.dataset.root / IDENTITIES if rows and ranks.rank == 0 else None,
        config.net.model_dump_json(),
        _summary(config, state),
        reached(state.device),
    )


def copied(tensor: Tensor) -> Tensor:
    """Copy a tensor to main memory. A card copies it beside the host, before it does anything that is asked later."""
    return tensor.detach().to("cpu", non_blocking=True, copy=True, memory_format=torch.contiguous_format)


def write_checkpoint(snapshot: Snapshot, out: AnyPath, ranks: Ranks) -> AnyPath:
    """Write ``out/checkpoints/step_N`` from all ranks, then delete all but the newest ``train.keep`` whole checkpoints.

    If the disk is full, delete the oldest checkpoint, unless it is the only one, and try once more.

    Raises:
        UserError: the checkpoint cannot be written. All ranks raise it, and nothing of the checkpoint is left.
    """
    folder = out / "checkpoints" / step_name(snapshot.step)
    if snapshot.copied:
        snapshot.copied.synchronize()
    try:
        _write(snapshot, folder, ranks)
    except DiskFull as error:
        saved = ranks.broadcast_object(checkpoints(out))
        # For a URL, the scratch folder is full: deleting checkpoints does not help.
        if len(saved) < 2 or not isinstance(out, Path):
            raise
        with raise_together(ranks):
            if ranks.rank == 0:
                log.warning("%s; deleting %s to make room", error, saved[0])
                remove_folder(saved[0])
        _write(snapshot, folder, ranks)
    with raise_together(ranks):
        if ranks.rank == 0:
            _delete_old_checkpoints(out, snapshot.keep)
    return folder


def _write(snapshot: Snapshot, folder: AnyPath, ranks: Ranks) -> None:
    files = snapshot.files
    needed = sum(ranks.gather_objects(sum(t.nbytes for tensors in files.values() for t in tensors.values())))
    try:
        with raise_together(ranks):
            if ranks.rank == 0:
                remove_folder(folder)  # an unfinished checkpoint of an earlier start
                folder.mkdir(parents=True)
        with raise_together(ranks):
            facts = {name: write_tensors(folder / name, own, {"net": snapshot.net}) for name, own in files.items()}
            if snapshot.names:  # for runs on other identities
                facts[IDENTITIES] = copy_file(snapshot.names, folder / IDENTITIES)
        parts = ranks.gather_objects((facts, snapshot.rows))
        with raise_together(ranks):
            if ranks.rank == 0:
                head = [
                    {"file": head_file(rank), "rows": rows}
                    for rank, (facts, rows) in enumerate(parts)
                    if head_file(rank) in facts
                ]
                written = {name: facts for own, _ in parts for name, facts in own.items()}
                write_signed(folder, snapshot.summary | {"ranks": ranks.size, "head": head, "files": written})
    except UserError as error:
        with raise_together(ranks):
            if ranks.rank == 0:
                remove_folder(folder)
        raise type(error)(f"cannot write checkpoint {folder} of {needed:,} bytes: {error}") from None


def _delete_old_checkpoints(out: AnyPath, keep: int) -> None:
    """Keep the newest ``keep`` whole checkpoints, and delete older, unfinished and damaged ones."""
    kept = checkpoints(out)[-keep:]
    for folder in find_paths(out / "checkpoints", "step_*"):
        if folder not in kept:
            remove_folder(folder)


@contextmanager
def raise_together(ranks: Ranks) -> Iterator[None]:
    """If any rank fails in the block, all ranks raise the first error.

    Raises:
        UserError: the error of the lowest rank that failed.
    """
    failed: UserError | None = None
    try:
        yield
    except UserError as error:
        failed = error
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        failed = DiskFull(FULL) if FULL in reason else UserError(reason)  # safetensors wraps the system's words
    first = next(filter(None, ranks.gather_objects(failed)), None)
    if first:
        raise first


def _summary(config: Config, state: TrainState) -> Summary:
    """Return what ``checkpoint.json`` says of the run; the files of all ranks are added when they are written."""
    manifest = state.plan.dataset.manifest
    return {
        "format": FORMAT,
        "step": state.step,
        "epoch": state.step / state.plan.steps_per_epoch,
        "lanes": state.plan.lanes,
        "spread": state.plan.spread,
        "identities": manifest.identities,
        "images": manifest.images,
        "data": state.plan.dataset.stamp,
        "unlabelled": unlabelled_stamp(config),
        "seconds": time.monotonic() - state.began,
        "loss_scale": state.loss_scale,
        "good_steps": state.good_steps,
        "bad_steps": state.bad_steps,
        "unread": [{"step": reading.step, "numbers": reading.read()} for reading in state.unread],
        "dropped_steps": state.dropped_steps,
        "run_id": state.run_id,
        "watcher": state.watcher.state_dict() if state.watcher else None,
        "config": config.model_dump(mode="json"),
    }


def head_file(rank: int) -> str:
    """Return the name of a rank's file with its part of the head."""
    return f"head_{rank:05d}.safetensors"


def _head_tensors(state: TrainState, ranks: Ranks) -> dict[str, Tensor]:
    """Return this rank's part of the head and its optimiser. Without a head, return quantface's thresholds, if any."""
    if state.head is None:
        return dict(state.agreement.state_dict()) if state.agreement and ranks.rank == 0 else {}
    sharded = sharded_params(state.head)
    own = {name: tensor for name, tensor in state.head.state_dict().items() if name in sharded or ranks.rank == 0}
    return own | _add_prefix("optimizer/", _optimizer_tensors(state.optimizers["head"], sharded) if sharded else {})


def sharded_params(head: Head) -> dict[str, Tensor]:
    """Return the parameters that the ranks split, by name."""
    return {name: param for name, param in head.named_parameters() if name in head.sharded}


def _backbone_tensors(state: TrainState, ranks: Ranks) -> dict[str, Tensor]:
    """Return this rank's part of the optimiser's state, and on rank 0 the nets that are not shipped."""
    tensors = _add_prefix("optimizer/", _optimizer_tensors(state.optimizers["backbone"], state.trained))
    if ranks.rank == 0:
        for name, net in unshipped_nets(state).items():
            tensors |= _add_prefix(f"{name}/", net.state_dict())
    return tensors


def unshipped_nets(state: TrainState) -> dict[str, nn.Module]:
    """Return the nets that a run goes on with and does not ship, by name."""
    nets: dict[str, nn.Module | None]
    nets = {"weights": state.backbone, "average": state.average, "encoder": state.encoder, "adapter": state.adapter}
    nets["agreement"] = state.agreement if state.head else None  # without a head, it is in the head's file
    return {name: net for name, net in nets.items() if net is not None and net is not state.usable}


def unlabelled_stamp(config: Config) -> str | None:
    """Return the stamp of the unlabelled images, or None if the run takes none."""
    other = unlabelled(config)
    return other[1].dataset.stamp if other else None


def _optimizer_tensors(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own = rank_optimizer(optimizer).state
    return {
        f"{key}/{name}": value
        for name, param in named.items()
        for key, value in own.get(param, {}).items()
        if isinstance(value, Tensor)
    }


def rank_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimiser that holds this rank's state. With ``optim.shard_state`` it is wrapped in another."""
    wrapped = getattr(optimizer, "optim", optimizer)
    return wrapped if isinstance(wrapped, torch.optim.Optimizer) else optimizer


def _add_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}
