"""Checkpoints: the backbone once, the class matrix by row ranges, one JSON file that makes them whole.

``step_00001000/``: ``backbone.safetensors`` (what is verified and shipped: the moving average if there is one),
``backbone_state_RANK.safetensors`` (its optimiser, in one file unless the ranks share it out, the raw weights where
something else is shipped, a momentum encoder, an adapter to a teacher's width, the thresholds of quantface beside a
class matrix), ``head_RANK.safetensors`` (rows of the class matrix and their optimiser; or once, what all ranks have in
common in its place), ``identities.parquet`` (whose rows they are) and ``checkpoint.json``, which is written last: a
folder without it is no checkpoint, on a disk as on an object store, where nothing can be renamed. Nothing random is
saved: every draw is a function of (seed, step, rank or sample id), and the data position is the step.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from fr_core.config import Config, flat, lanes
from fr_core.data.schema import sha256
from fr_core.data.store import AnyPath, fetched, find, remove_folder, write_text_atomically, written
from fr_core.errors import UserError
from fr_core.heads.sharded_fc import ShardedFC
from fr_core.nets.open import CHECKPOINTS, is_whole
from fr_core.ranks import Ranks
from fr_core.train.state import TrainState, average_statistics

FORMAT = 1
IDENTITIES = "identities.parquet"


def save_checkpoint(config: Config, state: TrainState, out: AnyPath, ranks: Ranks) -> AnyPath:
    """Writes ``out/checkpoints/step_N`` from all ranks and drops the oldest beyond ``train.keep``.

    Raises:
        UserError: the folder cannot be written.
    """
    average_statistics(state, ranks)
    folder = out / "checkpoints" / step_name(state.step)
    try:
        if ranks.rank == 0:
            remove_folder(folder)  # what an earlier life left unfinished
            folder.mkdir(parents=True)
        ranks.barrier()
        rows = (state.head.lo, state.head.hi) if isinstance(state.head, ShardedFC) else None
        files = {}
        if ranks.rank == 0 or rows:
            files[f"head_{ranks.rank:05d}.safetensors"] = _head_tensors(state)
        if ranks.rank == 0:
            files["backbone.safetensors"] = dict(state.usable.state_dict())
        if ranks.rank == 0 or config.optim.shard_state:
            files[f"backbone_state_{ranks.rank:05d}.safetensors"] = _backbone_tensors(state, ranks)
        net = {"net": config.net.model_dump_json()}  # so that the file opens by itself
        facts = {name: _write(folder / name, tensors, net) for name, tensors in files.items()}
        if ranks.rank == 0 and rows:  # whose rows they are, for runs on other identities
            facts[IDENTITIES] = _copy(state.plan.dataset.root / IDENTITIES, folder / IDENTITIES)
        parts = ranks.gather_objects((facts, rows))
        if ranks.rank == 0:
            text = json.dumps(_summary(config, state, parts), indent=1)
            write_text_atomically(folder / "checkpoint.json", text + "\n")
            for old in checkpoints(out)[: -config.train.keep]:
                remove_folder(old)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot write checkpoint {folder}: {reason}") from None
    ranks.barrier()
    return folder


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def checkpoints(out: AnyPath) -> list[AnyPath]:
    """Whole checkpoints of a run, oldest first: ``checkpoint.json`` is there and its files have their sizes."""
    return [path.parent for path in find(out, CHECKPOINTS) if is_whole(path.parent)]


def load_checkpoint(config: Config, state: TrainState, folder: AnyPath, ranks: Ranks) -> None:
    """Puts a run's checkpoint into ``state``; this many or any other number of ranks may have written it.

    Raises:
        UserError: damaged files (named), or a run with other data, net, method, batch or seed.
    """
    summary = json.loads((folder / "checkpoint.json").read_text())
    if summary["format"] != FORMAT:
        raise UserError(f"{folder}: checkpoint format {summary['format']}, this program reads {FORMAT}")
    _check_same_run(config, state, summary, folder)
    states = [name for name in summary["files"] if name.startswith("backbone_state")]
    extra = {name: tensor for file in states for name, tensor in _tensors(folder, summary, file).items()}
    state.usable.load_state_dict(_tensors(folder, summary, "backbone.safetensors"))
    for name, net in _other_nets(state).items():
        net.load_state_dict(_under(f"{name}/", extra))
    _load_optimizer(state.optimizers["backbone"], state.trained, _under("optimizer/", extra))
    if isinstance(state.head, ShardedFC):
        rows = _read_head_rows(folder, summary, state.head.lo, state.head.hi)
        with torch.no_grad():
            state.head.weight.copy_(rows.pop("weight"))
        _load_optimizer(state.optimizers["head"], {"weight": state.head.weight}, _under("optimizer/", rows))
    else:
        state.head.load_state_dict(_tensors(folder, summary, summary["head"][0]["file"]))
    state.step, state.loss_scale = summary["step"], summary["loss_scale"]
    state.good_steps, state.bad_steps, state.run_id = summary["good_steps"], summary["bad_steps"], summary["run_id"]
    if state.watcher and summary["watcher"]:
        state.watcher.load_state_dict(summary["watcher"])


def known_rows(folder: AnyPath, classes_S: Tensor) -> Tensor:
    """Rows of a checkpoint's class matrix: float32 [S, D]. The class −1 has zeros.

    Args:
        classes_S: int64, classes of that checkpoint.
    """
    summary = json.loads((folder / "checkpoint.json").read_text())
    found: Tensor | None = None
    for part in summary["head"]:
        first, last = part["rows"]
        here_S = (classes_S >= first) & (classes_S < last)
        if found is not None and not here_S.any():
            continue
        with checked(folder, summary, part["file"]) as local, safe_open(local, "pt") as file:
            rows = file.get_tensor("weight")
            found = torch.zeros(len(classes_S), rows.shape[1]) if found is None else found
            found[here_S] = rows[classes_S[here_S] - first]
    assert found is not None  # a class matrix has one part at least
    return found


def read_identities(folder: AnyPath) -> tuple[list[str], int]:
    """Names of the identities that a checkpoint's class matrix was trained on, and the variants of each.

    Raises:
        UserError: the checkpoint has no class matrix.
    """
    summary = json.loads((folder / "checkpoint.json").read_text())
    if IDENTITIES not in summary["files"]:
        raise UserError(f"{folder}: no names of identities in it: its run had no class matrix, or is an old one")
    with checked(folder, summary, IDENTITIES) as local:
        names = pq.read_table(local, columns=["name"])["name"].to_pylist()
    return names, summary["config"]["data"].get("variants", 1)


@contextmanager
def checked(folder: AnyPath, summary: dict[str, Any], name: str) -> Iterator[Path]:
    """A file of a checkpoint on the local disk, compared with its checksum.

    Raises:
        UserError: it differs; names it.
    """
    with fetched(folder / name) as file:
        if sha256(file) != summary["files"][name]["sha256"]:
            raise UserError(f"{file}: wrong checksum; delete this checkpoint to go on from the one before")
        yield file


def _tensors(folder: AnyPath, summary: dict[str, Any], name: str) -> dict[str, Tensor]:
    with checked(folder, summary, name) as file:
        return load_file(file)


def _summary(config: Config, state: TrainState, parts: list[Any]) -> dict[str, Any]:
    manifest = state.plan.dataset.manifest
    return {
        "format": FORMAT,
        "step": state.step,
        "epoch": state.step / state.plan.steps_per_epoch,
        "ranks": len(parts),
        "lanes": state.plan.lanes,
        "identities": manifest.identities,
        "images": manifest.images,
        "loss_scale": state.loss_scale,
        "good_steps": state.good_steps,
        "bad_steps": state.bad_steps,
        "run_id": state.run_id,
        "watcher": state.watcher.state_dict() if state.watcher else None,
        "head": [
            {"file": f"head_{rank:05d}.safetensors", "rows": rows}
            for rank, (_, rows) in enumerate(parts)
            if rank == 0 or rows
        ],
        "files": {name: facts for written, _ in parts for name, facts in written.items()},
        "config": config.model_dump(mode="json"),
    }


def _head_tensors(state: TrainState) -> dict[str, Tensor]:
    if not isinstance(state.head, ShardedFC):
        return dict(state.head.state_dict())
    optimizer = _optimizer_tensors(state.optimizers["head"], {"weight": state.head.weight})
    return {"weight": state.head.weight.detach()} | _prefixed("optimizer/", optimizer)


def _backbone_tensors(state: TrainState, ranks: Ranks) -> dict[str, Tensor]:
    """This rank's part of the optimiser's state, and on rank 0 the nets beside the one that is shipped."""
    tensors = _prefixed("optimizer/", _optimizer_tensors(state.optimizers["backbone"], state.trained))
    if ranks.rank == 0:
        for name, net in _other_nets(state).items():
            tensors |= _prefixed(f"{name}/", net.state_dict())
    return tensors


def _other_nets(state: TrainState) -> dict[str, nn.Module]:
    nets = {"weights": state.backbone, "average": state.average, "encoder": state.encoder, "adapter": state.adapter}
    nets["agreement"] = state.agreement
    return {name: net for name, net in nets.items() if net is not None and net not in (state.usable, state.head)}


def _write(path: AnyPath, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Any]:
    with written(path) as part:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part, metadata)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        return {"bytes": part.stat().st_size, "sha256": sha256(part)}


def _copy(source: AnyPath, path: AnyPath) -> dict[str, Any]:
    with fetched(source) as local, written(path) as part:
        shutil.copyfile(local, part)
        return {"bytes": part.stat().st_size, "sha256": sha256(part)}


MOVABLE = {"method.teacher"} | {f"method.distill.{name}" for name in ("teacher", "embeddings", "unlabelled.embeddings")}


def _check_same_run(config: Config, state: TrainState, summary: dict[str, Any], folder: AnyPath) -> None:
    now, then = config.model_dump(mode="json"), summary["config"]
    facts: dict[str, tuple[Any, Any]] = {
        "seed": (config.seed, then["seed"]),
        "train.global_batch": (config.train.global_batch, then["train"]["global_batch"]),
        "train.ema on": (config.train.ema > 0, then["train"]["ema"] > 0),
        "data.balanced": (now["data"]["balanced"], then["data"].get("balanced")),
        "data.views": (config.data.views, then["data"].get("views", 1)),
        "data.lanes": (lanes(config), summary["lanes"]),
        "data.shuffle_window": (config.data.shuffle_window, then["data"]["shuffle_window"]),
        "data.variants": (config.data.variants, then["data"].get("variants", 1)),
        "data.variant_strength": (config.data.variant_strength, then["data"].get("variant_strength")),
        "the data's identities": (state.plan.dataset.manifest.identities, summary["identities"]),
        "the data's images": (state.plan.dataset.manifest.images, summary["images"]),
    }
    for section in ("net", "method"):
        new, old = flat(now[section], f"{section}."), flat(then[section], f"{section}.")
        facts |= {name: (new.get(name), old.get(name)) for name in new | old if name not in MOVABLE}
    for name, (ours, theirs) in facts.items():
        if ours != theirs:
            raise UserError(f"{folder}: cannot go on, {name} differs: {theirs} there, {ours} now; use another folder")


def _read_head_rows(folder: AnyPath, summary: dict[str, Any], lo: int, hi: int) -> dict[str, Tensor]:
    """Rows [lo, hi) of the class matrix and of its optimiser's tensors, from the files that hold them."""
    pieces: dict[str, list[Tensor]] = {}
    for part in summary["head"]:
        first, last = part["rows"]
        if first < hi and lo < last:
            with checked(folder, summary, part["file"]) as local, safe_open(local, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (no iterator)
                    rows = file.get_slice(name)[max(lo - first, 0) : min(hi, last) - first]
                    pieces.setdefault(name, []).append(rows)
    return {name: torch.cat(rows) for name, rows in pieces.items()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own = _local(optimizer).state
    return {
        f"{key}/{name}": value
        for name, param in named.items()
        for key, value in own.get(param, {}).items()
        if isinstance(value, Tensor)
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> None:
    optimizer = _local(optimizer)
    own = {param for group in optimizer.param_groups for param in group["params"]}
    for key_name, value in tensors.items():
        key, name = key_name.split("/", 1)
        if named[name] in own:  # a step count has no dimension and stays on the CPU
            optimizer.state[named[name]][key] = value.to(named[name].device) if value.ndim else value


def _local(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """What holds this rank's state."""
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {re.sub(f"^{prefix}", "", n): t for n, t in tensors.items() if n.startswith(prefix)}
